"""The demo: ccMIM and MAE pretrained with the same budget, measured against each other and an untrained network."""

# B images, H height, W width, C channels, L patches

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ccmim_fast.ablation.runs import QUARTERS, fit_and_measure, make_held_out, measure_features
from ccmim_fast.build.model import build_model, build_objective
from ccmim_fast.config.schema import Config
from ccmim_fast.data.build import build_source
from ccmim_fast.data.made.shapes import ShapesSource
from ccmim_fast.data.stream.torch_loader import evaluation_batches
from ccmim_fast.engine.pretraining import Pretraining
from ccmim_fast.evaluation.masks.objects import object_leakage, object_patches, score_auroc
from ccmim_fast.models.ccmim import CCMIM, Output
from ccmim_fast.models.scores import AllBlocks, PriorScores
from ccmim_fast.registry import SCORE_SOURCES
from ccmim_fast.report.html import write_report
from ccmim_fast.report.pictures import Snapshot
from ccmim_fast.report.runs import RunView
from ccmim_fast.report.snapshots import reconstruct
from ccmim_fast.runs.folder import run_folder

PICTURES = 6  # held-out images that are drawn


def run_demo(config: Config) -> tuple[dict[str, dict[str, float]], Path]:
    """Train both methods; write summary.json and report.html. Returns the figures by method, and the report's path."""
    with run_folder(config.run, {}, resumable=False, also=("report.html", "mae", "ccmim")) as opened:
        torch.manual_seed(config.seed)
        held_out = make_held_out(config)
        opened.begin(config, torch.device("cpu"))
        return _run_both(config, opened.path, held_out)


def _run_both(config: Config, folder: Path, held_out: ShapesSource) -> tuple[dict[str, dict[str, float]], Path]:
    methods = {
        "untrained": measure_features(
            build_model(config).eval(), config, build_source(config.data, config.seed), held_out
        )
    }
    # MAE: random masks, no contrastive half, and no option of scores.
    mask = replace(config.mask, strategy="random", hints=0.0, importance=1.0)
    score, contrast = replace(config.score, temperature=1.0), replace(config.contrast, loss="none")
    mae = replace(config, mask=mask, score=score, contrast=contrast)
    for name, method in (("mae", mae), ("ccmim", config)):
        print(f"\n{name}: {method.train.epochs} epochs of {method.data.samples} images", flush=True)
        method = replace(method, run=replace(method.run, dir=str(folder / name)))
        methods[name] = train_and_measure(method, held_out)
    # Before its first step a run is the untrained network.
    methods["untrained"] |= {key: methods["ccmim"][f"{key}_start"] for key in ("auroc", "leakage", "recons")}
    data, model, (height, width) = config.data, config.model, config.data.image_size
    setting = {
        "encoder": f"{model.depth} blocks, width {model.embed_dim}, patch {model.patch_size}",
        "images": f"{data.samples} made images of {height} x {width} pixels, {data.classes} classes",
        "budget": f"{config.train.epochs} epochs each",
        "scores": SCORE_SOURCES[config.score.source].label,
        "held out": f"{len(held_out)} images from another seed",
    }
    summary = {"methods": methods, "chance": 1 / data.classes, "setting": setting}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    runs = [RunView("mae", folder / "mae"), RunView("ccmim", folder / "ccmim")]
    write_report(folder / "report.html", "ccMIM and MAE, same budget", runs, summary)
    return methods, folder / "report.html"


def train_and_measure(config: Config, held_out: ShapesSource) -> dict[str, float]:
    """Pretrain, draw each milestone; returns the figures of the start, of a quarter of the epochs and of the end."""
    [shown] = evaluation_batches(held_out, config.data.image_size, len(held_out), torch.device("cpu"))
    objects_BHW = torch.from_numpy(np.stack([held_out.mask(i) for i in range(len(held_out))]))

    def measure(epoch: int, trainer: Pretraining) -> dict[str, float]:
        model = trainer.model
        images_BHWC = shown.images_BHWC.to(model.mean_C.device)
        figures, output, scores_BL = probe(model, config, images_BHWC, objects_BHW)
        drawn_BHWC = reconstruct(model, config, images_BHWC, output)
        seen = (shown.images_BHWC, scores_BL, output.partition.mask_BL.cpu())
        some = [part[:PICTURES].numpy() for part in seen]
        snapshot = Snapshot(epoch, *some, None if drawn_BHWC is None else drawn_BHWC[:PICTURES])
        snapshot.save(Path(config.run.dir) / "snapshots" / f"epoch_{epoch:04d}.npz")
        if epoch == config.train.epochs:
            figures |= measure_features(model, config, build_source(config.data, config.seed), held_out)
        return figures

    milestones, rate = fit_and_measure(config, measure)
    by_epoch = {epoch: figures for epoch, _, figures in milestones}
    moments = {"_start": 0, "_early": round(config.train.epochs / QUARTERS), "": config.train.epochs}
    figures = {f"{key}{name}": value for name, epoch in moments.items() for key, value in by_epoch[epoch].items()}
    return figures | {"images_per_second": rate}


@torch.no_grad()
def probe(
    model: CCMIM, config: Config, images_BHWC: Tensor, objects_BHW: Tensor
) -> tuple[dict[str, float], Output, Tensor]:
    """Run the model on all images at once, in eval mode, with the masks of epoch 0: the same noise at every call.

    A score bank knows nothing of held-out images: it is taken to hold the scores of all blocks, which it records. The
    images are uint8 on the model's device; objects are bool, True on the object, on the CPU.

    Returns figures: `auroc` (of the scores of all blocks), `leakage` (of the model's own masks), `recons` (Eq. 9); the
    model's output; and the scores of all blocks [B, L].
    """
    logits_BL = AllBlocks(model.encoder)(model.encoder, model.embed(images_BHWC))
    prior = PriorScores(logits_BL.log_softmax(1) + math.log(logits_BL.shape[1]), torch.ones_like(logits_BL))
    output = model(images_BHWC, torch.arange(len(images_BHWC), device=images_BHWC.device), 0, prior=prior)
    scores_BL, object_BL = logits_BL.softmax(1).cpu(), object_patches(objects_BHW, model.patch)
    figures = {
        "auroc": score_auroc(scores_BL, object_BL),
        "leakage": object_leakage(output.partition.mask_BL.cpu(), object_BL),
        "recons": float(build_objective(config, model).recons(output, images_BHWC)),
    }
    return figures, output, scores_BL
