"""The demo: ccMIM and MAE pretrained with the same budget, measured against each other and an untrained network."""

import json
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ccmim_fast.build.model import build_model
from ccmim_fast.config.schema import Config
from ccmim_fast.engine.pretraining import Pretraining, fit
from ccmim_fast.errors import ConfigError
from ccmim_fast.evaluation.frozen.held_out import HELD_OUT, HeldOut, make_held_out, measure_features
from ccmim_fast.evaluation.masks.probe import probe
from ccmim_fast.models.ccmim import CCMIM
from ccmim_fast.report import RunView, Snapshot, write_report
from ccmim_fast.report.reconstruction import drawn
from ccmim_fast.runs.folder import open_run_folder

PICTURES = 6  # of them are drawn
LOOKS = 5  # moments of a run that are kept: the start, the end, and between


def run_demo(config: Config) -> Path:
    """Train both methods, write summary.json and report.html into `run.dir`, and print the table.

    Returns:
        The report's path.
    """
    if config.data.source != "shapes":
        raise ConfigError(f"data.source={config.data.source}: the demo needs known objects; nearest: shapes")
    folder = open_run_folder(config)
    torch.manual_seed(config.seed)
    held_out = make_held_out(config)
    methods = {"untrained": measure_features(build_model(config).eval(), config, held_out.source)}
    for name, method in (("mae", as_mae(config)), ("ccmim", config)):
        Console().print(f"\n[bold]{name}[/bold]: {method.train.epochs} epochs of {method.data.samples} images")
        method = replace(method, run=replace(method.run, dir=str(folder / name)))
        methods[name] = train_and_measure(method, held_out)
    # Before its first step a run is the untrained network.
    methods["untrained"] |= {key: methods["ccmim"][f"{key}_start"] for key in ("auroc", "leakage", "recons")}
    summary = {"methods": methods, "chance": 1 / config.data.classes, "setting": setting_of(config)}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    report = folder / "report.html"
    runs = [RunView("mae", folder / "mae"), RunView("ccmim", folder / "ccmim")]
    write_report(report, "ccMIM and MAE, same budget", runs, summary)
    print_table(methods)
    Console().print(f"\nReport: {report}", highlight=False)
    return report


def as_mae(config: Config) -> Config:
    """The same run as MAE: random masks, no contrastive half."""
    return replace(
        config,
        mask=replace(config.mask, strategy="random"),
        contrast=replace(config.contrast, loss="none"),
    )


def train_and_measure(config: Config, held_out: HeldOut) -> dict[str, float]:
    """Pretrain one method; its figures at the start, early (a quarter of the run) and at the end."""
    folder = Path(config.run.dir)
    last = config.train.epochs
    looks = {round(last * i / (LOOKS - 1)) for i in range(LOOKS)}
    moments = {"_start": 0, "_early": round(last / (LOOKS - 1)), "": last}
    figures: dict[str, float] = {}

    def look(epoch: int, run: Pretraining) -> None:
        if epoch not in looks:
            return
        model = run.model
        seen = take_snapshot(model, config, held_out, epoch, folder)
        for moment in (name for name, when in moments.items() if when == epoch):
            figures.update({f"{key}{moment}": value for key, value in seen.items()})
        if epoch == last:
            figures.update(measure_features(model, config, held_out.source))

    fit(config, after_epoch=look)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    # The first line counts FLOPs as it goes, which is slow.
    figures["images_per_second"] = statistics.median(line["images_per_second"] for line in lines[1:] or lines)
    return figures


def take_snapshot(model: CCMIM, config: Config, held_out: HeldOut, epoch: int, folder: Path) -> dict[str, float]:
    """Keep a few pictures of this moment, and return the probe's figures."""
    images_BHWC = held_out.images_BHWC.to(model.mean_C.device)
    figures, output, scores_BL = probe(model, config, images_BHWC, held_out.objects_BHW)
    drawn_BHWC = drawn(model, config, images_BHWC, output)
    few = slice(0, PICTURES)
    Snapshot(
        epoch,
        held_out.images_BHWC[few].numpy(),
        scores_BL[few].numpy(),
        output.partition.mask_BL[few].cpu().numpy(),
        None if drawn_BHWC is None else drawn_BHWC[few].cpu().numpy(),
    ).save(folder / "snapshots" / f"epoch_{epoch:04d}.npz")
    return figures._asdict()


def setting_of(config: Config) -> dict[str, str]:
    """What a reader of the table must know, in words."""
    height, width = config.data.image_size
    model = config.model
    return {
        "encoder": f"{model.depth} blocks, width {model.embed_dim}, patch {model.patch_size}",
        "images": f"{config.data.samples} made images of {height} x {width} pixels, {config.data.classes} classes",
        "budget": f"{config.train.epochs} epochs each",
        "scores": {"all": "all blocks", "first": "first block"}.get(config.score.source, config.score.source),
        "held out": f"{HELD_OUT} images from another seed",
    }


def print_table(methods: dict[str, dict[str, float]]) -> None:
    columns = ("knn", "logreg", "auroc", "leakage", "recons", "images_per_second")
    table = Table("method", *columns)
    for name, figures in methods.items():
        table.add_row(name, *("-" if figures.get(key) is None else f"{figures[key]:.3f}" for key in columns))
    Console().print(table)
