"""A classifier is trained: cross-entropy of its heads, accuracies on the test images."""

# B batch, H height, W width, C classes, R heads

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ccmim_fast.data.build import Loader
from ccmim_fast.data.source import usable_count
from ccmim_fast.data.stream.batch import Batch
from ccmim_fast.evaluation.job import Job
from ccmim_fast.evaluation.supervised import Supervised


class Classifier(Supervised):
    """This run trains a classifier.

    Args:
        model: inputs -> logits [B, C], or [R, B, C] of heads that share no trained weights.
        inputs: images of a batch, uint8 [B, H, W, channels] or prepared, -> what `model` takes; no gradient in it.
        loader: its micro-batches are (images, targets), or a `Batch` with labels; targets are [B] or shares [B, C].
        heads: names of the R heads.
    """

    def __init__(
        self,
        job: Job,
        model: nn.Module,
        inputs: Callable[[Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        loader: Loader,
        heads: tuple[str, ...] = ("accuracy",),
    ):
        super().__init__(job, model, optimizer, loader)
        self._inputs, self._heads = inputs, heads

    def losses(self, batch: Batch | tuple[Tensor, Tensor]) -> Tensor:
        images, targets = (batch.images_BHWC, batch.labels_B) if isinstance(batch, Batch) else batch
        logits_RBC = self._logits(self.wrapped, images)
        return torch.stack([F.cross_entropy(of_head.float(), targets) for of_head in logits_RBC])

    def test(self) -> dict[str, float]:
        """Return the share of images named right, of each head, and with five guesses where there are more classes."""
        images, here = self.job.test, self.here
        guesses = (1, 5) if images.classes > 5 else (1,)
        right = torch.zeros(len(guesses), len(self._heads), device=here.device)
        for batch in self.job.batches(images, self.loader.plan.micro_batch_size):
            here.watchdog.enter_phase("evaluating the model")
            named = self._logits(self.model, batch.images_BHWC).topk(guesses[-1], dim=-1).indices
            hits = named == batch.labels_B[:, None]
            right += torch.stack([hits[..., :n].any(-1).sum(1) for n in guesses])
        if dist.is_initialized():
            dist.all_reduce(right)
        names = [f"{head}{suffix}" for suffix in ("", ", five guesses")[: len(guesses)] for head in self._heads]
        return dict(zip(names, (right / usable_count(images.source)).flatten().tolist()))

    def _logits(self, model: nn.Module, images: Tensor) -> Tensor:
        logits = model(self._inputs(images))
        return logits if logits.ndim == 3 else logits[None]
