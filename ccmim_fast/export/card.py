"""The model card is README.md in an exported folder, filled from the run; card.md is its template."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ccmim_fast.checkpoints.run import OpenedRun
from ccmim_fast.config.keys import show
from ccmim_fast.config.load import difference
from ccmim_fast.config.schema import Config
from ccmim_fast.errors import ConfigError
from ccmim_fast.export.graphs import OPSET
from ccmim_fast.export.plain import commit_of, method, public
from ccmim_fast.export.targets import TARGETS
from ccmim_fast.models.tokens import patch_size_of
from ccmim_fast.report.curves import read_metrics

_LOSSES = ("epoch", "loss", "recons", "contrast")


def write_card(
    target: str, run: OpenedRun, out: Path, name: str = "", evaluation: Sequence[tuple[str, str]] = ()
) -> Path:
    """Write README.md into the folder `out`; `name` is OWNER/NAME on the hub, `evaluation` from `read_result`."""
    config = run.config
    height, width = config.data.image_size
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined)
    text = templates.get_template("card.md").render(
        target=target,
        library=TARGETS[target].library,
        method=method(config),
        arch=config.model.arch,
        ratio=f"{config.mask.ratio:.0%}",
        by_score=config.mask.strategy.startswith("importance"),
        contrast=config.contrast.loss != "none",
        commit=commit_of(run.folder),
        facts=_facts(target, run),
        name=name,
        folder=out.name,  # not its path: where it lies on this machine is nobody's business
        prefix=run.model.encoder.num_prefix_tokens,
        size=f"{height} x {width}",
        mean=list(config.data.mean),
        std=list(config.data.std),
        changed=[(key, _cell(show(value))) for key, _, value in difference(Config(), public(config))],
        losses=_last_losses(run.folder),
        evaluation=evaluation,
    )
    path = out / "README.md"
    path.write_text(text, errors="replace")
    return path


def _facts(target: str, run: OpenedRun) -> dict[str, Any]:
    vit, config = run.model.encoder, run.config
    height, width = config.data.image_size
    facts = {
        "image size": f"{height} x {width}, {config.data.channels} channels",
        "patch": patch_size_of(vit),
        "width, blocks": f"{vit.embed_dim}, {len(vit.blocks)}",
        "parameters of the encoder": f"{sum(p.numel() for p in vit.parameters()) / 1e6:.1f} M",
        "optimizer steps": f"{run.step:,}",
        "images of an epoch": f"{run.samples:,}",
        "weights": "moving average" if run.averaged else "of the last step",
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
    found = (read_metrics(run / "metrics.jsonl") or [{}])[-1]
    figures = {key: found[key] for key in _LOSSES if type(found.get(key)) in (int, float)}
    return [(key, f"{value:.4g}") for key, value in figures.items() if math.isfinite(value)]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
