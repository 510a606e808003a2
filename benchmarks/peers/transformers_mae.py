"""MAE by `transformers`: ViTMAEForPreTraining with the sizes of a timm architecture, everything else its default."""

# B batch, H height, W width, C channels

from collections.abc import Callable

import timm
import torch
from plain_step import forms, plain_step
from torch import Tensor
from transformers import ViTMAEConfig, ViTMAEForPreTraining

__all__ = ["build", "forms"]


def build(arch: str, images_BHWC: Tensor, precision: str, attention: str = "sdpa", **form: str) -> Callable[[], Tensor]:
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
        attn_implementation=attention,
    )
    model = ViTMAEForPreTraining(config)
    fill_positions_(model)
    return plain_step(model, lambda model, images: model(images).loss, images_BHWC, precision, **form)


def fill_positions_(model: ViTMAEForPreTraining) -> None:
    """Fill the fixed positions of a new model, which transformers 5 leaves zero; 4 has filled them."""
    embeddings, decoder = model.vit.embeddings, model.decoder
    # Once it is marked as initialised the method does nothing.
    embeddings.patch_embeddings.projection._is_hf_initialized = False
    embeddings.initialize_weights()
    decoder.initialize_weights(embeddings.patch_embeddings.num_patches)
