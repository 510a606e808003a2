"""A run's folder: refused where it would overwrite another run, and self-explaining once opened."""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from ccmim_fast.checkpoints.manifest import MANIFEST
from ccmim_fast.config.load import to_yaml
from ccmim_fast.config.schema import Config
from ccmim_fast.errors import ConfigError

CHECKPOINTS = "checkpoints"  # of a run, in its folder
_PACKAGES = ("ccmim_fast", "torch", "torchvision", "timm", "triton", "xformers", "numpy", "pillow")


def open_run_folder(config: Config, goes_on: bool = True) -> Path:
    """Create (or, with `run.resume` or `run.overwrite`, reopen) the run's folder and prove that it can be written.

    Args:
        goes_on: whether what is done there can be stopped and gone on with.

    Raises:
        ConfigError: the folder holds files and neither option is set, or it cannot be written.
    """
    folder = Path(config.run.dir)
    try:
        if config.run.overwrite and folder.is_dir():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        occupied = any(folder.iterdir())
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"run.dir={folder}: cannot be written: {error.strerror}; choose another folder") from None
    if occupied and config.run.resume == "never":
        way = "--resume auto to go on, or " if goes_on else ""
        raise ConfigError(f"run.dir={folder}: not empty; use {way}--overwrite to start anew")
    return folder


def check_apart(folder: str, checkpoint: str) -> None:
    """Return if an evaluation that empties `folder` leaves what it evaluates.

    Raises:
        ConfigError: the checkpoint is in the folder, or the folder among the checkpoints of its run.
    """
    where, run = Path(folder).resolve(), Path(checkpoint).resolve()
    kept = run / CHECKPOINTS if (run / CHECKPOINTS).is_dir() else run
    if where in (run, kept) or where in run.parents or kept in where.parents:
        raise ConfigError(f"run.dir={folder}: is where {checkpoint} lies; choose another folder")


def evaluation_folder(checkpoint: str, name: str) -> str:
    """Where an evaluation is written unless somebody says where: in the run's own folder, for its report.

    Args:
        checkpoint: folder of a run, or of one of its checkpoints; of anything else it is runs/eval/`name`.
    """
    path = Path(checkpoint)
    if (path / MANIFEST).is_file() and path.absolute().parent.name == CHECKPOINTS:
        path = (path if len(path.parts) > 2 else path.absolute()).parent.parent
    run = path if (path / CHECKPOINTS).is_dir() else Path("runs")
    return str(run / "eval" / name)


def describe_run(folder: Path, config: Config, device: torch.device) -> None:
    """Write config.yaml (resolved) and environment.json (versions, device, commit, command)."""
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "environment.json").write_text(json.dumps(environment(device), indent=1) + "\n")


def environment(device: torch.device) -> dict[str, str]:
    """What the run ran on: names to printable values."""
    found = {
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {os.cpu_count()} cores",
        "commit": _commit(),
    }
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _commit() -> str:
    """The commit of the checkout this code lies in, with `-dirty` where it was changed; `unknown` outside of one."""
    here = Path(__file__).parent
    try:
        called = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return called.stdout.strip() or "unknown"
