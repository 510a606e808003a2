"""The model card is README.md in an exported folder, filled from the run; card.md and classifier_card.md are forms."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from timm.models.deit import VisionTransformerDistilled
from torch import nn

from ccmim_fast.checkpoints.run import OpenedRun
from ccmim_fast.config.keys import show
from ccmim_fast.config.load import difference
from ccmim_fast.errors import ConfigError
from ccmim_fast.evaluation.classifier import OpenedClassifier
from ccmim_fast.export.graphs import OPSET
from ccmim_fast.export.plain import Images, commit_of, method, public
from ccmim_fast.export.targets import TARGETS
from ccmim_fast.models.tokens import patch_size_of
from ccmim_fast.report.curves import read_metrics
from ccmim_fast.runs.state import METRICS

_LOSSES = ("epoch", "loss", "recons", "contrast")


def write_card(
    target: str, run: OpenedRun, out: Path, name: str = "", evaluation: Sequence[tuple[str, str]] = ()
) -> Path:
    """Write README.md into the folder `out`; `name` is OWNER/NAME on the hub, `evaluation` from `read_result`."""
    config = run.config
    return _written(
        "card.md",
        target,
        run,
        config.data,
        out,
        name,
        evaluation,
        method=method(config),
        arch=config.model.arch,
        ratio=f"{config.mask.ratio:.0%}",
        by_score=config.mask.strategy.startswith("importance"),
        contrast=config.contrast.loss != "none",
        facts=_facts(target, run, run.model.encoder, config.data.channels)
        | {"optimizer steps": f"{run.step:,}", "images of an epoch": f"{run.samples:,}"},
        prefix=run.model.encoder.num_prefix_tokens,
        losses=_last_losses(run.folder),
    )


def write_classifier_card(
    target: str, of: OpenedClassifier, out: Path, name: str = "", evaluation: Sequence[tuple[str, str]] = ()
) -> Path:
    """Write README.md of a classifier; the arguments are those of `write_card`."""
    data, encoder = of.config.data, of.encoder
    facts = {
        "classes": len(of.classes),
        "test images named right": "unknown" if of.accuracy is None else f"{of.accuracy:.2%}",
        "pooling": _pooling(of.vit),
        "optimizer steps of the classifier": f"{of.step:,}",
    }
    return _written(
        "classifier_card.md",
        target,
        of,
        encoder,
        out,
        name,
        evaluation,
        kind=of.kind,
        arch=encoder.arch,
        facts=facts | _facts(target, of, of.vit, len(encoder.mean)),
        crop=f"{data.test_crop:.4g}",
        exact=data.image_size[0] == data.image_size[1],
        classes=[_cell(one) for one in of.classes],
    )


def _written(
    template: str,
    target: str,
    of: OpenedRun | OpenedClassifier,
    images: Images,
    out: Path,
    name: str,
    evaluation: Sequence[tuple[str, str]],
    **words: Any,
) -> Path:
    """Fill a form with `words`, and with what the cards of a run and of a classifier say alike."""
    words |= {
        "target": target,
        "library": TARGETS[target].library,
        "commit": commit_of(of.folder),
        "name": name,
        "folder": out.name,  # not its path: where it lies on this machine is nobody's business
        "size": _size(of.config.data.image_size),
        "mean": list(images.mean),
        "std": list(images.std),
        "white": _white(target, images.max_value),
        "backend": _backend(images.max_value),
        "changed": [(key, _cell(show(value))) for key, _, value in difference(type(of.config)(), public(of.config))],
        "evaluation": evaluation,
    }
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined)
    path = out / "README.md"
    path.write_text(templates.get_template(template).render(**words), encoding="utf-8", errors="replace")
    return path


def _size(image_size: tuple[int, int]) -> str:
    height, width = image_size
    return f"{height} x {width}"


def _pooling(vit: nn.Module) -> str:
    if isinstance(vit, VisionTransformerDistilled):
        return "[CLS] and the distillation token"
    return "[CLS]" if vit.global_pool == "token" else "mean over the patches"


def _white(target: str, max_value: tuple[float, ...]) -> str:
    """Say what number of a pixel becomes 1, and how transformers' processor is given pixels of more than 8 bits."""
    said = ", ".join(f"{value:g}" for value in max_value)
    white = f"In the stored pixels {said} is white (`data.max_value`)." if said else ""
    if TARGETS[target].library != "transformers":
        return white
    if said:
        how = f"`rescale_factor` is 1 / {max_value[0]:g}: give the processor the stored numbers"
    else:
        how = "The processor takes 255 for white, as in images of 8 bits: scale others so, and give them"
    return f"{white} {how} as float32 arrays (uint16 wraps around where it is resized).".strip()


def _backend(max_value: tuple[float, ...]) -> str:
    """Return the backend of transformers' processor: Pillow has our pixels, torchvision resizes floats, too."""
    return "torchvision" if max_value else "pil"


def _facts(target: str, of: OpenedRun | OpenedClassifier, vit: nn.Module, channels: int) -> dict[str, Any]:
    """Return the rows of the table that a run and a classifier have alike."""
    facts = {
        "image size": f"{_size(of.config.data.image_size)}, {channels} channels",
        "patch": patch_size_of(vit),
        "width, blocks": f"{vit.embed_dim}, {len(vit.blocks)}",
        "parameters of the ViT": f"{sum(p.numel() for p in vit.parameters()) / 1e6:.1f} M",
        "weights": "moving average" if of.averaged else "of the last step",
    }
    return facts | {"ONNX opset": OPSET} if target == "onnx" else facts


def read_result(path: str) -> list[tuple[str, str]]:
    """Read the figures of an evaluation's result.json: rows of the card. Raises ConfigError for another file."""
    try:
        found = json.loads(Path(path).read_text())
        said = [str(found[key]) for key in ("evaluation", "protocol") if found.get(key)]
        figures = {str(name): float(value) for name, value in found["figures"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError(f"--result={path!r:.200}: no result of an evaluation; name its result.json") from None
    return [(_cell(", ".join([*said, name])), f"{value:.4g}") for name, value in figures.items()]


def _last_losses(run: Path) -> list[tuple[str, str]]:
    found = (read_metrics(run / METRICS) or [{}])[-1]
    figures = {key: found[key] for key in _LOSSES if type(found.get(key)) in (int, float)}
    return [(key, f"{value:.4g}") for key, value in figures.items() if math.isfinite(value)]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
