"""Parts of one's own in place of an architecture's: registers, layer scale, norms of queries and keys, another MLP.

They are arguments of timm's classes, from the settings or read off weights.
"""

# D width

import math
import re
from collections.abc import Mapping
from typing import Any

from timm.layers import GluMlp, Mlp, SwiGLU, SwiGLUPacked
from timm.models.eva import Eva, EvaBlockPostNorm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ccmim_fast.errors import ConfigError

_ALIGNED = 8  # the hidden channels behind gates are a multiple; DINOv2


def chosen_parts(
    own: nn.Module, arch: str, width: int, *, registers: int, layer_scale: float, qk_norm: bool, mlp: str
) -> dict[str, Any]:
    """Return timm's arguments for settings of the section `model`; 0, False and `own` leave what `arch` has.

    `own` is the architecture as timm has it, `width` that of the encoder. An MLP of another kind has as many weights as
    the architecture's, up to rounding. Raises ConfigError where the architecture has no MLP that could be another, or
    no place for norms of queries and keys.
    """
    if qk_norm and isinstance(own.blocks[0], EvaBlockPostNorm):  # timm refuses them in words of its own
        raise _without_place("model.qk_norm=true", own, arch)
    registers_of = "reg_tokens" if isinstance(own, VisionTransformer) else "num_reg_tokens"
    parts = {registers_of: registers, "init_values": layer_scale, "qk_norm": qk_norm}
    return {name: value for name, value in parts.items() if value} | _mlp(own, arch, width, mlp)


def _mlp(own: nn.Module, arch: str, width: int, kind: str) -> dict[str, Any]:
    """Return the arguments of an MLP: of h hidden channels it has 2 D h weights, or 3 D h with gates."""
    if kind == "own":
        return {}
    mlp = mlp_of(own)
    if mlp is None or not isinstance(own, VisionTransformer):
        block = type(own.blocks[0]).__name__
        raise ConfigError(f"model.mlp={kind}: {arch} has its own ({block}); leave it out, or take vit_base_patch16_224")
    gated, hidden = not isinstance(mlp, Mlp), mlp.fc2.in_features * width / own.embed_dim
    if kind == "gelu":
        if not gated:
            return {} if type(mlp.act) is nn.GELU else {"act_layer": nn.GELU}
        return {"mlp_layer": Mlp, "act_layer": nn.GELU, "mlp_ratio": ratio(_rounded(hidden * 3 / 2), width)}
    if gated and isinstance(mlp.act, nn.SiLU):
        return {}
    # The first layer has the gates, and what they let through.
    rows = 2 * _rounded(hidden if gated else hidden * 2 / 3)
    return {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": ratio(rows, width)}


def _rounded(hidden: float) -> int:
    return math.ceil(round(hidden, 6) / _ALIGNED) * _ALIGNED


def ratio(hidden: int, width: int) -> float:
    """Return `mlp_ratio`, whose product with `width` timm cuts off to `hidden` channels.

    Half of it cuts off to half as many: it is the very number of `hidden / 2`.
    """
    return math.nextafter(hidden / width, math.inf)


def check_parts(vit: nn.Module, arch: str, *, registers: int, layer_scale: float, qk_norm: bool) -> None:
    """Refuse settings that timm's class took without building anything for them."""
    ignored = {
        f"model.registers={registers}": registers and vit.num_prefix_tokens != 1 + registers,
        f"model.layer_scale={layer_scale}": layer_scale and not has_layer_scale(vit.state_dict()),
        "model.qk_norm=true": qk_norm and not has_qk_norm(vit.state_dict()),
    }
    for setting, without in ignored.items():
        if without:
            raise _without_place(setting, vit, arch)


def _without_place(setting: str, vit: nn.Module, arch: str) -> ConfigError:
    kind = f"{type(vit).__name__} of {type(vit.blocks[0]).__name__}"
    return ConfigError(f"{setting}: {arch} ({kind}) has no place for it; leave it out")


def parts_in(weights: Mapping[str, Tensor], own: nn.Module, mlp: str = "") -> dict[str, Any]:
    """Return timm's arguments for parts that weights under timm's names have, and their architecture `own` has not.

    They are those of a VisionTransformer, which `eva.as_eva` turns into those of an Eva. `mlp` is the setting
    `model.mlp` where somebody tells it: no weight tells an activation.
    """
    if not isinstance(own, (VisionTransformer, Eva)):
        return {}
    names, found = own.state_dict(), {}
    registers, mine = (of.get("reg_token") for of in (weights, names))
    if registers is not None and (mine is None or mine.shape[1] != registers.shape[1]):
        found["reg_tokens"] = registers.shape[1]
    if has_layer_scale(weights) and not has_layer_scale(names):
        found["init_values"] = 1.0  # the weights replace it
    if has_qk_norm(weights) and not has_qk_norm(names):
        found["qk_norm"] = True
    return found if isinstance(own, Eva) else found | _mlp_in(weights, own, mlp)


def _mlp_in(weights: Mapping[str, Tensor], own: VisionTransformer, kind: str) -> dict[str, Any]:
    """Return timm's arguments for the first block's MLP, where it is another than that of `own`."""
    name = next((name for name in weights if re.fullmatch(r"blocks\.0\.(.*\.)?mlp\.fc1\.weight", name)), None)
    mine, last = mlp_of(own), None if name is None else weights.get(name.replace("fc1", "fc2"))
    if last is None or mine is None:
        return {}
    first, theirs = weights[name], own.state_dict().get(name)
    rows, width, gated = len(first), first.shape[1], len(first) == 2 * last.shape[1]
    if theirs is None or gated != isinstance(mine, GluMlp):
        layer = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU} if gated else {"mlp_layer": Mlp, "act_layer": nn.GELU}
        return layer | {"mlp_ratio": ratio(rows, width)}
    found = {"act_layer": nn.GELU} if kind == "gelu" and type(mine.act) is not nn.GELU else {}
    return found | ({"mlp_ratio": ratio(rows, width)} if rows * own.embed_dim != len(theirs) * width else {})


def mlp_of(own: nn.Module) -> nn.Module | None:
    """Return the first block's MLP, the first one where several stand side by side; None: the block is one itself."""
    return next((part for part in own.blocks[0].modules() if isinstance(part, (Mlp, GluMlp, SwiGLU))), None)


def settings_of(parts: Mapping[str, Any], layer_scale: float) -> dict[str, Any]:
    """Return the settings of the section `model` for what `parts_in` found; `layer_scale` is what a file tells."""
    told = {"registers": parts.get("reg_tokens"), "qk_norm": parts.get("qk_norm")}
    if "init_values" in parts:
        told["layer_scale"] = layer_scale or 1e-5  # DINOv2's
    if "act_layer" in parts:
        told["mlp"] = "gelu" if parts["act_layer"] is nn.GELU else "swiglu"
    return {key: value for key, value in told.items() if value}


def has_layer_scale(names: Mapping[str, Any]) -> bool:
    """Tell whether the first block scales what it adds; EVA's names of the weights are other than ViT's."""
    return any(re.search(r"^blocks\.0\.(.*\.)?(ls\d?\.gamma|gamma_\d)$", name) for name in names)


def has_qk_norm(names: Mapping[str, Any]) -> bool:
    """Tell whether the first block norms queries and keys."""
    return any(re.search(r"^blocks\.0\..*q_norm\.weight$", name) for name in names)
