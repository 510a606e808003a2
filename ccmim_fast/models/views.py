"""Views of images are what features are measured on: whole images, and random sets of patches, as many as are trained.

The sets are drawn uniformly, by sample id and number of the set alone: the same for every run, whatever its masks.
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
    """The features of some images; float32, without gradient."""

    # [CLS] and the mean over the patches' tokens, of the whole image and of V - 1 sets of K patches.
    pooled_BV2D: Tensor
    # hV and hM of Eq. 7 and 8 (p(hV) where the loss has a predictor), of the first set and of what the teacher sees of
    # its complement; None where nobody asked, or without a contrastive loss.
    pair_B2E: Tensor | None


@torch.no_grad()
def take_views(model: CCMIM, images_BHWC: Tensor, ids_B: Tensor, sets: int = 1, with_pair: bool = False) -> Views:
    """Pass images through a model in eval mode: whole, and `sets` random sets of the patches of each, one at least.

    Images are as `CCMIM.forward` takes them, `ids_B` int64 on their device.
    """
    x_BLD, vit, kernels = model.embed(images_BHWC), model.encoder, model.kernels
    teacher = model.sampling["teacher"]
    drawn = [random_partition(ids_B, model.keep, model.grid, number, teacher, kernels) for number in range(sets)]
    seen = [None, *(partition.ids_visible_BK for partition in drawn)]
    tokens = (encode_patches(vit, x_BLD, ids_BK, kernels) for ids_BK in seen)
    pooled_BV2D = torch.stack([both_pooled(tokens_BTD, vit.num_prefix_tokens) for tokens_BTD in tokens], dim=1)
    if not with_pair or model.projector is None:
        return Views(pooled_BV2D, None)
    ids_BS = drawn[0].ids_teacher_BT
    teacher_BTD = gather_tokens(x_BLD, ids_BS, prefix_tokens(vit), kernels=kernels)
    visible_BE = model.projector(pooled_BV2D[:, 1, 0])
    visible_BE = visible_BE if model.predictor is None else model.predictor(visible_BE)
    pair_B2E = torch.stack([visible_BE, model.encode_masked(teacher_BTD, ids_BS)[0]], dim=1).float()
    return Views(pooled_BV2D, pair_B2E)


def random_partition(
    ids_B: Tensor, keep: int, grid: tuple[int, int], number: int = 0, teacher: int | None = None, kernels: str = "auto"
) -> Partition:
    """Divide patches at random, `keep` of each sample visible: a function of (sample id, patch, number) alone."""
    drawn = {"seed": _SEED, "epoch": number, "strategy": "random", "teacher": teacher, "kernels": kernels}
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
