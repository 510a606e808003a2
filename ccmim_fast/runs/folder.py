"""A run's folder: one process at a time works in it, and nothing but a run's own files is ever removed from it."""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ccmim_fast.checkpoints.manifest import CHECKPOINTS, MANIFEST
from ccmim_fast.config.evaluation import EvalDataConfig
from ccmim_fast.config.load import to_yaml
from ccmim_fast.config.schema import Config, DataConfig, RunConfig
from ccmim_fast.errors import ConfigError, MachineError, say
from ccmim_fast.runs.claim import LOCK, claimed, holder_of, in_use, is_watched_alive
from ccmim_fast.runs.state import CONFIG, ENVIRONMENT, FILE, METRICS, is_alive, read_state, recorded, write_whole
from ccmim_fast.runs.written import RANKS, WRITTEN, holds_results, is_run, others_in, written_in
from ccmim_fast.secrets import without_secrets

_PACKAGES = ("ccmim_fast", "torch", "torchvision", "timm", "triton", "xformers", "numpy", "pillow")
_SILENT = 600  # seconds without a word, after which a process of another machine is gone


class RunFolder:
    """The open folder of a run, at `path`. Until `begin` is called, a command that fails leaves it as it was."""

    def __init__(
        self,
        path: Path,
        stack: contextlib.ExitStack | None = None,
        overwritten: Mapping[Path, tuple[int, int]] | None = None,
        known: tuple[str, ...] = (),
    ):
        self.path, self.begun = path, False
        self._stack, self._overwritten, self._known = stack, overwritten or {}, known

    def begin(self, config: Any, device: torch.device, finished: Callable[[], bool] = lambda: True) -> None:
        """Remove what is overwritten, describe the run, and record in state.json that it runs and how it ends.

        Every rank calls this, once all that can be refused was checked; only the first does something. `finished` tells
        at the end of the run if its last step was taken.
        """
        if self.begun:
            return
        self.begun = True
        if self._stack is not None:
            if self._overwritten:
                # What was written anew since the folder was opened stays, such as the working copy of a score bank.
                _remove(self.path, [path for path, then in self._overwritten.items() if _identity(path) == then])
                if left := others_in(self.path, self._known):
                    say(f"run.dir={self.path}: stays, as no run wrote it: {', '.join(map(repr, left))}")
            describe_run(self.path, config, device)
            self._stack.enter_context(recorded(self.path, True, finished))


@contextlib.contextmanager
def run_folder(
    run: RunConfig,
    reads: Mapping[str, str],
    *,
    resumable: bool = True,
    is_main: bool = True,
    also: tuple[str, ...] = (),
) -> Iterator[RunFolder]:
    """Open the folder `run.dir` for a command, on each of its ranks; the first holds it against other processes.

    With `run.overwrite` `RunFolder.begin` removes the files that a run wrote (`written.WRITTEN`, and the names `also`),
    and nothing else: what the user put there stays, and so do evaluations in `eval/`. If the body raises before that,
    the files and folders that were made since are removed (but for reports of several ranks), and all others are as
    they were.

    Args:
        reads: what the command reads, by the names of the settings; none of it may be the folder or lie in it.
        resumable: `run.resume` goes on with the run in the folder.

    Raises ConfigError, and changes nothing: the folder holds what the command reads; another process is at work in it;
    it holds a run, and neither option is set; it holds anything else; it cannot be written.
    """
    folder = Path(run.dir)
    check_apart(run.dir, reads)
    if not is_main:
        yield RunFolder(folder)
        return
    goes_on = resumable and _goes_on(run)
    _check_alone(folder, goes_on)
    _check_free(folder, run, goes_on, resumable)
    with claimed(folder, f"run.dir={folder}"), contextlib.ExitStack() as stack:
        _check_free(folder, run, goes_on, resumable)  # nobody else comes in any more
        before = {path: _identity(path) for path in written_in(folder, also)}
        opened = RunFolder(folder, stack, {} if goes_on else before, (*WRITTEN, RANKS, *also))
        try:
            yield opened
        except BaseException:
            if not opened.begun:
                made = [path for path in written_in(folder, also) if path not in before]
                # The heartbeats and their report are read by ranks that end later; the next command takes their place.
                _remove(folder, [path for path in made if path.parent.name != RANKS])
            raise


def check_apart(folder: str, reads: Mapping[str, str]) -> None:
    """Raise ConfigError if `folder` is, or holds, what a command reads, links followed, or lies among checkpoints.

    `reads` has places by the names that messages give them; what is no place of this machine is passed over.
    """
    target = Path(os.path.realpath(folder))
    for name, place in reads.items():
        literal = re.split(r"[*?{\[]", place)[0]  # of a pattern
        if not literal or "://" in literal or not os.path.lexists(literal):
            continue
        source = Path(os.path.realpath(literal))
        kept = source if (source / MANIFEST).is_file() else source / CHECKPOINTS
        if target == source or target in source.parents:
            raise ConfigError(f"run.dir={folder}: holds {name}={place}, which is read; choose another folder")
        if kept.is_dir() and (target == kept or kept in target.parents):
            raise ConfigError(f"run.dir={folder}: lies among the checkpoints of {name}={place}; choose another folder")


