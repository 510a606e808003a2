"""A classifier that an evaluation has trained is written for other libraries, as its encoder is by the other files."""

import json
from pathlib import Path
from typing import Any

from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ccmim_fast.errors import ConfigError
from ccmim_fast.evaluation.classifier import Logits, OpenedClassifier
from ccmim_fast.evaluation.encoders import eva_form
from ccmim_fast.export.graphs import write_onnx, write_program
from ccmim_fast.export.hugging_face import config_of, expressed, obstacles, refuse, renamed, whole_images, write_folder
from ccmim_fast.export.plain import commit_of, public, timm_config, timm_images, to_yaml, write_json, write_weights
from ccmim_fast.export.timm_model import rebuilds, written_form
from ccmim_fast.models.encoder import timms_own
from ccmim_fast.models.parts import parts_in
from ccmim_fast.models.tokens import heads_of, patch_size_of


def _form(of: OpenedClassifier) -> tuple[str, dict[str, Any]]:
    """Return timm's name, and what `timm.create_model` needs beside it and the number of classes."""
    vit, weights, arch = of.vit, of.vit.state_dict(), of.encoder.arch
    sizes = {
        "img_size": list(of.config.data.image_size),
        "in_chans": vit.patch_embed.proj.in_channels,
        "class_token": vit.cls_token is not None,
        "global_pool": vit.global_pool,
        "patch_size": patch_size_of(vit),
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        "num_heads": heads_of(vit),
        "fc_norm": "fc_norm.weight" in weights,
    }
    sizes |= parts_in(weights, timms_own(arch), of.encoder.mlp)
    if isinstance(vit, Eva):
        return eva_form(of.encoder, weights, sizes)
    return written_form(arch, arch, sizes)


def about(of: OpenedClassifier) -> dict[str, str]:
    """Return what every exported file carries, texts by name; what is no word or number is JSON."""
    encoder, data = of.encoder, of.config.data
    name, form = _form(of)
    return {
        "format": "pt",
        "classifier": of.kind,
        "classes": json.dumps(of.classes),
        "accuracy": json.dumps(of.accuracy),
        "arch": encoder.arch,
        "timm_arch": name,
        "timm_arguments": json.dumps(form),
        "positions": encoder.positions or "sincos",
        "image_size": json.dumps(list(data.image_size)),
        "test_crop": str(data.test_crop),
        "patch_size": str(patch_size_of(of.vit)),
        "prefix_tokens": str(of.vit.num_prefix_tokens),
        "mean": json.dumps(list(encoder.mean)),
        "std": json.dumps(list(encoder.std)),
        "max_value": json.dumps(list(encoder.max_value)),
        "step": str(of.step),
        "averaged_weights": str(of.averaged).lower(),
        "ccmim_fast_commit": commit_of(of.folder),
        "settings": to_yaml(public(of.config)),
    }


def export_timm(of: OpenedClassifier, out: Path) -> list[Path]:
    """Write it for `timm.create_model(timm_arch, num_classes=K, checkpoint_path=FILE, **timm_arguments)`.

    A folder gets a config.json, too: `timm.create_model("local-dir:FOLDER", pretrained=True)` then needs no more.
    """
    name, form = _form(of)
    if not rebuilds(of.vit, name, form):
        reason = f"timm has no arguments that build {of.encoder.arch} as it was trained"
        raise ConfigError(f"ccmim export timm: {reason}; take safetensors, onnx or torch-export")
    file = write_weights(of.vit.state_dict(), about(of), out)
    if file == out:
        return [file]
    data = of.config.data
    shown = timm_images(data.image_size, of.encoder.mean, of.encoder.std, crop_pct=data.test_crop, crop_mode="center")
    config = timm_config(name, of.vit, form, shown)
    return [file, write_json(out / "config.json", config | {"label_names": list(of.classes)})]


def export_safetensors(of: OpenedClassifier, out: Path) -> list[Path]:
    """Write it under our own names: encoder and head."""
    weights = {name if name.startswith("head.") else f"encoder.{name}": w for name, w in of.vit.state_dict().items()}
    return [write_weights(weights, about(of), out)]


