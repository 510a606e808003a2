"""A classifier as something to train: cross-entropy of its heads, accuracies on the test images."""

# B batch, H height, W width, C classes, R heads

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ccmim_fast.data.build import Loader
from ccmim_fast.data.source import usable_count
from ccmim_fast.data.stream.batch import Batch
from ccmim_fast.data.stream.torch_loader import evaluation_batches
from ccmim_fast.evaluation.job import Job
from ccmim_fast.evaluation.supervised import Learner


def classifier(
    job: Job,
    module: nn.Module,
    inputs: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    loader: Loader,
    heads: tuple[str, ...] = ("accuracy",),
) -> Learner:
    """Return what is trained, see `Learner`.

    Args:
        module: inputs -> logits [B, C], or [R, B, C] of heads that share no trained weights.
        inputs: images of a batch, uint8 [B, H, W, channels] or prepared, -> what `module` takes; no gradient in it.
        loader: its micro-batches are (images, targets), or a `Batch` with labels; targets are [B] or shares [B, C].
        heads: names of the R heads.
    """

    def losses(wrapped: nn.Module, batch: Batch | tuple[Tensor, Tensor]) -> Tensor:
        images, targets = (batch.images_BHWC, batch.labels_B) if isinstance(batch, Batch) else batch
        logits_RBC = _of_heads(wrapped(inputs(images)))
        return torch.stack([F.cross_entropy(of_head.float(), targets) for of_head in logits_RBC])

    def test() -> dict[str, float]:
        # Not the wrapped module: ranks may have unequal numbers of batches.
        return accuracies(job, lambda images: _of_heads(module(inputs(images))), heads)

    return Learner(module, losses, optimizer, loader, test)


def accuracies(job: Job, logits: Callable[[Tensor], Tensor], heads: tuple[str, ...]) -> dict[str, float]:
    """Share of the test images named right, of each head, and with five guesses where there are more classes.

    Args:
        logits: uint8 images [B, H, W, channels] -> [R, B, C].
    """
    here, config = job.here, job.config
    guesses = (1, 5) if job.test.classes > 5 else (1,)
    right = torch.zeros(len(guesses), len(heads), device=here.device)
    batches = evaluation_batches(
        job.test.source,
        config.data.image_size,
        config.train.batch_size // (config.train.accumulate * here.world_size),
        here.device,
        config.data.workers,
        central=config.data.test_crop,
        part=(here.rank, here.world_size),
    )
    for batch in batches:
        here.watchdog.enter_phase("evaluating the model")
        hits = logits(batch.images_BHWC).topk(guesses[-1], dim=-1).indices == batch.labels_B[:, None]
        right += torch.stack([hits[..., :n].any(-1).sum(1) for n in guesses])
    if dist.is_initialized():
        dist.all_reduce(right)
    shares = (right / usable_count(job.test.source)).tolist()
    names = [f"{head}{suffix}" for suffix in ("", ", five guesses")[: len(guesses)] for head in heads]
    return dict(zip(names, [share for row in shares for share in row]))


def _of_heads(logits: Tensor) -> Tensor:
    return logits if logits.ndim == 3 else logits[None]
