"""The runs of an ablation: each variant with each seed, in a folder of its own, measured alike; done ones are kept."""

# P places in an epoch, B images, H height, W width, C channels, L patches

import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ccmim_fast.bank.bank import read_maps
from ccmim_fast.config.load import difference, from_yaml, load_config, to_yaml
from ccmim_fast.config.schema import Config
from ccmim_fast.data.build import build_source
from ccmim_fast.data.index.bad_samples import BadSamples
from ccmim_fast.data.made.shapes import ShapesSource
from ccmim_fast.data.source import Source
from ccmim_fast.data.stream.batch import make_batch
from ccmim_fast.data.stream.torch_loader import evaluation_batches, load_crop
from ccmim_fast.engine.build import build_step
from ccmim_fast.engine.dry_run import count_flops
from ccmim_fast.engine.pretraining import Pretraining, fit
from ccmim_fast.errors import ConfigError, one_line
from ccmim_fast.evaluation.frozen.features import collect
from ccmim_fast.evaluation.frozen.views import probes
from ccmim_fast.evaluation.images import with_classes
from ccmim_fast.evaluation.masks.objects import object_leakage, objects_of, score_auroc
from ccmim_fast.models.ccmim import CCMIM
from ccmim_fast.models.scores import AllBlocks, PriorScores
from ccmim_fast.models.views import take_views
from ccmim_fast.ranks.session import Session
from ccmim_fast.report.curves import read_metrics
from ccmim_fast.runs.state import CONFIG

PROBED = 1000  # training images whose scores and masks are looked at
HELD_OUT = 1000  # images that no run trains on
NEIGHBOURS = 20  # of kNN, or all images where they are fewer
_COUNTED = ("--train.device=cpu", "--train.precision=fp32", "--train.kernels=reference", "--train.attention=sdpa")
_COUNTED += ("--train.cuda_graph=false", "--train.find_batch=false", "--teacher.precision=same", "--data.loader=torch")
QUARTERS = 4  # of the epochs, after each of which a run is measured
SUMMARY = "summary.json"  # in the folder of a run that is done


class Run(NamedTuple):
    """One run of one variant: options as on the command line."""

    variant: str
    seed: int
    options: tuple[str, ...]

    @property
    def folder_name(self) -> str:
        return f"{''.join(c if c.isalnum() or c == '.' else '-' for c in self.variant)}-seed{self.seed}"


