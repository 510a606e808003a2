"""This file recognises by their names whose weights a file holds, and renames them to ours.

An anchor, the weight of the patch embedding, tells the layout, and what stands before it tells the encoder from the
rest of a file: heads, a second network, a wrapper's prefix.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ccmim_fast.checkpoints import eva
from ccmim_fast.checkpoints.convert import from_flat, to_timm
from ccmim_fast.checkpoints.networks import chosen, rank
from ccmim_fast.checkpoints.told import own_of
from ccmim_fast.errors import CheckpointError, one_line
from ccmim_fast.models.parts import has_layer_scale

Tensors = dict[str, Tensor]
_TRANSFORMERS = "transformers' names"  # of its ViTs but DINOv3

_PATCHES = "patch_embed.proj.weight"
_RELATIVE = re.compile(r"\brel(ative)?_pos")  # BEiT, Swin, SAM, timm's vit_relpos_*: other names are alike


class Layout(NamedTuple):
    """A layout tells whose names they are; `rename` turns them, without prefix, into ours, and raises ValueError."""

    words: str
    anchor: str
    rename: Callable[[Tensors], Tensors]
    patches: bool = False  # `_PATCHES` stands beside the anchor, which other networks have too


def recognised(found: Mapping[str, Any], name: str) -> tuple[Tensors, str]:
    """Return the weights in what a file holds, under our names, and in words what was recognised.

    `name` is the file's, for messages. Raises CheckpointError: no layout that is known here, or one without what an
    encoder of ours needs.
    """
    tensors, path = chosen(found, _is_network)
    if not tensors:
        raise CheckpointError(f"{name}: holds no plain dictionary of tensors")
    if min(_prefixes(tensors, _PATCHES), key=rank, default="") == "encoder." and not _has(tensors, "encoder.head."):
        own = {key: value for key, value in tensors.items() if not key.startswith(_HEADS)}
        return own, _said("ccmim_fast's layout", path)
    for layout in LAYOUTS:
        prefixes = _prefixes(tensors, layout.anchor)
        if layout.patches:
            prefixes = [prefix for prefix in prefixes if f"{prefix}{_PATCHES}" in tensors]
        if prefixes:
            prefix = min(prefixes, key=rank)
            own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            own |= _decoder_beside(tensors, prefix)
            if relative := [key for key in own if _RELATIVE.search(key)]:
                reason = "relative positions, as of BEiT, which no encoder here has"
                raise CheckpointError(f"{name}: {relative[0]!r:.100} tells {reason}; take a ViT without them")
            try:
                renamed = layout.rename(own)
            except (ValueError, RuntimeError) as error:  # torch's, of parts that do not fit each other
                raise CheckpointError(f"{name}: {layout.words}: {one_line(error)}") from None
            return renamed, _said(layout.words, (*path, *filter(None, [prefix.rstrip(".")])))
    known = "; ".join(dict.fromkeys(layout.words for layout in LAYOUTS))
    first = next(iter(tensors))
    raise CheckpointError(f"{name}: no layout that is known: the first name is {first!r:.100}; known are {known}")


def _said(words: str, path: tuple[str, ...]) -> str:
    return words + (f", under {'.'.join(path)!r:.60}" if path else "")


def _has(tensors: Tensors, prefix: str) -> bool:
    return any(key.startswith(prefix) for key in tensors)


def _is_network(tensors: Tensors) -> bool:
    return any(_prefixes(tensors, layout.anchor) for layout in LAYOUTS)


def _prefixes(tensors: Tensors, anchor: str) -> list[str]:
    return [key.removesuffix(anchor) for key in tensors if f".{key}".endswith(f".{anchor}")]


def _decoder_beside(tensors: Tensors, prefix: str) -> Tensors:
    """Return ViTMAE's decoder, which stands beside its encoder `vit.`; another decoder's names are others."""
    if not prefix.endswith("vit."):
        return {}
    outer = prefix.removesuffix("vit.")
    own = (f"{outer}decoder.decoder_", f"{outer}decoder.mask_token")
    return {key.removeprefix(outer): value for key, value in tensors.items() if key.startswith(own)}


# timm, MAE, the authors' ccMIM, DINO, DINOv2, MoCo v3

_HEADS = (
    "head.",
    "head_dist.",
    "attn_pool.",
    "last_layer.",
    "pooler.",
    "classifier.",
    "distillation_classifier.",
    "cls_classifier.",
)


def _from_timm(own: Tensors) -> Tensors:
    own = {key: value for key, value in own.items() if not key.startswith(_HEADS)}
    if not _has(own, "decoder_"):
        own.pop("mask_token", None)  # of another method, which masks patches in the encoder
    if "register_tokens" in own:
        own = _without_position_of_cls(own)
    return from_flat({_of_dinov2(key): value for key, value in own.items()})


def _of_dinov2(key: str) -> str:
    """Rename what DINOv2 names otherwise than timm: registers, chunks of blocks, and SwiGLU's layers."""
    key = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key.replace("register_tokens", "reg_token"))
    return key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")


def _without_position_of_cls(own: Tensors) -> Tensors:
    """Add the position of [CLS] to it: timm's models with registers have positions for patches alone."""
    positions_1TD = own["pos_embed"]
    return own | {"cls_token": own["cls_token"] + positions_1TD[:, :1], "pos_embed": positions_1TD[:, 1:]}


# transformers: ViT, DeiT, ViTMAE, DINOv2 with and without registers, I-JEPA; as published and in memory since 5

