"""What a file, or a config.json of transformers or timm, tells of weights, and what an encoder built for them must be.

Whatever config.json tells is read, or visible in the weights, or of no effect on a result; anything else is told.
"""

import json
import math
from typing import Any, NamedTuple

import timm
import torch
import yaml
from timm.layers import create_act_layer
from torch import nn

from ccmim_fast.errors import CheckpointError
from ccmim_fast.models.encoder import timms_own

OF_WIDTH = {  # timm's plain ViTs, by width: patch and blocks are read off the weights
    192: "vit_tiny_patch16_224",
    384: "vit_small_patch16_224",
    768: "vit_base_patch16_224",
    1024: "vit_large_patch16_224",
    1280: "vit_huge_patch14_224",
    1408: "vit_giant_patch14_224",
    1664: "vit_gigantic_patch14_224",
}
_SIZES = {384: "small", 768: "base", 1024: "large", 1536: "giant"}
_DINOV2 = {"dinov2": "vit_{}_patch14_dinov2", "dinov2_with_registers": "vit_{}_patch14_reg4_dinov2"}
_DINOV3 = "dinov3_vit"  # whose weights tell the architecture

# Of transformers' and timm's names of activations, those under which timm knows the same function.
_ACTIVATIONS = {"gelu_python": "gelu", "gelu_accurate": "gelu_tanh", "swish": "silu"}
_ACTIVATIONS |= dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh"), "gelu_tanh")

