"""These exports are for ViTModel and ViTMAEForPreTraining of transformers, which need not be installed.

The names of the weights are those of the published checkpoints, which every version of transformers reads.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ccmim_fast.checkpoints.convert import to_flat
from ccmim_fast.checkpoints.run import OpenedRun
from ccmim_fast.errors import ConfigError
from ccmim_fast.export.plain import Images, about, write_json, write_weights
from ccmim_fast.models.block import ViTBlock
from ccmim_fast.models.tokens import patch_size_of

_BICUBIC = 3  # Pillow's number, which preprocessor_config.json holds


# Of a block, timm's name -> theirs; the fused query, key and value are taken apart.
_BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_QKV = "attn.qkv"
_LAYER_SCALE = (".ls1.gamma", ".ls2.gamma")  # goes into the weights before it
_EMBEDDING = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}


def export_vit(run: OpenedRun, out: Path) -> list[Path]:
    """Write the encoder as a ViTModel into `out`, for `AutoModel.from_pretrained(out, add_pooling_layer=False)`.

    Raises ConfigError: ViTModel cannot express the architecture.
    """
    vit, data = run.model.encoder, run.config.data
    refuse("hf-vit", obstacles(vit))
    settings = {"model_type": "vit", "architectures": ["ViTModel"], **config_of(vit)}
    weights = renamed(expressed(vit), "")
    return write_folder(out, settings, weights, about(run), whole_preprocessing(data.image_size), data)


def export_vitmae(run: OpenedRun, out: Path) -> list[Path]:
    """Write a ViTMAEForPreTraining; its loss is our L_recons on the same mask. Raises ConfigError as `export_vit`."""
    vit, config = run.model.encoder, run.config
    refuse("hf-vitmae", obstacles(vit))
    height, width = config.data.image_size
    found = {
        f"images that are not square (data.image_size=[{height}, {width}])": height != width,
        f"a target other than pixels (target.kind={config.target.kind})": config.target.kind != "pixels",
        "another eps in the decoder's norms": vit.norm.eps != run.model.decoder.norm.eps,
        "queries, keys and values without bias": vit.blocks[0].attn.qkv.bias is None,
    }
    refuse("hf-vitmae", [words for words, there in found.items() if there])
    flat = to_flat({name: value for name, value in run.model.state_dict().items() if name.startswith("decoder.")})
    blocks = {name.removeprefix("decoder_"): flat.pop(name) for name in list(flat) if name.startswith("decoder_blocks")}
    weights = renamed(expressed(vit), "vit.")
    weights |= {f"decoder.{name}": value for name, value in flat.items()}
    weights |= dict(_blocks(blocks, "decoder.decoder_layers."))
    settings = config_of(vit) | {
        "model_type": "vit_mae",
        "architectures": ["ViTMAEForPreTraining"],
        "decoder_num_attention_heads": config.decoder.num_heads,
        "decoder_hidden_size": config.decoder.dim,
        "decoder_num_hidden_layers": config.decoder.depth,
        "decoder_intermediate_size": run.model.decoder.blocks[0].mlp.fc1.out_features,
        "mask_ratio": config.mask.ratio,
        "norm_pix_loss": config.target.norm_pix,
    }
    return write_folder(out, settings, weights, about(run), whole_preprocessing(config.data.image_size), config.data)


def obstacles(vit: VisionTransformer, norm: str = "norm") -> list[str]:
    """Return in words what of an encoder, without its head, transformers' ViTs cannot express.

    `norm` is timm's name of the last norm that they have: of every token, or `fc_norm`, of the pooled one.
    """
    if not all(type(block) in (Block, ViTBlock) and type(block.attn) is Attention for block in vit.blocks):
        return ["blocks that are not timm's standard one"]
    names = {f"{part}.{kind}" for part in (*_BLOCK, _QKV) for kind in ("weight", "bias")}
    embedding = {re.sub("^norm", norm, name) for name in _EMBEDDING}
    theirs = {*embedding, *(f"blocks.{number}.{name}" for number in range(len(vit.blocks)) for name in names)}
    heads = ("head.", "head_dist.")
    ours = {name for name in vit.state_dict() if not name.startswith(heads) and not name.endswith(_LAYER_SCALE)}
    surplus, missing = ours - theirs, {name for name in theirs - ours if not name.endswith(f"{_QKV}.bias")}
    eps = {part.eps for part in vit.modules() if isinstance(part, nn.LayerNorm)}
    activations = [getattr(block.mlp, "act", None) for block in vit.blocks]
    shapes = {(b.attn.num_heads, *(value.shape for value in b.state_dict().values())) for b in vit.blocks}
    projection = vit.patch_embed.proj
    found = {
        f"a {type(vit).__name__}": type(vit) is not VisionTransformer,
        f"the weights {_listed(surplus)}": surplus,
        f"an encoder without {_listed(missing)}": missing,
        "norms other than LayerNorm of one eps": len(eps) != 1,
        "an MLP with gates": any(type(block.mlp) is not Mlp for block in vit.blocks),
        "an activation other than GELU": any(repr(act) != repr(nn.GELU()) for act in activations),
        "heads of another width than the encoder's over their number": any(
            block.attn.head_dim * block.attn.num_heads != vit.embed_dim for block in vit.blocks
        ),
        "blocks of several shapes": len(shapes) > 1,
        "patches that are not square, or overlap": len({*projection.kernel_size, *projection.stride}) > 1,
    }
    return [words for words, there in found.items() if there]


def _listed(names: set[str]) -> str:
    """Return the names, those of all blocks as one."""
    return ", ".join(sorted({re.sub(r"blocks\.\d+", "blocks.*", name) for name in names}))


def renamed(timm_weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Rename the weights of a plain ViT as transformers' published ViTs have them."""
    blocks = {name: value for name, value in timm_weights.items() if name.startswith("blocks.")}
    others = {prefix + _EMBEDDING[name]: value for name, value in timm_weights.items() if name not in blocks}
    return others | dict(_blocks(blocks, f"{prefix}encoder.layer."))