def run_all(runs: Sequence[Run], folder: Path, jobs: int, test: str = "") -> list[dict[str, Any]]:
    """Return the figures of each run, in their order; `jobs` at a time, each in a process with its share of the cores.

    For `test` see `labelled_images`. Raises ConfigError: a run in `folder` was made with other options.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    found = {run: figures for run in runs if (figures := finished(run, folder / run.folder_name, test)) is not None}
    # A process for each run: what one leaves behind (caches, threads) is not the next one's.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1) as processes:
        missing = [run for run in runs if run not in found]
        waiting = {processes.submit(measure_run, run, folder / run.folder_name, threads, test): run for run in missing}
        for done in as_completed(waiting):
            if done.exception() is not None:
                processes.shutdown(wait=False, cancel_futures=True)  # it is told when those that run now have ended
            run, figures = waiting[done], done.result()
            found[run] = figures
            told = (key for key in ("auroc", "leakage", "knn", "logreg", "recons") if figures.get(key) is not None)
            parts = [f"{key} {figures[key]:.3f}" for key in told]
            print(f"{len(found)}/{len(runs)} {run.variant}, seed {run.seed}: {', '.join(parts)}", flush=True)
    return [found[run] for run in runs]


def flops_per_image(options: Sequence[str]) -> float:
    """Count the FLOPs of a training step, forward and backward, for each of its images.

    It is counted on the CPU, whatever device, precision and backends the runs have: the products are the same.
    """
    config = load_config([*options, *_COUNTED], "ccmim ablate")
    return sum(count_flops(build_step(config, Session(0, 1, torch.device("cpu")))).values())


def measure_run(run: Run, folder: Path, threads: int, test: str) -> dict[str, Any]:
    """Pretrain, and measure at the end and at some moments before.

    Returns variant, seed, epochs; `looks`: one dict per moment (epoch, auroc, auroc_all, leakage, recons, and the
    seconds trained so far); the last look's figures again, knn, logreg, images_per_second (median). What the images do
    not tell, objects or labels, is None or missing.
    """
    torch.set_num_threads(threads)
    options = [*run.options, f"--seed={run.seed}", f"--run.dir={folder}", "--run.tensorboard=false", "--overwrite"]
    config = load_config(options, "ccmim ablate")

    def measure(epoch: int, trainer: Pretraining) -> dict[str, float]:
        if not epoch:
            return {}
        # The scores that the next epoch would divide by.
        figures = probe_scores(trainer, epoch, PROBED)
        if epoch == config.train.epochs and (both := labelled_images(config, test)) is not None:
            figures |= measure_features(trainer.model, config, *both)
        return figures

    milestones, rate = fit_and_measure(config, measure)
    looks = [{"epoch": epoch, "seconds": seconds, **figures} for epoch, seconds, figures in milestones if epoch]
    figures = {"variant": run.variant, "seed": run.seed, "epochs": config.train.epochs, **looks[-1]}
    figures |= {"images_per_second": rate, "looks": looks, "options": list(run.options), "test": test}
    (folder / SUMMARY).write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def finished(run: Run, folder: Path, test: str) -> dict[str, Any] | None:
    """Return the figures of a run that is done, else None. Raises ConfigError: it was made with other options."""
    summary = folder / SUMMARY
    if not summary.exists():
        return None
    try:
        figures = json.loads(summary.read_bytes())
        # What the options came to: a file that they name may have changed since.
        before = from_yaml((folder / CONFIG).read_text(), f"{folder / CONFIG}", check=lambda _: None)
        found = [figures[key] for key in ("images_per_second", "looks", "test")]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ConfigError) as error:
        raise ConfigError(
            f"{folder}: its {SUMMARY} or {CONFIG} is damaged ({one_line(error, 80)}); remove it"
        ) from None
    now = _as_written(load_config([*run.options, f"--seed={run.seed}"], "ccmim ablate"))
    changed = [key for key, _, _ in difference(before, now) if not key.startswith("run.")]
    if now.train.find_batch and "train.accumulate" in changed:
        changed.remove("train.accumulate")  # which was found
    if changed or found[2] != test:
        what = ", ".join(changed) or "--test"
        raise ConfigError(f"{folder}: was run with other settings ({what:.200}); choose another --runs, or remove it")
    return figures


def _as_written(config: Config) -> Config:
    """Return the settings as a run's folder has them: without passwords of URLs."""
    return from_yaml(to_yaml(config), "the settings", check=lambda _: None)


def labelled_images(config: Config, test: str) -> list[Source] | None:
    """Return the training images and those that features are tested on; None: there are none.

    The latter are those of the folder `test`, or more shapes. Both have training's classes, see `with_classes`. Raises
    DataError: images without labels, or of no class that is trained on.
    """
    if config.data.source == "shapes":
        return [build_source(config.data, config.seed), make_held_out(config)]
    if not test:
        return None
    roots = {"data.root": config.data.root, "--test": test}
    data = [config.data, replace(config.data, root=test, index="")]
    both = [build_source(of_these, config.seed) for of_these in data]
    return with_classes(*both, [f"{key}={root}" for key, root in roots.items()])