def read_by(data: DataConfig | EvalDataConfig) -> dict[str, str]:
    """Return the places of images by their settings; made images are in a cache, which is written."""
    if data.source in ("shapes", "photos"):
        return {}
    return {"data.root": data.root, "data.test": getattr(data, "test", "")}


def _goes_on(run: RunConfig) -> bool:
    """Return whether the settings go on with the run in `run.dir`, not with another run's checkpoint or with none."""
    own = os.path.realpath(os.path.join(run.dir, CHECKPOINTS))
    return run.resume == "auto" or (run.resume != "never" and os.path.dirname(os.path.realpath(run.resume)) == own)


def _check_free(folder: Path, run: RunConfig, goes_on: bool, resumable: bool) -> None:
    """Raise ConfigError where `folder` holds anything that is neither gone on with nor a run to be overwritten."""
    if goes_on and run.overwrite:
        raise ConfigError(f"run.overwrite=true: would remove run.resume={run.resume}; leave one of them out")
    try:
        found = others_in(folder) if folder.exists() else []
    except OSError as error:
        raise ConfigError(f"run.dir={folder}: cannot be read: {error.strerror}; choose another folder") from None
    if goes_on or not found:
        return
    if not is_run(folder):
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise ConfigError(
            f"run.dir={folder}: not empty, and no run of ccmim: it holds {found[0]!r:.80}{more}; choose another folder"
        )
    if not run.overwrite and holds_results(folder):
        resume = "--resume auto to go on, or " if resumable else ""
        raise ConfigError(f"run.dir={folder}: not empty; use {resume}--overwrite to start anew")


def _check_alone(folder: Path, goes_on: bool) -> None:
    """Raise ConfigError where a process is at work in `folder`, by what the files say; the lock comes after.

    A process of another machine may live though no lock tells of it. So nothing of it is removed while state.json calls
    it running; a command that goes on with the run waits for a sign of life.
    """
    state, label = read_state(folder), f"run.dir={folder}"
    processes = [holder_of(folder), state if state is not None and state.state == "running" else None]
    for process in filter(None, processes):
        alive = is_alive(process)
        if alive:
            raise in_use(label, process)
        files = [folder / name for name in (LOCK, FILE, METRICS, "log.txt")]
        if alive is not None or _silence(files) > _SILENT:
            continue
        words = f"{label}: process {process.pid} on {process.host} may be at work in it"
        if not goes_on:
            marks = " and ".join(name for name in (LOCK, FILE) if (folder / name).exists())
            raise ConfigError(f"{words}; if it has ended, remove {marks} there, or wait for 10 minutes")
        say(f"{words}: waiting for a sign of life, a minute at most")
        if is_watched_alive(files):
            raise in_use(label, process)
        return


def _silence(files: Iterable[Path]) -> float:
    """Return the seconds since one of the files was written, by this machine's clock."""
    times = []
    for path in files:
        with contextlib.suppress(OSError):
            times.append(path.stat().st_mtime)
    return time.time() - max(times, default=0.0)


def _identity(path: Path) -> tuple[int, int]:
    """Return what tells a file from one that was written later under its name; (0, 0): it is gone."""
    with contextlib.suppress(OSError):
        found = path.lstat()
        return found.st_ino, found.st_mtime_ns
    return 0, 0


def _remove(folder: Path, files: Iterable[Path]) -> None:
    """Remove files in `folder`, and the folders in it that are then empty."""
    for path in files:
        with contextlib.suppress(OSError):
            path.unlink()
        for above in path.relative_to(folder).parents[:-1]:
            with contextlib.suppress(OSError):  # not empty
                (folder / above).rmdir()


def evaluation_folder(checkpoint: str, name: str) -> str:
    """Return an evaluation's default folder: `eval/name` in that of the checkpoint's run, else runs/eval/`name`."""
    path = Path(checkpoint)
    if (path / MANIFEST).is_file() and path.absolute().parent.name == CHECKPOINTS:
        path = (path if len(path.parts) > 2 else path.absolute()).parent.parent
    run = path if (path / CHECKPOINTS).is_dir() else Path("runs")
    return str(run / "eval" / name)


def describe_run(folder: Path, config: Config, device: torch.device) -> None:
    """Write config.yaml (resolved) and environment.json (versions, device, commit, command)."""
    try:
        write_whole(folder / CONFIG, to_yaml(config))
        write_whole(folder / ENVIRONMENT, json.dumps(environment(device), indent=1) + "\n")
    except OSError as error:
        raise MachineError(f"{error.filename or folder}: not written: {error.strerror}") from None


def environment(device: torch.device) -> dict[str, str]:
    """Return what this process runs on, as printable values by name."""
    facts = {
        "command": without_secrets(" ".join(sys.argv)),
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
