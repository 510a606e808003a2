"""Published weights become a checkpoint of ours, to evaluate, to export, to pretrain on."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from ccmim_fast.build.model import build_model
from ccmim_fast.checkpoints import io
from ccmim_fast.checkpoints.fitted import derived, fill_
from ccmim_fast.checkpoints.manifest import CHECKPOINTS
from ccmim_fast.checkpoints.published import read_weights
from ccmim_fast.checkpoints.run import OpenedRun
from ccmim_fast.checkpoints.state import Progress, capture
from ccmim_fast.config.load import load_config
from ccmim_fast.errors import ConfigError, say
from ccmim_fast.export.plain import about, write_weights
from ccmim_fast.optim.optimizer import build_optimizer
from ccmim_fast.runs.folder import run_folder


def import_weights(
    file: str, arch: str, out: str, settings: Sequence[str], resample: str = "antialias"
) -> tuple[Path, list[str]]:
    """Make a checkpoint of published weights; return its path, and the parts that `file` lacks, which start anew.

    The arguments are those of `ccmim import --help`; `settings` are options of `ccmim pretrain`. Raises ConfigError: no
    architecture is known, or a setting is wrong; CheckpointError: a weight is missing, unexpected or of another shape.
    """
    found = read_weights(file, arch)
    if found.layout:
        say(f"{file}: {found.layout}")
    if not found.arch:
        raise ConfigError(f"ccmim import: {file!r:.200} does not tell its architecture; add --arch NAME")
    if not found.tensors:
        raise ConfigError(f"ccmim import: {file!r:.200} has initial weights; name a tag, as timm:ARCH.TAG")
    config = load_config([*derived(found, settings), *settings], "ccmim import FILE --arch NAME --out OUT")
    torch.manual_seed(config.seed)
    model = build_model(config)
    new = fill_(model, found, resample == "antialias")
    if out.endswith(".safetensors"):
        run = OpenedRun(Path(out), Path(out).parent, config, model.state_dict())
        return write_weights(run.weights, about(run), Path(out)), new
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=out))
    # No moments yet; the rate and the decay are those of the run that goes on.
    of = config.optim
    options = {"weight_decay": of.weight_decay, "betas": of.betas, "decay_tokens": of.decay_tokens}
    optimizer = build_optimizer("adamw", model, lr=of.base_lr, **options)
    state = capture(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), None, Progress(0, 0, 0, ""), config)
    with run_folder(config.run, {"FILE": file}, resumable=False) as folder:
        path = io.save(folder.path / CHECKPOINTS, 0, state, keep=1)
        folder.begin(config, torch.device("cpu"))
    return path, new