_PARTS = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.weights_in": "mlp.fc1",
    "mlp.weights_out": "mlp.fc2",
    "mlp.up_proj": "mlp.fc1",
    "mlp.down_proj": "mlp.fc2",
    "layer_scale1": "ls1",
    "layer_scale2": "ls2",
}
_THIRDS = {
    "attention.attention.query": 0,
    "attention.attention.key": 1,
    "attention.attention.value": 2,
    "attention.q_proj": 0,
    "attention.k_proj": 1,
    "attention.v_proj": 2,
}
_OUTER = {
    "embeddings.cls_token": "cls_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.distillation_token": "dist_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
    "pooler.layernorm.weight": "fc_norm.weight",  # BEiT's, of the mean over the patches
    "pooler.layernorm.bias": "fc_norm.bias",
    "decoder.mask_token": "mask_token",
    "decoder.decoder_pos_embed": "decoder_pos_embed",
    **{
        f"decoder.decoder_{part}.{kind}": f"decoder_{part}.{kind}"
        for part in ("embed", "norm", "pred")
        for kind in ("weight", "bias")
    },
}
# ViTMAE's own files, the published ones and those that transformers 5 writes, name the decoder's blocks in two ways.
_BLOCK = re.compile(
    r"^(?P<decoder>decoder\.decoder_layers\.|decoder\.decoder_encoder\.layer\.)?"
    r"(?(decoder)|(?:encoder\.layers?\.|layers?\.))(?P<number>\d+)\.(?P<part>.+)\.(?P<kind>weight|bias|lambda1)$"
)


def _from_transformers(own: Tensors) -> Tensors:
    flat: Tensors = {}
    thirds: dict[str, dict[int, Tensor]] = {}
    for key, value in own.items():
        if key in _OUTER:
            flat[_OUTER[key]] = value
            continue
        if key.startswith(_HEADS) or key == "embeddings.mask_token":
            continue
        block = _BLOCK.match(key)
        if block is None or block["part"] not in {*_PARTS, *_THIRDS}:
            raise ValueError(f"{key!r:.100} has no place in a ViT of timm's")
        to = f"{'decoder_' if block['decoder'] else ''}blocks.{block['number']}"
        kind = "gamma" if block["kind"] == "lambda1" else block["kind"]
        if block["part"] in _THIRDS:
            thirds.setdefault(f"{to}.attn.qkv.{kind}", {})[_THIRDS[block["part"]]] = value
        else:
            flat[f"{to}.{_PARTS[block['part']]}.{kind}"] = value
    if "pos_embed" not in flat:
        raise ValueError("it has no positions that could be loaded")
    for key, parts in thirds.items():
        if parts.keys() == {0, 2} and key.endswith(".bias"):
            parts[1] = torch.zeros_like(parts[0])  # BEiT's keys have none
        if parts.keys() != {0, 1, 2}:
            raise ValueError(f"{key} is not whole: queries, keys or values are missing")
        flat[key] = torch.cat([parts[0], parts[1], parts[2]])
    if "reg_token" in flat:
        flat = _without_position_of_cls(flat)
    return from_flat(flat)


_SCALES = {"attn.proj": "ls1", "mlp.fc2": "ls2"}  # of timm's block: what is scaled, and by what
_QKV = re.compile(r"^blocks\.\d+\.attn\.qkv\.weight$")
_SCALED = re.compile(r"^(blocks\.\d+\.)(attn\.proj|mlp\.fc2)\.bias$")


def as_architecture(ours: Tensors, arch: str) -> tuple[Tensors, str]:
    """Return weights with what timm's architecture `arch` has and they do without, and what that is in words.

    A layer scale is 1 then, biases of queries, keys and values are 0: the encoder stays the same function.
    """
    if (module := own_of(arch)) is None:
        return ours, ""
    own, tensors, words = module.state_dict(), to_timm(ours), ""
    biases = {key.replace(".weight", ".bias") for key in tensors if _QKV.match(key)}
    if own.keys() & biases and not tensors.keys() & biases:
        for name in biases:
            weight = tensors[name.replace(".bias", ".weight")]
            tensors[name] = weight.new_zeros(len(weight))
        words = "; its queries, keys and values have no bias: 0 here"
    if "blocks.0.ls1.gamma" in own and not has_layer_scale(tensors):
        for name in [*tensors]:
            if scaled := _SCALED.match(name):
                tensors[f"{scaled[1]}{_SCALES[scaled[2]]}.gamma"] = torch.ones_like(tensors[name])
    return ours | {f"encoder.{name}": value for name, value in tensors.items()}, words


def _from_eva(own: Tensors) -> Tensors:
    return from_flat(eva.from_files(own))


def _from_dinov3(own: Tensors) -> Tensors:
    return from_flat(eva.from_transformers(own))


LAYOUTS = (
    Layout("DINOv3's own names", "storage_tokens", _from_eva),
    *(
        Layout("timm's names of its Eva family, as of EVA-02 and DINOv3", anchor, _from_eva, patches=True)
        for anchor in eva.ANCHORS
    ),
    Layout("timm's names, as of MAE, DINO, DINOv2 and MoCo v3", _PATCHES, _from_timm),
    Layout(_TRANSFORMERS, "embeddings.patch_embeddings.projection.weight", _from_transformers),
    Layout(f"{_TRANSFORMERS} of DINOv3", "embeddings.patch_embeddings.weight", _from_dinov3),
)
