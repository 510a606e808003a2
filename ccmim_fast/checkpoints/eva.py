"""This file renames weights of timm's Eva family (EVA, EVA-02, DINOv3, ...) to timm's, and tells which DINOv3 it sees.

DINOv3 has two layouts beside timm's: its own, and that of transformers; EVA-02's own is close to timm's.
"""

import re

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

# One of these each member of the family has, and no VisionTransformer of timm's; BEiT has the first two.
ANCHORS = ("blocks.0.gamma_1", "blocks.0.attn.q_bias", "blocks.0.attn.q_proj.weight", "rope.freqs")
_DINOV3 = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge_plus", 4096: "7b"}
_BASE = 100.0  # of timm's rotations of each DINOv3
_OF_BFLOAT16 = 0.01  # in which the files hold periods
# Heads, other networks, and tables that are computed
_NOT_OURS = re.compile(
    r"(head|lm_head|attn_pool|projectors|local_cls_norm|rope_embed)\.|mask_token$|(.*\.)?rope\.(?!freqs$)|.*\.bias_mask$"
)
_RENAMED = {
    r"\.mlp\.w1\.": ".mlp.fc1_g.",
    r"\.mlp\.w2\.": ".mlp.fc1_x.",
    r"\.mlp\.w3\.": ".mlp.fc2.",
    r"\.mlp\.ffn_ln\.": ".mlp.norm.",
    r"\.attn\.inner_attn_ln\.": ".attn.norm.",
    r"\.ls([12])\.gamma$": r".gamma_\1",
    r"^storage_tokens$": "reg_token",
}
_OF_TRANSFORMERS = {
    "embeddings.cls_token": "cls_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.patch_embeddings.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.bias": "patch_embed.proj.bias",
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
}
_PARTS = {
    "attention.o_proj": "attn.proj",
    "mlp.up_proj": "mlp.fc1",
    "mlp.down_proj": "mlp.fc2",
    "norm1": "norm1",
    "norm2": "norm2",
}
_GATED = {"mlp.gate_proj": "mlp.fc1_g", "mlp.up_proj": "mlp.fc1_x"}
# By our names, of a block of any DINOv3; and those that tell another of the family.
_HAS = {"encoder.cls_token", "encoder.blocks.0.gamma_1", "encoder.blocks.0.attn.qkv.weight"}
_HAS_NOT = {"encoder.pos_embed", "encoder.rope.freqs", "encoder.blocks.0.attn.qkv.bias"}
_BLOCK = re.compile(r"(?:model\.|encoder\.)?layer\.(\d+)\.(.+)\.(weight|bias|lambda1)")


def likely_arch(weights: Tensors, num_heads: int) -> str:
    """Return timm's name of the DINOv3 that weights under our names are of; empty for others, or if nobody can know.

    A width that none of them has may have any number of heads, which then must be told.
    """
    if not weights.keys() >= _HAS or weights.keys() & _HAS_NOT:
        return ""
    width = weights["encoder.cls_token"].shape[-1]
    if width not in _DINOV3 and not num_heads:
        return ""
    size = _DINOV3.get(width, "small")
    if size not in ("huge_plus", "7b") and "encoder.blocks.0.mlp.fc1_g.weight" in weights:
        size = "small_plus"
    return f"vit_{size}_patch16_dinov3" + "_qkvb" * (size == "tiny" or "encoder.blocks.0.attn.q_bias" in weights)


def from_files(own: Tensors) -> Tensors:
    """Rename weights of files of the family, timm's or its authors'. Raises ValueError: rotations timm's have not."""
    apart = any(".attn.q_proj." in name for name in own)
    _check_periods(own.get("rope_embed.periods"))
    found: Tensors = {}
    for name, value in own.items():
        if _NOT_OURS.match(name):
            continue
        for pattern, renamed in _RENAMED.items():
            name = re.sub(pattern, renamed, name)
        if apart:  # EVA-02's own have biases that are added later
            name = re.sub(r"\.attn\.([qv])_bias$", r".attn.\1_proj.bias", name)
        if name.endswith(".attn.qkv.bias") and "storage_tokens" in own:
            to, (q_D, _, v_D) = name.removesuffix("qkv.bias"), value.chunk(3)  # DINOv3 masks that of its keys
            found |= {f"{to}q_bias": q_D, f"{to}v_bias": v_D}
        else:
            found[name] = value
    return found


def _check_periods(periods: Tensor | None) -> None:
    """Raise ValueError where the file of a DINOv3 has other rotations than timm's, which computes them."""
    if periods is None:
        return
    expected = _BASE ** (torch.arange(periods.numel()) / max(periods.numel(), 1))
    if not torch.allclose(periods.float().flatten(), expected, rtol=_OF_BFLOAT16):
        largest = float(periods.float().max()) if periods.numel() else 0
        raise ValueError(f"rope_embed.periods, up to {largest:.3g}, are not those of base {_BASE:g}, as timm's DINOv3s")


def from_transformers(own: Tensors) -> Tensors:
    """Rename weights of transformers' DINOv3; raises ValueError for a name or a bias that has no place in timm's."""
    parts = _PARTS | (_GATED if any(".mlp.gate_proj." in name for name in own) else {})
    found: Tensors = {}
    projections: dict[str, dict[str, Tensor]] = {}
    for name, value in own.items():
        if name == "embeddings.mask_token" or not value.numel():  # no registers
            continue
        if name in _OF_TRANSFORMERS:
            found[_OF_TRANSFORMERS[name]] = value
            continue
        block = _BLOCK.fullmatch(name)
        number, part, kind = block.groups() if block else ("", "", "")
        if scale := re.fullmatch(r"layer_scale([12])", part):
            found[f"blocks.{number}.gamma_{scale[1]}"] = value
        elif third := re.fullmatch(r"attention\.([qkv])_proj", part):
            projections.setdefault(number, {})[f"{third[1]}.{kind}"] = value
        elif part in parts:
            found[f"blocks.{number}.{parts[part]}.{kind}"] = value
        else:
            raise ValueError(f"{name!r:.100} has no place in a DINOv3 of timm's")
    for number, of_block in projections.items():
        found |= _attention(f"blocks.{number}.attn.", of_block)
    return found


def _attention(to: str, of_block: Tensors) -> Tensors:
    """Return queries, keys and values as one, with biases as timm's Eva has them: of queries and values, or none."""
    if missing := {f"{letter}.weight" for letter in "qkv"} - of_block.keys():
        raise ValueError(f"{to}qkv.weight is not whole: {', '.join(sorted(missing))} missing")
    found = {f"{to}qkv.weight": torch.cat([of_block[f"{letter}.weight"] for letter in "qkv"])}
    biases = {letter: of_block.get(f"{letter}.bias") for letter in "qkv"}
    if biases["k"] is not None and biases["k"].any():
        raise ValueError(f"{to}k has a bias, which timm's DINOv3 has no place for")
    if (biases["q"] is None) != (biases["v"] is None):
        raise ValueError(f"{to}q and v: one has a bias alone, which timm's DINOv3 has no place for")
    if biases["q"] is not None:
        found |= {f"{to}q_bias": biases["q"], f"{to}v_bias": biases["v"]}
    return found
