"""Six views of an image by one encoder are compared: three ways to pool its tokens, of all patches and of a few.

Training shows the encoder a random quarter of the patches, and a test the whole image: the same classifiers of both
tell whether features lack something, or the whole image is too far from what was trained on.
"""

# B batch, N images, T tokens (prefix first), K visible patches, D width

import math
from collections.abc import Sequence

import torch
from timm.models.eva import Eva
from torch import Tensor, nn

from ccmim_fast.data.stream.batch import Batch
from ccmim_fast.errors import ConfigError
from ccmim_fast.evaluation.encoders import Encoder
from ccmim_fast.evaluation.frozen.features import of_all_ranks, own_features
from ccmim_fast.evaluation.frozen.knn import check_k, knn_accuracies
from ccmim_fast.evaluation.frozen.logreg import GRID, check_classes, logreg_accuracy
from ccmim_fast.evaluation.job import Job, Work
from ccmim_fast.models.encoder import ENCODERS
from ccmim_fast.models.views import both_pooled, random_partition
from ccmim_fast.ranks.session import Session, broadcast

_MASK_RATIO = 0.75  # of weights that are no run's: MAE
# The key of a view and its name, in the order of `by_view`.
VIEWS = {
    "": "average",
    "_cls": "[CLS]",
    "_both": "both",
    "_visible": "average (visible)",
    "_cls_visible": "[CLS] (visible)",
    "_both_visible": "both (visible)",
}


def by_view(pooled_NV2D: Tensor) -> dict[str, Tensor]:
    """Return features [N, D] or [N, 2 D] by the keys of `VIEWS`.

    `pooled_NV2D` are [CLS] and the mean over the patches' tokens, as `both_pooled` returns them: of whole images, and
    where V is 2 of random sets of their patches.
    """
    seen = zip(("", "_visible"), pooled_NV2D.unbind(1))
    ways = {"": lambda x_N2D: x_N2D[:, 1], "_cls": lambda x_N2D: x_N2D[:, 0], "_both": lambda x_N2D: x_N2D.flatten(1)}
    return {f"{way}{tokens}": pool(x_N2D) for tokens, x_N2D in seen for way, pool in ways.items()}


def probes(
    train_NV2D: Tensor,
    train_labels_N: Tensor,
    test_NV2D: Tensor,
    test_labels_N: Tensor,
    ks: Sequence[int],
    temperature: float = 0.07,
    cs: Sequence[float] = GRID,
    here: Session | None = None,
) -> dict[str, dict[str, float]]:
    """Return the accuracies of nearest neighbours, `k=10` and so on, and of logistic regression, `logreg`, by view.

    Features are as `by_view` takes them, of all images and on the CPU. Of the ranks of a session `here`, all ask: each
    looks for neighbours among its share, and the first fits. Raises as `knn_accuracies` and `logreg_accuracy`.
    """
    test, found = by_view(test_NV2D), {}
    rank, ranks, device = (0, 1, train_NV2D.device) if here is None else (here.rank, here.world_size, here.device)
    for view, train_ND in by_view(train_NV2D).items():
        tested = test[view], test_labels_N
        shares = (train_ND[rank::ranks], train_labels_N[rank::ranks], *tested)
        near = knn_accuracies(*(share.to(device) for share in shares), ks, temperature)
        fitted = logreg_accuracy(train_ND, train_labels_N, *tested, cs)[0] if rank == 0 else None
        found[view] = {**{f"k={k}": accuracy for k, accuracy in near.items()}, "logreg": broadcast(fitted)}
    return found


def views(job: Job) -> Work:
    """Prepare the accuracies of all views."""
    encoder, config = job.frozen_encoder(pools=False), job.config
    if not encoder.prefix or getattr(encoder.vit, "cls_token", True) is None:
        raise ConfigError(
            f"{job.weights.arch} has no [CLS] token, which the views are of; use ccmim eval knn or logreg"
        )
    if not isinstance(encoder.vit, ENCODERS):
        known = " or ".join(of.__name__ for of in ENCODERS)
        raise ConfigError(
            f"{job.weights.arch} is a {type(encoder.vit).__name__}, and takes no few patches; needs {known}"
        )
    check_k(job)
    few = FewPatches(encoder, config.model.mask_ratio or job.weights.mask_ratio or _MASK_RATIO)

    def work() -> dict[str, float]:
        own = (own_features(job, images, 4 * encoder.width, few) for images in (job.train, job.test))
        train, test = (of_all_ranks(part, images) for part, images in zip(own, (job.train, job.test)))
        check_classes(train.labels_S)
        parts = (part for of in (train, test) for part in (of.features_SD.view(-1, 2, 2, encoder.width), of.labels_S))
        ks = sorted({min(k, len(train.ids_S)) for k in config.knn.k})
        found = probes(*parts, ks, config.knn.temperature, config.logreg.c, job.here)
        return {f"{name} {VIEWS[view]}": share for view, by_name in found.items() for name, share in by_name.items()}

    return work


class FewPatches:
    """This class passes images through a frozen encoder of timm's twice: whole, and by a few patches of each."""

    def __init__(self, encoder: Encoder, mask_ratio: float):
        vit = encoder.vit
        self._encoder, self._grid = encoder, tuple(vit.patch_embed.grid_size)
        patches = math.prod(self._grid)
        # As a run: int(L (1 - ratio)).
        self._keep = min(max(int(patches * (1 - mask_ratio)), 1), patches - 1)
        # timm's encoders have a place where training drops patches.
        self._drop = vit.patch_drop = ChosenPatches(encoder.prefix, told=isinstance(vit, Eva))

    def __call__(self, batch: Batch) -> Tensor:
        """Return [B, 2 * 2 * D] float32: [CLS] and mean of the patches' tokens, of both passes."""
        few_BK = random_partition(batch.ids_B, self._keep, self._grid, kernels="reference").ids_visible_BK
        passes = []
        for self._drop.ids_BK in (None, few_BK):
            tokens_BTD = self._encoder(batch.images_BHWC)
            passes.append(self._encoder.norm(both_pooled(tokens_BTD, self._encoder.prefix)))
        self._drop.ids_BK = None
        return torch.stack(passes, dim=1).flatten(1)


class ChosenPatches(nn.Module):
    """This module stands in for timm's `patch_drop`: of tokens [B, P + L, D] it keeps the prefix and patches `ids_BK`.

    `told`: it returns them too, by which Eva rotates.
    """

    ids_BK: Tensor | None = None  # int64; None: all

    def __init__(self, prefix: int, told: bool):
        super().__init__()
        self._prefix, self._told = prefix, told

    def forward(self, x_BTD: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        if self.ids_BK is not None:
            prefix_BP = torch.arange(self._prefix, device=x_BTD.device).expand(len(x_BTD), -1)
            places_BT = torch.cat([prefix_BP, self.ids_BK + self._prefix], dim=1)
            x_BTD = x_BTD.take_along_dim(places_BT[:, :, None], dim=1)
        return (x_BTD, self.ids_BK) if self._told else x_BTD
