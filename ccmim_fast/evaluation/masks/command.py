"""`ccmim eval masks` shows what a pretrained model attends to, and what it hides."""

# B images, D of them drawn, H height, W width, C channels, L patches

import argparse
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ccmim_fast.checkpoints import io
from ccmim_fast.config.keys import show
from ccmim_fast.config.parser import Parser
from ccmim_fast.data.made.shapes import ShapesSource
from ccmim_fast.errors import CheckpointError, ConfigError, DataError
from ccmim_fast.evaluation.masks.moment import Moment
from ccmim_fast.evaluation.masks.objects import MaskFolder, objects_of
from ccmim_fast.evaluation.masks.result import write
from ccmim_fast.evaluation.masks.scores import figures_of, score_and_divide
from ccmim_fast.evaluation.masks.subject import COUNT, PROG, Subject, read_subject
from ccmim_fast.models.ccmim import Output
from ccmim_fast.models.scores import PriorScores
from ccmim_fast.ranks.session import open_session
from ccmim_fast.report.reconstruction import reconstruct
from ccmim_fast.report.snapshots import FewImages, few_images, prior_scores, spread
from ccmim_fast.runs.folder import check_apart, describe_run, open_run_folder
from ccmim_kernels import Partition, partition_from_mask


def masks(argv: list[str]) -> None:
    """`ccmim eval masks CHECKPOINT [IMAGES] [options] [settings]`: what a model attends to, and what it hides.

    Scores of each source and the masks of each strategy, drawn (masks.png) and measured (result.json, result.md): how
    well the scores find the objects and how many object patches stay visible, where objects are known, and how unlike
    the scores are. CHECKPOINT: a run's folder, one of its checkpoints, a file of weights, or timm:NAME.
    """
    given, settings = _read(argv)
    first, *others = _places(given.checkpoint, given.moments)
    subject = read_subject(first, settings, given.images)
    check_apart(subject.config.run.dir, given.checkpoint)
    few = few_images(subject.config.data, subject.config.seed, given.measure)
    object_BL = _objects(subject, few, given.masks)
    with open_session(subject.config.train.device) as here:
        if here.world_size > 1:
            raise ConfigError(f"{PROG}: one process only, got {here.world_size}; start it without torchrun")
        folder = open_run_folder(subject.config, resumable=False)
        describe_run(folder, subject.config, here.device)
        subjects = chain([subject.untrained()] if given.moments > 1 else [], [subject])
        later = (read_subject(place, settings, given.images) for place in others)
        moments = [_measure(one, few, object_BL, given.drawn, here.device) for one in chain(subjects, later)]
        print(write(folder, moments, object_BL, here.device))


def _places(checkpoint: str, moments: int) -> list[str]:
    """Return what to read: `checkpoint`, or for several moments as many checkpoints of the run in it, oldest first.

    Raises:
        ConfigError: several moments of what is no run's folder.
    """
    if moments < 2:
        return [checkpoint]
    found = io.checkpoints(Path(checkpoint) / io.CHECKPOINTS)
    if not found:
        raise ConfigError(f"--moments={moments}: needs the folder of a run with checkpoints, got {show(checkpoint)}")
    return [str(path) for path in spread(found, moments)]


def _objects(subject: Subject, few: FewImages, folder: Path | None) -> Tensor | None:
    """Return which patches show the object, [B, L] bool, where that is known.

    Raises:
        DataError: no image of which some patches are object and some not.
    """
    objects = few.source if isinstance(few.source, ShapesSource) else None
    if folder is not None:
        objects = MaskFolder(folder, subject.config.data.root, few.source)
    if objects is None:
        return None
    object_BL = objects_of(objects, few.shown, subject.config.data.image_size, subject.model.patch)
    if not (object_BL.any(1) & ~object_BL.all(1)).any():
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
    mask_DL = scored.masks[config.mask.strategy][rows]
    return Moment(
        subject.name,
        config,
        subject.step,
        subject.epoch,
        grid=model.grid,
        scored=scored,
        figures=figures_of(scored, object_BL),
        rows=rows,
        images_DHWC=few.batch.images_BHWC[rows].numpy(),
        object_DL=None if object_BL is None else object_BL[rows].numpy(),
        reconstruction_DHWC=_reconstruction(subject, batch.images_BHWC[rows], mask_DL) if subject.decodes else None,
    )


def _reconstruction(subject: Subject, images_DHWC: Tensor, mask_DL: Tensor) -> np.ndarray | None:
    """Return images [D, H, W, C] uint8, masked patches as predicted; None where the model predicts no pixels."""
    partition = Partition(*(part.to(images_DHWC.device) for part in partition_from_mask(mask_DL, subject.model.keep)))
    output = Output(subject.model.predict(images_DHWC, partition), partition, None, None, None)
    return reconstruct(subject.model, subject.config, images_DHWC, output)


def _read(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the command's own options, and settings."""
    usage = f"{PROG} CHECKPOINT [IMAGES] [options] [settings]"
    said = masks.__doc__.replace("`", "").partition("\n\n")[2]
    end = f"settings: {', '.join(COUNT)} as of ccmim pretrain --help; default: the run's own"
    parser = Parser(PROG, usage=usage, description=said, epilog=end, allow_abbrev=False)
    parser.add_argument("--drawn", type=int, default=4, metavar="N", help="images drawn; default 4")
    parser.add_argument("--measure", type=int, default=256, metavar="N", help="images measured; default 256")
    parser.add_argument("--moments", type=int, default=1, metavar="N", help="checkpoints of the run, side by side")
    parser.add_argument("--masks", type=Path, metavar="FOLDER", help="PNG files of the objects, named as the images")
    words = []
    while argv and not argv[0].startswith("-") and len(words) < 2:
        words.append(argv[0])
        argv = argv[1:]
    given, settings = parser.parse_known_args(argv)
    if not words:
        raise ConfigError(f"{PROG}: the checkpoint is missing; a run's folder, a file, or timm:NAME")
    given.checkpoint, given.images = words[0], words[1] if len(words) > 1 else ""
    for name, most in (("drawn", 64), ("measure", 10_000), ("moments", 64)):
        if not 1 <= getattr(given, name) <= most:
            raise ConfigError(f"--{name}={getattr(given, name)}: must be in 1..{most}")
    return given, settings
