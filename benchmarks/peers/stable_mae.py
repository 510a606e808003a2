"""MAE by `stable-pretraining`: its method `MAE` over timm's encoder, every setting its default."""

# B batch, H height, W width, C channels

from collections.abc import Callable

import timm
from loguru import logger
from plain_step import forms, plain_step
from stable_pretraining.methods.mae import MAE
from timm.layers import set_fused_attn
from torch import Tensor

__all__ = ["build", "forms"]


def build(arch: str, images_BHWC: Tensor, precision: str, attention: str = "sdpa", **form: str) -> Callable[[], Tensor]:
    """The contract of throughput.py. `attention=eager` reaches timm's encoder; the decoder has torch's kernel alone."""
    logger.remove()  # it logs to standard output, where this process writes its result
    set_fused_attn(attention == "sdpa")
    model = MAE(timm.create_model(arch, num_classes=0, img_size=images_BHWC.shape[1]), decoder_depth=8)
    return plain_step(model, lambda model, images: model(images).loss, images_BHWC, precision, **form)
