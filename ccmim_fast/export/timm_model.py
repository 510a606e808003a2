"""This file tells by which name and arguments timm builds the encoder of a run; a JSON file can hold them."""

from typing import Any

import timm
import torch
from timm.layers import Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ccmim_fast.config.schema import Config
from ccmim_fast.models.encoder import own_encoder, timm_form
from ccmim_fast.models.parts import has_layer_scale
from ccmim_fast.models.tokens import heads_of

# A class is no JSON. For an MLP of another class these names of timm's stand in, which have it and every other part
# that an argument cannot change as plain ViTs do.
_WITH_GATES, _WITHOUT = "vit_giant_patch14_dinov2", "vit_base_patch16_224"
_ACTIVATIONS = {nn.GELU: "gelu", nn.SiLU: "silu"}


def timm_model(config: Config) -> tuple[str, dict[str, Any]]:
    """Return the name of an architecture, and what `timm.create_model` needs beside it to build the encoder.

    The name is that of the run, or one that has its MLP (`model.mlp`) or rotary positions (`model.positions`).
    """
    model = config.model
    asked = {key: value for key, value in vars(model).items() if key not in ("arch", "drop_path")}
    name, form = timm_form(model.arch, **asked)
    arguments = {"img_size": list(config.data.image_size), "in_chans": config.data.channels} | form
    return written_form(name, model.arch, arguments)


def written_form(name: str, arch: str, arguments: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name of an architecture and its arguments without classes, as a JSON file can hold them.

    With an MLP of another class than `arch` has it is the name of another architecture.
    """
    arguments = dict(arguments)
    kind, activation = arguments.pop("mlp_layer", None), arguments.pop("act_layer", None)
    if kind is Mlp:  # whose activation it is
        return _WITHOUT, _of_plain(own_encoder(arch)) | arguments
    arguments |= {"act_layer": _ACTIVATIONS[activation]} if activation else {}
    return (name, arguments) if kind is None else (_WITH_GATES, _of_plain(own_encoder(arch)) | arguments)


def _of_plain(own: VisionTransformer) -> dict[str, Any]:
    """Return what another plain ViT needs to be as `own`, but for its MLP."""
    return {
        "patch_size": own.patch_embed.patch_size[0],
        "embed_dim": own.embed_dim,
        "depth": len(own.blocks),
        "num_heads": heads_of(own),
        "no_embed_class": own.no_embed_class,
        "pre_norm": not isinstance(own.norm_pre, nn.Identity),
        "final_norm": not isinstance(own.norm, nn.Identity) or not isinstance(own.fc_norm, nn.Identity),
        "reg_tokens": own.num_reg_tokens,
        "init_values": 1e-5 if has_layer_scale(own.state_dict()) else 0.0,
    }


def rebuilds(vit: VisionTransformer, name: str, arguments: dict[str, Any]) -> bool:
    """Tell whether timm builds the module `vit` by a name and arguments: the same modules, in words and in shapes."""
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=vit.num_classes, **arguments)
    shapes = ({key: value.shape for key, value in one.state_dict().items()} for one in (vit, theirs))
    return (
        _words(vit) == _words(theirs) and vit.no_embed_class == theirs.no_embed_class and next(shapes) == next(shapes)
    )


def _words(vit: VisionTransformer) -> str:
    """Return what a module prints of itself, with one name for our block and timm's, torch's exact GELU and timm's."""
    return repr(vit).replace("ViTBlock(", "Block(").replace("GELU(approximate='none')", "GELU()")