_OF_TRANSFORMERS = {
    # Read here.
    *("hidden_size", "num_attention_heads", "image_size", "model_type", "hidden_act", "layer_norm_eps", "rope_theta"),
    *("rope_parameters", "use_swiglu_ffn", "decoder_num_attention_heads", "norm_pix_loss"),
    # The weights have them.
    *("num_hidden_layers", "intermediate_size", "mlp_ratio", "patch_size", "num_channels", "num_register_tokens"),
    *("qkv_bias", "query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias", "use_gated_mlp", "use_mask_token"),
    *("decoder_hidden_size", "decoder_num_hidden_layers", "decoder_intermediate_size", "num_labels", "vocab_size"),
    *("use_absolute_position_embeddings", "use_relative_position_bias", "use_shared_relative_position_bias"),
    # They start a training, or are of its steps alone, which settings tell here.
    *("initializer_range", "layerscale_value", "layer_scale_init_value", "drop_path_rate", "pos_embed_shift"),
    *("pos_embed_jitter", "pos_embed_rescale", "mask_ratio"),
    # Heads, and what is made of the tokens; the class behind them.
    *("encoder_stride", "pooler_output_size", "pooler_act", "apply_layernorm", "reshape_hidden_states", "stage_names"),
    *("out_features", "out_indices", "use_mean_pooling", "pool_scales", "use_auxiliary_head", "add_fpn"),
    *("auxiliary_loss_weight", "auxiliary_channels", "auxiliary_num_convs", "auxiliary_concat_input"),
    *("semantic_loss_ignore_index", "architectures", "auto_map", "id2label", "label2id", "problem_type", "dtype"),
    *("torch_dtype", "transformers_version", "return_dict", "output_attentions", "output_hidden_states"),
    *("chunk_size_feed_forward", "is_encoder_decoder", "_name_or_path", "tie_word_embeddings", "use_cache"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset"),
}
_OF_TIMM = {
    # Read here.
    *("img_size", "num_heads", "act_layer", "init_values", "rope_temperature"),
    # The weights have them.
    *("patch_size", "embed_dim", "depth", "in_chans", "num_classes", "mlp_ratio", "qkv_bias", "qk_norm", "class_token"),
    *("reg_tokens", "num_reg_tokens", "no_embed_class", "pre_norm", "final_norm", "fc_norm", "global_pool"),
    *("swiglu_mlp", "swiglu_align_to", "scale_mlp", "scale_attn_inner", "qkv_fused", "use_fc_norm"),
    *("use_pre_transformer_norm", "use_post_transformer_norm", "proj_bias", "use_abs_pos_emb"),
    # They start a training, or are of its steps, of other sizes of images or of heads.
    *("weight_init", "fix_init", "dynamic_img_size", "dynamic_img_pad", "strict_img_size", "drop_path_rate"),
    *("head_init_scale", "attn_pool_num_heads", "attn_pool_mlp_ratio", "pool_include_prefix", "patch_drop_rate"),
    *("rope_shift_coords", "rope_jitter_coords", "rope_rescale_coords"),
}
_COMMON = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu")  # of timm's ViTs
_POINTS = torch.linspace(-8, 8, 257, dtype=torch.float64)  # where activations are compared
_BASE_ERROR = 1e-3  # of a base of rotations, which is a whole number


class Told(NamedTuple):
    """What a file tells of its weights, as the fields of `published.Weights` of these names."""

    arch: str = ""
    num_heads: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    image_size: tuple[int, ...] = ()
    max_value: tuple[float, ...] = ()
    layer_scale: float = 0.0
    positions: str = ""
    mlp: str = ""
    activation: str = ""
    eps: float = 0.0
    rope_base: float = 0.0
    settings: tuple[tuple[str, Any], ...] = ()
    unread: str = ""


def of_export(about: dict[str, str]) -> Told:
    """Return what a file of ours tells, or one that tells nothing. Raises ValueError or its like: damaged."""
    arguments = json.loads(about.get("timm_arguments", "{}"))
    heads, size = int(arguments.get("num_heads", 0)), tuple(map(int, arguments.get("img_size", ())))
    mean, std, white = (tuple(map(float, json.loads(about.get(key, "[]")))) for key in ("mean", "std", "max_value"))
    scale, positions = float(arguments.get("init_values", 0)), about.get("positions", "sincos")
    if len(size) not in (0, 2) or min(white, default=1) <= 0 or not 0 <= scale < math.inf:
        raise ValueError(size, white, scale)
    positions, mlp = "" if positions == "sincos" else positions, "gelu" if arguments.get("act_layer") == "gelu" else ""
    found = Told(about.get("arch", ""), heads, mean, std, size, white, scale, positions, mlp)
    return found._replace(settings=_settings_of(about.get("settings", "")))


def _settings_of(text: str) -> tuple[tuple[str, Any], ...]:
    """Return those settings of a run that make its decoder another function, and its target, of the same weights."""
    try:
        run = yaml.safe_load(text) or {}
        parts = {section: dict(run.get(section) or {}) for section in ("decoder", "target")}
    except (yaml.YAMLError, RecursionError):
        raise ValueError(text) from None
    kept = {"decoder": ("num_heads",), "target": ("kind", "norm_pix", "hog_cell")}
    return tuple(
        (f"{part}.{key}", parts[part][key]) for part, keys in kept.items() for key in keys if key in parts[part]
    )


def of_timm(config: dict[str, Any]) -> Told:
    """Return what config.json of a folder of timm's tells."""
    of_images, arguments = config.get("pretrained_cfg", {}), config.get("model_args") or {}
    mean, std = (tuple(map(float, of_images.get(key, ()))) for key in ("mean", "std"))
    heads, size = int(arguments.get("num_heads", 0)), arguments.get("img_size") or of_images.get("input_size", ())[1:]
    found = Told(str(config["architecture"]), heads, mean, std, _pair(size))
    activation, eps, base = _form_of(own_of(found.arch))
    activation, base = arguments.get("act_layer") or activation, arguments.get("rope_temperature") or base
    return _with_form(found, activation, eps, base, _unread(arguments, _OF_TIMM))


def of_transformers(config: dict[str, Any], preparation: dict[str, Any]) -> Told:
    """Return what config.json and the image processor of a folder of transformers' tell."""
    width, kind = int(config.get("hidden_size", 0)), config.get("model_type", "")
    arch = "" if kind == _DINOV3 else OF_WIDTH.get(width, "")
    if kind in _DINOV2:
        arch = _DINOV2[kind].format(_SIZES[width]) if width in _SIZES else ""
    mean, std = (tuple(map(float, preparation.get(f"image_{key}") or ())) for key in ("mean", "std"))
    found = Told(arch, int(config.get("num_attention_heads", 0)), mean, std, _pair(config.get("image_size") or ()))
    names = {
        "decoder_num_attention_heads": "decoder.num_heads",
        "norm_pix_loss": "target.norm_pix",
    }
    found = found._replace(settings=tuple((ours, config[theirs]) for theirs, ours in names.items() if theirs in config))
    # DINOv2's gated MLP has its own, whatever hidden_act says.
    activation = "silu" if config.get("use_swiglu_ffn") else config.get("hidden_act")
    base = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta")
    return _with_form(found, activation, config.get("layer_norm_eps"), base, _unread(config, _OF_TRANSFORMERS))


def _with_form(found: Told, activation: Any, eps: Any, base: Any, unread: str) -> Told:
    name = str(activation or "").lower()
    return found._replace(
        activation=_ACTIVATIONS.get(name, name),
        mlp="gelu" if _ACTIVATIONS.get(name, name) == "gelu" else "",
        eps=float(eps or 0),
        rope_base=float(base or 0),
        unread=unread,
    )


def _unread(config: dict[str, Any], known: set[str]) -> str:
    """Say what a config tells that is not known here, but for what is off: 0, false, null."""
    return ", ".join(f"{key}={json.dumps(value)}"[:60] for key, value in config.items() if value and key not in known)


def _pair(size: Any) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(map(int, size))


def _form_of(vit: nn.Module | None) -> tuple[str, float, float]:
    """Return the activation of an encoder's MLP, the eps of its norms and the base of its rotations; empty, 0: none."""
    block = next(iter(getattr(vit, "blocks", ())), None)
    act, norm = getattr(getattr(block, "mlp", None), "act", None), getattr(block, "norm1", None)
    activation = "" if act is None else next((name for name in _COMMON if _same_function(name, act)), repr(act))
    return activation, getattr(norm, "eps", 0.0), getattr(getattr(vit, "rope", None), "temperature", None) or 0.0


def own_of(arch: str) -> nn.Module | None:
    """Return the module of a name of timm's, without a tag; None for what a file may tell instead."""
    return timms_own(arch) if timm.is_model(arch) and "." not in arch else None


def check_form(vit: nn.Module, told: Any, arch: str, name: str) -> None:
    """Raise CheckpointError where an encoder that was built for weights is another function than their place tells.

    `told` are `Told` or `Weights`; `arch` and `name` are words of the message.
    """
    activation, _, base = _form_of(vit)
    if told.activation and activation and told.activation != activation:
        raise CheckpointError(
            f"{name}: its MLP has the activation {told.activation!r:.40}, {arch}'s has {activation!r}; take an --arch "
            "that has it, or other weights"
        )
    if told.rope_base and base and not math.isclose(told.rope_base, base, rel_tol=_BASE_ERROR):
        reason = f"the base of its rotations (rope_theta) is {told.rope_base:g}, {arch}'s is {base:g}"
        raise CheckpointError(f"{name}: {reason}, which no setting changes; take other weights")


def notes(told: Any, arch: str) -> str:
    """Say, behind what was recognised, what of an encoder is not as its place tells; see `check_form` for `told`."""
    _, eps, _ = _form_of(own_of(arch))
    found = [f"config.json tells what is not read here: {told.unread}"] if told.unread else []
    if told.eps and eps and not math.isclose(told.eps, eps):
        found.insert(0, f"its norms have an eps of {told.eps:g}, and those of {arch} {eps:g}: tokens differ a little")
    return "".join(f"; {words}" for words in found)


def _same_function(name: str, own: nn.Module) -> bool:
    return torch.allclose(own(_POINTS), create_act_layer(name)(_POINTS), rtol=0, atol=1e-6)
