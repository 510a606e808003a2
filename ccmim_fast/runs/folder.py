"""A run's folder: never written over another run, and self-explaining once opened."""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from ccmim_fast.checkpoints.manifest import CHECKPOINTS, MANIFEST
from ccmim_fast.config.load import to_yaml
from ccmim_fast.config.schema import Config
from ccmim_fast.errors import ConfigError
from ccmim_fast.runs.state import CONFIG

_PACKAGES = ("ccmim_fast", "torch", "torchvision", "timm", "triton", "xformers", "numpy", "pillow")


def open_run_folder(config: Config, resumable: bool = True) -> Path:
    """Create the run's folder (or reopen it, with `run.resume` or `run.overwrite`) and prove that it can be written.

    Raises ConfigError where the folder holds files and neither option is set (of a command that is not `resumable`, the
    message names one way out), or where it cannot be written.
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
        resume = "--resume auto to go on, or " if resumable else ""
        raise ConfigError(f"run.dir={folder}: not empty; use {resume}--overwrite to start anew")
    return folder


def check_apart(folder: str, checkpoint: str) -> None:
    """Raise ConfigError if emptying an evaluation's `folder` would remove the checkpoint, or others of its run."""
    target, source = Path(folder).resolve(), Path(checkpoint).resolve()
    kept = source / CHECKPOINTS if (source / CHECKPOINTS).is_dir() else source
    if target in (source, kept) or target in source.parents or kept in target.parents:
        raise ConfigError(f"run.dir={folder}: holds {checkpoint}, or lies in it; choose another folder")


def evaluation_folder(checkpoint: str, name: str) -> str:
    """Return an evaluation's default folder: `eval/name` in that of the checkpoint's run, else runs/eval/`name`."""
    path = Path(checkpoint)
    if (path / MANIFEST).is_file() and path.absolute().parent.name == CHECKPOINTS:
        path = (path if len(path.parts) > 2 else path.absolute()).parent.parent
    run = path if (path / CHECKPOINTS).is_dir() else Path("runs")
    return str(run / "eval" / name)


def describe_run(folder: Path, config: Config, device: torch.device) -> None:
    """Write config.yaml (resolved) and environment.json (versions, device, commit, command)."""
    (folder / CONFIG).write_text(to_yaml(config))
    (folder / "environment.json").write_text(json.dumps(environment(device), indent=1) + "\n")


def environment(device: torch.device) -> dict[str, str]:
    """Return what this process runs on, as printable values by name."""
    facts = {
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {os.cpu_count()} cores",
        "commit": _commit(),
    }
    return facts | {package: version_of(package) for package in _PACKAGES}


def version_of(package: str) -> str:
    """Return the version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Return the commit of the checkout that holds this code, `-dirty` if it was changed; `unknown` outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        options = {"capture_output": True, "text": True, "timeout": 10, "check": False}
        return subprocess.run(command, cwd=Path(__file__).parent, **options).stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