def _blocks(weights: dict[str, Tensor], prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in weights.items():
        _, number, inner = name.split(".", 2)
        part, _, kind = inner.rpartition(".")
        if part != _QKV:
            yield f"{prefix}{number}.{_BLOCK[part]}.{kind}", value
            continue
        for which, third in zip(("query", "key", "value"), value.chunk(3)):
            yield f"{prefix}{number}.attention.attention.{which}.{kind}", third


def config_of(vit: VisionTransformer) -> dict[str, Any]:
    """Return what config.json of any of their ViTs says of the encoder."""
    block = vit.blocks[0]
    height, width = vit.patch_embed.img_size
    return {
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": block.norm1.eps,
        "image_size": height if height == width else [height, width],
        "patch_size": patch_size_of(vit),
        "num_channels": vit.patch_embed.proj.in_channels,
        "qkv_bias": block.attn.qkv.bias is not None,
        "dtype": "float32",
    }


def whole_preprocessing(image_size: tuple[int, int]) -> dict[str, Any]:
    """Return the preparation of images that are resized whole, without regard to their aspect."""
    height, width = image_size
    return {"image_processor_type": "ViTImageProcessor", "size": {"height": height, "width": width}}


def write_folder(
    out: Path,
    settings: dict[str, Any],
    weights: dict[str, Tensor],
    facts: dict[str, str],
    preprocessing: dict[str, Any],
    data: Images,
) -> list[Path]:
    """Write weights with `facts`, config.json, and the image processor: `preprocessing`, and how numbers become values.

    (number * rescale_factor - mean) / std is (number / white - mean) / std with the white of `data.max_value`.
    """
    white_C = data.max_value or (255.0,)
    shares = [value / white_C[0] for value in (white_C if len(white_C) > 1 else white_C * len(data.mean))]
    preprocessing = preprocessing | {
        "do_resize": True,
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / white_C[0],
        "do_normalize": True,
        "image_mean": [mean * share for mean, share in zip(data.mean, shares)],
        "image_std": [std * share for std, share in zip(data.std, shares)],
    }
    contents = {"config.json": settings, "preprocessor_config.json": preprocessing}
    written = [write_json(out / name, content) for name, content in contents.items()]
    return [write_weights(weights, facts, out), *written]


def expressed(vit: VisionTransformer) -> dict[str, Tensor]:
    """Return the weights of the same function without layer scale and with a position for [CLS]."""
    weights = vit.state_dict()
    if vit.no_embed_class:
        zero_11D = torch.zeros(1, 1, vit.embed_dim)
        weights["pos_embed"] = torch.cat([zero_11D, weights["pos_embed"]], dim=1)
    for number in range(len(vit.blocks)):
        for scale, scaled in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
            gamma_D = weights.pop(f"blocks.{number}.{scale}.gamma", None)
            if gamma_D is not None:
                name = f"blocks.{number}.{scaled}"
                weights[f"{name}.weight"] = gamma_D[:, None] * weights[f"{name}.weight"]
                weights[f"{name}.bias"] = gamma_D * weights[f"{name}.bias"]
    return weights


def refuse(target: str, found: list[str]) -> None:
    """Raise ConfigError if anything was found that the target cannot express."""
    if found:
        raise ConfigError(f"ccmim export {target}: cannot express {', '.join(found)}; take timm, onnx or torch-export")
