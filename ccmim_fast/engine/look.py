"""A look measures the features of a few fixed training images, without labels, between two epochs."""

# N images of all ranks, S of this rank, V views, D width, E embedding dim

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ccmim_fast.data.build import Loader
from ccmim_fast.data.index.bad_samples import BadSamples
from ccmim_fast.data.source import usable_count, usable_ids
from ccmim_fast.data.stream.batch import to_device
from ccmim_fast.data.stream.plan import MicroBatch
from ccmim_fast.data.stream.prefetch import load_with_fallback, prefetch
from ccmim_fast.data.stream.torch_loader import load_crop
from ccmim_fast.data.threads import thread_count
from ccmim_fast.engine.compile import uncompiled
from ccmim_fast.engine.representation import alignment, alpha_req, lidar, rankme, uniformity
from ccmim_fast.engine.step import TrainStep
from ccmim_fast.models.views import Views, take_views
from ccmim_fast.ranks.fsdp import let_go
from ccmim_fast.ranks.session import Session, gather_ranks

SETS = 4  # of random patches: of a quarter of the patches each they cost as much as the whole image
_AT_ONCE = 64  # images of a pass, or a micro-batch: beside the weights a pass without gradient takes less than a step
# FLOPs of a look as training steps of its images: counted, 0.7 (demo), 1.6 (ccMIM, ViT-B) to 2.3 (MAE, ViT-H). Where
# that is surely 1 % of an epoch or less there is a look after each.
_STEPS, _SHARE = 3, 0.01


class Look:
    """This class has the images of a run's looks: up to `images`, evenly spread over the set, the same at every look.

    Each rank has an equal share, so that ranks which divide the weights among them make equally many passes.
    """

    def __init__(self, step: TrainStep, loader: Loader, here: Session, images: int):
        self._step, self._plan, self._here = step, loader.plan, here
        usable = usable_count(loader.plan.source)
        self.images = min(images, usable) // here.world_size * here.world_size
        positions_N = np.arange(self.images) * usable // max(1, self.images)
        self._ids_S = usable_ids(loader.plan.source, positions_N)[here.rank :: here.world_size]

    def is_due(self, epoch: int, saved: bool) -> bool:
        """Return whether there is a look after this epoch, 0 being the start; `saved`: a checkpoint is made then."""
        cheap = _STEPS * self.images <= _SHARE * self._plan.samples
        return self.images > 0 and (cheap or saved or epoch == 0)

    def __call__(self) -> dict[str, float]:
        """Return the figures, see `measures`; every rank calls it. Nothing of the run changes, no number is drawn."""
        step, device = self._step, self._here.device
        step.model.eval()
        with step.precision.autocast(device), uncompiled(step.model):
            found = [take_views(step.model, images, ids, SETS, with_pair=True) for images, ids in self._batches(device)]
        step.model.train()
        let_go(step.model)
        parts = (None if part[0] is None else gather_ranks(torch.cat(part)).flatten(0, 1) for part in zip(*found))
        views = Views(*(None if part is None else part.cpu() for part in parts))
        return measures(views) if self._here.is_main else {}

    def _batches(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield whole images [B, H, W, C] and their ids; in place of one that fails the sample that training shows."""
        source, size = self._plan.source, min(_AT_ONCE, self._plan.micro_batch_size)
        sizes_S2 = source.sizes_N2[self._ids_S].astype(np.int64)
        boxes_S4 = np.concatenate([np.zeros_like(sizes_S2), sizes_S2], axis=1)
        none_S = np.zeros_like(self._ids_S)
        whole = MicroBatch(self._ids_S, none_S, boxes_S4, none_S.astype(bool))
        load_one = partial(load_crop, source, image_size=self._step.config.data.image_size)
        # An account of its own: what the run tells of bad samples does not depend on looks.
        options = {"plan": self._plan, "bad_samples": BadSamples(source, "skip", 1.0)}
        batches = (whole.part(start, start + size) for start in range(0, len(self._ids_S), size))
        threads = thread_count(self._step.config.data.workers)
        for shown, images in prefetch(partial(load_with_fallback, load_one, **options), batches, threads):
            yield to_device(np.stack(images), device), torch.from_numpy(shown.ids_B).to(device)


def measures(views: Views) -> dict[str, float]:
    """Return the measures of `engine.representation` by name: of averaged patches, and with `_cls` of [CLS].

    All are of whole images, but `lidar`, whose views are the sets of patches, and `alignment`, of hV and hM, which is
    missing without a contrastive loss. NaN where features are not finite.
    """
    found: dict[str, Tensor] = {}
    finite = all(part.isfinite().all() for part in views if part is not None)
    for index, suffix in ((1, ""), (0, "_cls")):
        whole_ND, *sets = views.pooled_BV2D[:, :, index].unbind(1)
        for measure in (rankme, alpha_req, uniformity):
            found[f"{measure.__name__}{suffix}"] = measure(whole_ND) if finite else torch.nan
        found[f"lidar{suffix}"] = lidar(torch.stack(sets, dim=1)) if finite else torch.nan
    if views.pair_B2E is not None:
        found["alignment"] = alignment(*views.pair_B2E.unbind(1)) if finite else torch.nan
    return {name: float(value) for name, value in found.items()}
