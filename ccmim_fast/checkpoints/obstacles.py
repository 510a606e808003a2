"""What keeps weights from a model, in words: a part that only one of both has, or of another size."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class _Part(NamedTuple):
    """A row of the table: names of a part's weights under ours, and what it is that only one of both has."""

    names: str
    words: str


_PARTS = (
    _Part(r"encoder\.reg_token$", "registers, which model.registers adds but does not take away"),
    _Part(r"encoder\.dist_token$", "a token of distillation; see the architectures deit*_distilled_*"),
    _Part(r"encoder\.norm_pre\.", "a norm before the blocks; see the architectures vit_*_clip_*"),
    _Part(r"encoder\.norm\.weight$", "a norm behind the blocks"),
    _Part(r"encoder\.blocks\.\d+\.norm\d\.bias$", "norms with a bias (LayerNorm, not RMSNorm)"),
    _Part(r"encoder\.blocks\.\d+\.attn\.[qk]_norm\.", "norms of queries and keys (model.qk_norm)"),
    _Part(r"encoder\.blocks\.\d+\.(attn|mlp)\.norm\.", "norms within attention or MLP"),
    _Part(r"encoder\.blocks\.\d+\.(ls\d\.gamma|gamma_\d)$", "a layer scale (model.layer_scale)"),
    _Part(r"encoder\.blocks\.\d+\.attn\.(qkv\.|[qkv]_)bias$", "biases of queries, keys and values"),
    _Part(r"encoder\.blocks\.\d+\.mlp\.fc1_[gx]\.", "gates in the MLP (model.mlp=swiglu, or another architecture)"),
)
_MLP = re.compile(r"(encoder|decoder)\.blocks\.\d+\.mlp\.fc1\.weight")


def obstacle(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """Say which parts only the model's `own` weights or the file's are of, before their names are listed; or ""."""
    found = []
    for part in _PARTS:
        mine, theirs = (any(re.match(part.names, name) for name in names) for names in (own, weights))
        if mine != theirs:
            found.append(f"the {'model' if mine else 'file'} alone has {part.words}")
    for name in filter(_MLP.fullmatch, own):
        mine, theirs = own[name].shape, weights[name].shape if name in weights else own[name].shape
        if mine[0] != theirs[0] and mine[1:] == theirs[1:]:
            where = name.partition(".")[0]
            found.append(f"the MLP of its {where} has {theirs[0]} channels, the model's {mine[0]}: no setting tells it")
            break
    return "".join(f"{words}; " for words in found)