def export_onnx(of: OpenedClassifier, out: Path) -> list[Path]:
    """Write `images` -> `logits` of any batch, see `Logits`. Raises MachineError: onnx or onnxscript is missing."""
    return write_onnx(_logits(of), of.config.data.image_size, "logits", about(of), out)


def export_program(of: OpenedClassifier, out: Path) -> list[Path]:
    """Write `Logits` of any batch, for `torch.export.load(FILE).module()`."""
    return write_program(_logits(of), of.config.data.image_size, about(of), out)


def _logits(of: OpenedClassifier) -> Logits:
    return Logits(of.vit, of.encoder.mean, of.encoder.std)


def export_vit(of: OpenedClassifier, out: Path) -> list[Path]:
    """Write it as a ViTForImageClassification, which reads [CLS], or as a BeitForImageClassification, which pools.

    Raises ConfigError: transformers cannot express the architecture, or the pooling.
    """
    vit = of.vit
    kind = (vit.global_pool, "fc_norm.weight" in vit.state_dict())
    if kind not in _FORMS:
        refuse("hf-vit", ["a classifier of the mean of tokens that are normed one by one"])
    model_type, class_name, more = _FORMS[kind]
    weights = _WEIGHTS_OF[model_type](vit)
    settings = config_of(vit) | more
    settings |= {
        "model_type": model_type,
        "architectures": [class_name],
        "id2label": dict(enumerate(of.classes)),
        "label2id": {name: label for label, name in enumerate(of.classes)},
    }
    return write_folder(out, settings, weights, about(of), shown_images(of), of.encoder)


def _vit_weights(vit: VisionTransformer) -> dict[str, Tensor]:
    refuse("hf-vit", obstacles(vit))
    weights = expressed(vit)
    head = {f"classifier.{part}": weights.pop(f"head.{part}") for part in ("weight", "bias")}
    return renamed(weights, "vit.") | head


def _beit_weights(vit: VisionTransformer) -> dict[str, Tensor]:
    """Return weights of the same function as a BEiT, which has no bias of keys: it shifts all logits of a query alike.

    BEiT's positions are resampled wherever images are not square, as if their grid were.
    """
    refuse("hf-vit", obstacles(vit, norm="fc_norm"))
    height, width = vit.patch_embed.img_size
    found = {
        f"a classifier of pooled tokens of images that are not square ([{height}, {width}])": height != width,
        "queries, keys and values without bias": vit.blocks[0].attn.qkv.bias is None,
    }
    refuse("hf-vit", [words for words, there in found.items() if there])
    weights = expressed(vit)
    others = {f"classifier.{part}": weights.pop(f"head.{part}") for part in ("weight", "bias")}
    others |= {f"beit.pooler.layernorm.{part}": weights.pop(f"fc_norm.{part}") for part in ("weight", "bias")}
    named = renamed(weights, "beit.")
    return {name: value for name, value in named.items() if not name.endswith(".key.bias")} | others


_BEIT = {
    "use_absolute_position_embeddings": True,
    "use_relative_position_bias": False,
    "use_mean_pooling": True,
    "layer_scale_init_value": 0.0,
    "drop_path_rate": 0.0,
}
# timm's pooling, and whether a norm stands behind it -> `model_type`, class, and what its config.json has besides
_FORMS: dict[tuple[str, bool], tuple[str, str, dict[str, Any]]] = {
    ("token", False): ("vit", "ViTForImageClassification", {}),
    ("avg", True): ("beit", "BeitForImageClassification", _BEIT),
}
_WEIGHTS_OF = {"vit": _vit_weights, "beit": _beit_weights}


def shown_images(of: OpenedClassifier) -> dict[str, Any]:
    """Return the preparation of images as the evaluation tests them: the central part, then resized.

    Perceiver's processor alone crops before it resizes: a square of size / crop_size of the shorter side.
    """
    height, width = of.config.data.image_size
    crop = of.config.data.test_crop
    if height != width:
        return whole_images((height, width))  # the card tells of the crop
    # It rounds size / crop_size * side down.
    larger = height / crop
    larger = round(larger) if larger.is_integer() else larger * (1 - 1e-9)
    size, crop_size = ({"height": side, "width": side} for side in (height, larger))
    return {
        "image_processor_type": "PerceiverImageProcessor",
        "size": size,
        "do_center_crop": True,
        "crop_size": crop_size,
    }
