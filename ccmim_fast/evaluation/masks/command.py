"""`ccmim eval masks` shows what a pretrained model attends to, and what it hides."""

# B images, D of them drawn, H height, W width, C channels, L patches

from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ccmim_fast.checkpoints.manifest import CHECKPOINTS, checkpoints
from ccmim_fast.config.keys import show
from ccmim_fast.data.made.shapes import ShapesSource
from ccmim_fast.errors import CheckpointError, ConfigError, DataError, say
from ccmim_fast.evaluation.masks.objects import MaskFolder, has_both, objects_of
from ccmim_fast.evaluation.masks.result import Moment, write
from ccmim_fast.evaluation.masks.scores import figures_of, score_and_divide
from ccmim_fast.evaluation.masks.subject import PROG, Subject, read_subject
from ccmim_fast.models.ccmim import Output
from ccmim_fast.models.scores import PriorScores
from ccmim_fast.ranks.session import open_session
from ccmim_fast.report.snapshots import FewImages, few_images, on_screen, prior_scores, reconstruct, spread
from ccmim_fast.runs.folder import read_by, run_folder
from ccmim_kernels import Partition, partition_from_mask


def show_masks(
    checkpoint: str, images: str, settings: list[str], *, drawn: int, measure: int, moments: int, masks: Path | None
) -> None:
    """Draw (masks.png) and measure (result.json, result.md) scores and masks, and print the figures.

    The arguments are those of `ccmim eval masks --help`; `settings` are options in place of the run's own.
    """
    first, *others = [checkpoint]
    if moments > 1:  # of the run, the oldest first
        found = checkpoints(Path(checkpoint) / CHECKPOINTS)
        if not found:
            words = f"needs the folder of a run with checkpoints, got {show(checkpoint)}"
            raise ConfigError(f"--moments={moments}: {words}")
        first, *others = map(str, spread(found, moments))
    subject = read_subject(first, settings, images)
    few = few_images(subject.config.data, subject.config.seed, measure)
    object_BL = _objects(subject, few, masks)
    with open_session(subject.config.train.device) as here:
        if here.world_size > 1:
            raise ConfigError(f"{PROG}: one process only, got {here.world_size}; start it without torchrun")
        reads = {"checkpoint": checkpoint, **read_by(subject.config.data)}
        with run_folder(subject.config.run, reads, resumable=False) as folder:
            subjects = chain([subject.untrained()] if moments > 1 else [], [subject])
            later = (read_subject(place, settings, images) for place in others)
            measured = [_measure(one, few, object_BL, drawn, here.device) for one in chain(subjects, later)]
            folder.begin(subject.config, here.device)
            say(write(folder.path, measured, object_BL, here.device))


def _objects(subject: Subject, few: FewImages, folder: Path | None) -> Tensor | None:
    """Return which patches show the object, [B, L] bool, where that is known. Raises DataError without such images."""
    if folder is None and not isinstance(few.source, ShapesSource):
        return None
    objects = few.source if folder is None else MaskFolder(folder, subject.config.data.root, few.source)
    object_BL = objects_of(objects, few.shown, subject.config.data.image_size, subject.model.patch)
    if not has_both(object_BL):
        raise DataError(f"none of {len(object_BL)} images has both object and background patches; look at the masks")
    return object_BL


@torch.inference_mode()
def _measure(subject: Subject, few: FewImages, object_BL: Tensor | None, count: int, device: torch.device) -> Moment:
    """Measure all images, and keep `count` of them, spread over all, to be drawn."""
    model, config = subject.model.to(device), subject.config
    prior = None if subject.run is None else prior_scores(subject.run, few)
    if prior is not None:
        prior = PriorScores(*(part.to(device) for part in prior))
    batch = few.batch._replace(images_BHWC=few.batch.images_BHWC.to(device), ids_B=few.batch.ids_B.to(device))
    scored = score_and_divide(model, config, batch, prior, subject.decodes)
    if not all(scores_BL.isfinite().all() for scores_BL in scored.scores.values()):
        raise CheckpointError(f"{subject.name}: its scores are not finite")
    rows = np.unique(np.linspace(0, len(batch.ids_B) - 1, count).round().astype(int)).tolist()
    drawn_DHWC = None
    if subject.decodes:
        found = partition_from_mask(scored.masks[config.mask.strategy][rows], model.keep)
        partition = Partition(*(part.to(device) for part in found))
        images_DHWC = batch.images_BHWC[rows]
        output = Output(model.predict(images_DHWC, partition), partition, None, None, None)
        drawn_DHWC = reconstruct(model, config, images_DHWC, output)
    return Moment(
        subject.name,
        config,
        subject.step,
        subject.epoch,
        grid=model.grid,
        scored=scored,
        figures=figures_of(scored, object_BL),
        rows=rows,
        images_DHWC=on_screen(batch.images_BHWC[rows], model.mean_C, model.std_C).cpu().numpy(),
        object_DL=None if object_BL is None else object_BL[rows].numpy(),
        reconstruction_DHWC=drawn_DHWC,
    )
