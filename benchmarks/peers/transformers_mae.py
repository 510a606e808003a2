"""MAE by `transformers`: ViTMAEForPreTraining with the sizes of a timm architecture, everything else its default."""

# B batch, H height, W width, C channels

from collections.abc import Callable

import timm
import torch
from plain_step import normalised, plain_step
from torch import Tensor
from transformers import ViTMAEConfig, ViTMAEForPreTraining


def build(arch: str, images_BHWC: Tensor, precision: str) -> Callable[[], Tensor]:
    """The contract of throughput.py."""
    side = images_BHWC.shape[1]
    with torch.device("meta"):
        vit = timm.create_model(arch, img_size=side)
    config = ViTMAEConfig(
        image_size=side,
        patch_size=vit.patch_embed.patch_size[0],
        hidden_size=vit.embed_dim,
        num_hidden_layers=len(vit.blocks),
        num_attention_heads=vit.blocks[0].attn.num_heads,
        intermediate_size=vit.blocks[0].mlp.fc1.out_features,
        norm_pix_loss=True,
    )
    model = ViTMAEForPreTraining(config).to(images_BHWC.device).train()
    images_BCHW = normalised(images_BHWC)
    return plain_step(model, lambda: model(images_BCHW).loss, precision)
