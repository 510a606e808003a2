"""Views of images are what features are measured on: whole images, and random sets of patches, as many as are trained.

The sets are drawn uniformly, by sample id and number of the view alone: the same for every run, whatever its masks.
"""

# B batch, L patches, K visible, S for the teacher, T tokens (prefix first), D width, E embedding dim, V views

from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ccmim_fast.models.ccmim import CCMIM
from ccmim_fast.models.tokens import encode, prefix_tokens, with_prefix
from ccmim_kernels import Partition, gather_tokens, sample_partition

_SEED = 0


class Views(NamedTuple):
    """The features of some images: [CLS] and the mean over the patches' tokens; float32, without gradient."""

    whole_B2D: Tensor  # of whole images
    visible_BV2D: Tensor  # of V sets of K patches
    # hV and hM of Eq. 7 and 8 (p(hV) where the loss has a predictor), of the first set and of what the teacher sees of
    # its complement; None without a contrastive loss.
    pair_B2E: Tensor | None


@torch.no_grad()
def take_views(model: CCMIM, images_BHWC: Tensor, ids_B: Tensor, count: int) -> Views:
    """Pass images through a model in eval mode: whole, and `count` random sets of the patches of each, one at least.

    Images are as `CCMIM.forward` takes them, `ids_B` int64 on their device.
    """
    x_BLD, vit, kernels = model.embed(images_BHWC), model.encoder, model.kernels
    teacher = model.sampling["teacher"]
    drawn = [random_partition(ids_B, model.keep, model.grid, view, teacher, kernels) for view in range(count)]
    whole_B2D, *visible = (
        both_pooled(encode_patches(vit, x_BLD, ids_BK, kernels), vit.num_prefix_tokens)
        for ids_BK in (None, *(partition.ids_visible_BK for partition in drawn))
    )
    pair_B2E = None
    if model.projector is not None:
        ids_BS = drawn[0].ids_teacher_BT
        teacher_BTD = gather_tokens(x_BLD, ids_BS, prefix_tokens(vit), kernels=kernels)
        visible_BE = model.projector(visible[0][:, 0])
        visible_BE = visible_BE if model.predictor is None else model.predictor(visible_BE)
        pair_B2E = torch.stack([visible_BE, model.encode_masked(teacher_BTD, ids_BS)[0]], dim=1).float()
    return Views(whole_B2D, torch.stack(visible, dim=1), pair_B2E)


def random_partition(
    ids_B: Tensor, keep: int, grid: tuple[int, int], view: int = 0, teacher: int | None = None, kernels: str = "auto"
) -> Partition:
    """Divide the patches of samples at random, `keep` of them visible; a function of (sample id, patch, view) alone."""
    drawn = {"seed": _SEED, "epoch": view, "strategy": "random", "teacher": teacher, "kernels": kernels}
    return sample_partition(None, ids_B, keep=keep, grid=grid, **drawn)


def both_pooled(tokens_BTD: Tensor, prefix: int) -> Tensor:
    """Return [CLS] and the mean over the patches' tokens: [B, 2, D] float32."""
    tokens_BTD = tokens_BTD.float()
    return torch.stack([tokens_BTD[:, 0], tokens_BTD[:, prefix:].mean(dim=1)], dim=1)


def encode_patches(
    vit: VisionTransformer, x_BLD: Tensor, ids_BK: Tensor | None = None, kernels: str = "auto"
) -> Tensor:
    """Encode embedded patches, those at `ids_BK` alone unless it is None: final tokens [B, T, D]."""
    if ids_BK is None:
        return encode(vit, with_prefix(vit, x_BLD))[0]
    return encode(vit, gather_tokens(x_BLD, ids_BK, prefix_tokens(vit), kernels=kernels), ids_BK)[0]
