"""A classifier that an evaluation has trained is written for other libraries, as its encoder is by the other files."""

import json
import re
from pathlib import Path
from typing import Any

from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ccmim_fast.evaluation.classifier import Logits, OpenedClassifier, heads_in
from ccmim_fast.evaluation.encoders import eva_form
from ccmim_fast.export.graphs import write_onnx, write_program
from ccmim_fast.export.hugging_face import (
    config_of,
    expressed,
    obstacles,
    refuse,
    renamed,
    whole_preprocessing,
    write_folder,
)
from ccmim_fast.export.plain import facts_of, not_timms, timm_config, timm_preprocessing, write_timm, write_weights
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
    encoder = of.encoder
    return facts_of(of, of.vit, encoder.arch, encoder.positions or "sincos", encoder, _form(of)) | {
        "classifier": of.kind,
        "classes": json.dumps(of.classes),
        "accuracy": json.dumps(of.accuracy),
        "test_crop": str(of.config.data.test_crop),
    }


def export_timm(of: OpenedClassifier, out: Path) -> list[Path]:
    """Write it for `timm.create_model(timm_arch, num_classes=K, checkpoint_path=FILE, **timm_arguments)`.

    A folder gets a config.json, too: `timm.create_model("local-dir:FOLDER", pretrained=True)` then needs no more.
    """
    name, form = _form(of)
    if not rebuilds(of.vit, name, form):
        raise not_timms(of.encoder.arch)
    data = of.config.data
    preprocessing = timm_preprocessing(data.image_size, of.encoder, crop_pct=data.test_crop, crop_mode="center")
    config = timm_config(name, of.vit, form, preprocessing) | {"label_names": list(of.classes)}
    return write_timm(of.vit.state_dict(), about(of), config, out)


def export_safetensors(of: OpenedClassifier, out: Path) -> list[Path]:
    """Write it under our own names: encoder and head."""
    weights = of.vit.state_dict()
    heads = heads_in(weights)
    ours = {name if name in heads else f"encoder.{name}": value for name, value in weights.items()}
    return [write_weights(ours, about(of), out)]


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
    vit, norm = of.vit, "fc_norm" if "fc_norm.weight" in of.vit.state_dict() else "norm"
    refuse("hf-vit", obstacles(vit, norm))
    if (vit.global_pool, norm) == ("avg", "norm"):
        refuse("hf-vit", ["a classifier of the mean of tokens that are normed one by one"])
    weights, theirs = _as_vit(vit, norm) if vit.global_pool == "token" else _as_beit(vit)
    settings = config_of(vit) | theirs
    settings |= {
        "id2label": dict(enumerate(of.classes)),
        "label2id": {name: label for label, name in enumerate(of.classes)},
    }
    return write_folder(out, settings, weights, about(of), test_preprocessing(of), of.encoder)


def _as_vit(vit: VisionTransformer, norm: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return weights and settings; a norm behind the choice of [CLS] is one of every token before it."""
    weights = {re.sub(f"^{norm}\\.", "norm.", name): value for name, value in expressed(vit).items()}
    head = {f"classifier.{part}": weights.pop(f"head.{part}") for part in ("weight", "bias")}
    settings = {"model_type": "vit", "architectures": ["ViTForImageClassification"]}
    return renamed(weights, "vit.") | head, settings


def _as_beit(vit: VisionTransformer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return weights and settings of the same function as a BEiT.

    A BEiT has no bias of keys: it shifts all logits of a query alike. BEiT's positions are resampled wherever images
    are not square, as if their grid were.
    """
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
    settings = {
        "model_type": "beit",
        "architectures": ["BeitForImageClassification"],
        "use_absolute_position_embeddings": True,
        "use_relative_position_bias": False,
        "use_mean_pooling": True,
        "layer_scale_init_value": 0.0,
        "drop_path_rate": 0.0,
    }
    return {name: value for name, value in named.items() if not name.endswith(".key.bias")} | others, settings


def test_preprocessing(of: OpenedClassifier) -> dict[str, Any]:
    """Return the preparation of images as the evaluation tests them: the central part, then resized.

    Perceiver's processor alone crops before it resizes: a square of size / crop_size of the shorter side.
    """
    height, width = of.config.data.image_size
    crop = of.config.data.test_crop
    if height != width:
        return whole_preprocessing((height, width))  # the card tells of the crop
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