def fit_and_measure(
    config: Config, measure: Callable[[int, Pretraining], dict[str, Any]]
) -> tuple[list[tuple[int, float, dict[str, Any]]], float]:
    """Pretrain, and call `measure(epoch, trainer)` at each milestone.

    Returns (epoch, seconds of training so far, figures) of each milestone, from epoch 0 on, where measuring takes none
    of the seconds; and the median of the images per second.
    """
    wanted = {round(config.train.epochs * quarter / QUARTERS) for quarter in range(QUARTERS + 1)}
    found = []
    started, measuring = time.perf_counter(), 0.0

    def after_epoch(epoch: int, trainer: Pretraining) -> None:
        nonlocal measuring
        if epoch in wanted:
            begun = time.perf_counter()
            found.append((epoch, begun - started - measuring, measure(epoch, trainer)))
            measuring += time.perf_counter() - begun

    folder = fit(config, after_epoch=after_epoch)
    rates = [line["images_per_second"] for line in read_metrics(folder / "metrics.jsonl")]
    # The first line counts FLOPs as it goes, which is slow.
    return found, statistics.median(rates[1:] or rates)


def make_held_out(config: Config) -> ShapesSource:
    """Make images of the training set's kind, drawn from another seed."""
    return build_source(replace(config.data, samples=HELD_OUT), (config.seed + 1) % 2**32)


def measure_features(model: CCMIM, config: Config, train: Source, held_out: Source) -> dict[str, float]:
    """Measure kNN and logistic regression of frozen features, fitted on the training images: `knn`, `logreg`.

    Those are of averaged tokens of whole images; `knn_cls`, `logreg_both_visible` and so on are of the other `VIEWS`.
    Both sets must have labels, of the same classes. Images that cannot be read are left out.
    """
    parts = []
    for source in (train, held_out):
        shown = config.data.image_size, config.train.batch_size, model.mean_C.device
        batches = evaluation_batches(source, *shown, bad_samples=BadSamples(source, "skip", max_bad=1.0))
        parts += collect(lambda batch: take_views(model, batch.images_BHWC, batch.ids_B).pooled_BV2D, batches)
    k = min(NEIGHBOURS, len(parts[0]))
    figures = {}
    for view, accuracies in probes(*parts, [k]).items():
        figures |= {f"knn{view}": accuracies[f"k={k}"], f"logreg{view}": accuracies["logreg"]}
    return figures


@torch.no_grad()
def probe_scores(run: Pretraining, epoch: int, count: int) -> dict[str, float]:
    """Divide the first `count` samples of an epoch as the run would, with that epoch's crops and noise.

    The model is to be in eval mode. Nothing of the run changes: a bank is read, not written. Returns figures under the
    run's own masks: `recons` (Eq. 9) and, where objects are known, `auroc` (of the scores that the run divides by; 0.5
    where it has none), `auroc_all` (of the scores of all blocks), and `leakage`.
    """
    model, plan, size = run.model, run.loader.plan, run.config.data.image_size
    places_P = epoch * plan.samples + np.arange(min(count, plan.samples))
    own_P = np.isin(places_P % plan.samples % plan.partitions, plan.own_partitions)
    shown = plan.micro_batch(*plan.ids_at(places_P[own_P]))
    images_BHWC = torch.from_numpy(np.stack([load_crop(run.source, one, size) for one in shown.samples()]))
    batch = make_batch(images_BHWC.to(run.here.device), shown, run.source, run.here.device)
    prior = None
    if run.bank is not None:
        prior = PriorScores(*read_maps(run.bank.maps_of(shown.ids_B), batch.boxes_B4, model.grid))
    output = model(batch.images_BHWC, batch.ids_B, batch.epochs_B, prior=prior)
    figures = {"recons": float(run.train_step.objective.recons(output, batch.images_BHWC))}
    if isinstance(run.source, ShapesSource):
        object_BL = objects_of(run.source, shown, size, model.patch)
        logits_BL = output.logits_BL if output.logits_BL is not None else torch.zeros(object_BL.shape)
        figures["auroc"] = score_auroc(logits_BL.cpu(), object_BL)
        all_BL = AllBlocks(model.encoder)(model.encoder, model.embed(batch.images_BHWC))
        figures["auroc_all"] = score_auroc(all_BL.cpu(), object_BL)
        figures["leakage"] = object_leakage(output.partition.mask_BL.cpu(), object_BL)
    return figures
