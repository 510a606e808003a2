"""This file puts predictions of the decoder back into the image."""

# B batch, H height, W width, C channels, L patches, M masked, P patch * patch * C

import numpy as np
import torch
from torch import Tensor

from ccmim_fast.build.model import build_objective
from ccmim_fast.config.schema import Config
from ccmim_fast.losses.criteria import Pixels
from ccmim_fast.models.ccmim import CCMIM, Output
from ccmim_kernels import NORM_PIX_EPS, Partition, patchify, unpatchify


def reconstruct(model: CCMIM, config: Config, images_BHWC: Tensor, output: Output) -> np.ndarray | None:
    """Return the images with their masked patches as the model predicts them; None where it predicts no pixels."""
    target = build_objective(config, model).reconstruction
    if not isinstance(target, Pixels):
        return None
    return paste_prediction(target, images_BHWC, output.pred_BMP, output.partition).cpu().numpy()


def paste_prediction(target: Pixels, images_BHWC: Tensor, pred_BMP: Tensor, partition: Partition) -> Tensor:
    """Replace the masked patches of images by predicted pixels; returns [B, H, W, C] uint8.

    With `target.norm_pix` the prediction knows neither mean nor variance of a patch; both are taken from the patch
    itself, so what the picture shows of them was not reconstructed.

    Args:
        images_BHWC: uint8.
        pred_BMP: pixel predictions, rows in the order of `partition.ids_masked_BM`.
    """
    H, W = images_BHWC.shape[1:3]
    mean_P, std_P = (value_C.float().repeat(target.patch**2) for value_C in (target.mean_C, target.std_C))
    patches_BLP = (patchify(images_BHWC, target.patch).float() / 255 - mean_P) / std_P
    index_BMP = partition.ids_masked_BM[..., None].expand(-1, -1, patches_BLP.shape[-1])
    pixels_BMP = pred_BMP.float()
    if target.norm_pix:
        true_BMP = patches_BLP.gather(1, index_BMP)
        spread_BM1 = (true_BMP.var(-1, keepdim=True) + NORM_PIX_EPS).sqrt()
        pixels_BMP = pixels_BMP * spread_BM1 + true_BMP.mean(-1, keepdim=True)
    patches_BLP = patches_BLP.scatter(1, index_BMP, pixels_BMP)
    images = unpatchify((patches_BLP * std_P + mean_P) * 255, target.patch, H, W)
    return images.round().clamp(0, 255).to(torch.uint8)
