"""What the decoder predicts, put back into the image."""

# B batch, H height, W width, C channels, L patches, M masked, P patch * patch * C

import torch
from torch import Tensor

from ccmim_fast.config.schema import Config
from ccmim_fast.models.ccmim import CCMIM
from ccmim_fast.models.output import Output
from ccmim_kernels import NORM_PIX_EPS, Partition, patchify, unpatchify


def paste_prediction(
    images_BHWC: Tensor,
    pred_BMP: Tensor,
    partition: Partition,
    *,
    patch: int,
    mean_C: Tensor,
    std_C: Tensor,
    norm_pix: bool,
) -> Tensor:
    """The images with their masked patches replaced by predicted pixels, [B, H, W, C] uint8.

    With `norm_pix` the prediction knows neither mean nor variance of a patch; both are taken from the patch itself, so
    what the picture shows of them was not reconstructed.

    Args:
        images_BHWC: uint8.
        pred_BMP: pixel predictions, rows in the order of `partition.ids_masked_BM`.
    """
    H, W = images_BHWC.shape[1:3]
    channels = patch * patch
    mean_P, std_P = mean_C.float().repeat(channels), std_C.float().repeat(channels)
    patches_BLP = (patchify(images_BHWC, patch).float() / 255 - mean_P) / std_P
    index_BMP = partition.ids_masked_BM[..., None].expand(-1, -1, patches_BLP.shape[-1])
    pixels_BMP = pred_BMP.float()
    if norm_pix:
        target_BMP = patches_BLP.gather(1, index_BMP)
        spread_BM1 = (target_BMP.var(-1, keepdim=True) + NORM_PIX_EPS).sqrt()
        pixels_BMP = pixels_BMP * spread_BM1 + target_BMP.mean(-1, keepdim=True)
    patches_BLP = patches_BLP.scatter(1, index_BMP, pixels_BMP)
    images = unpatchify((patches_BLP * std_P + mean_P) * 255, patch, H, W)
    return images.round().clamp(0, 255).to(torch.uint8)


def drawn(model: CCMIM, config: Config, images_BHWC: Tensor, output: Output) -> Tensor | None:
    """What the model made of the images, as `paste_prediction`; None where it predicts no pixels."""
    if config.target.kind != "pixels":
        return None
    return paste_prediction(
        images_BHWC,
        output.pred_BMP,
        output.partition,
        patch=model.patch,
        mean_C=model.mean_C,
        std_C=model.std_C,
        norm_pix=config.target.norm_pix,
    )
