"""Checkpoints are written so that a kill or a full disk leaves the older ones whole, and read without trust.

A checkpoint is a folder `step_00000123/` with `state.pt` (torch.save of plain containers and tensors) and
`manifest.json` (format, step, size and sha256 of each file). Where ranks have divided the weights, their parts lie
beside it (checkpoints/distributed.py). It is written under a hidden name and appears by a rename, so one that is seen
is complete; what is damaged afterwards fails its checksum. Nothing is unpickled before that, and then by `weights_only`
alone, which runs no code. With an empty file `kept` in it, it is never pruned.

One process at a time writes in a folder of checkpoints; it holds a lock on `.lock` meanwhile.
"""

import contextlib
import fcntl
import os
import shutil
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ccmim_fast.checkpoints import distributed
from ccmim_fast.checkpoints.manifest import (
    MANIFEST,
    STATE,
    Hashed,
    Sum,
    check_file,
    checkpoints,
    manifest,
    open_file,
    read_manifest,
    step_of,
    sync,
    sync_folder,
)
from ccmim_fast.errors import CPU_MEMORY, CheckpointError, UnreadableError, one_line

KEPT = "kept"
_NEW, _OLD, _DEAD = ".new_", ".old_", ".dead_"  # hidden folders: being written, being replaced, being removed

# Writes further files into the new folder; returns their sums by name.
Beside = Callable[[Path], dict[str, Sum]]


class Newest(NamedTuple):
    """This tuple is the checkpoint that `newest` found, or None, and a line for each later one that does not load."""

    path: Path | None
    state: dict[str, Any] | None
    problems: list[str]


def save(
    folder: Path, step: int, state: dict[str, Any], keep: int, for_good: bool = False, beside: Beside | None = None
) -> Path:
    """Write `state` as the checkpoint of `step` in `folder`, then remove all but the newest `keep` and the kept ones.

    Args:
        folder: made if missing. A checkpoint of the same step in it is replaced.
        state: plain containers, tensors, numbers, strings, bytes, bools and None; TypeError: what `load` would refuse.
        keep: >= 1; the one just written always stays.
        for_good: mark it as kept: no later save removes it.

    Raises CheckpointError if it cannot be written (disk full, no right, another writer); the older ones are intact.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"step={step} must be >= 0 and keep={keep} >= 1")
    _check_plain(state, "state")
    path = folder / f"step_{step:08d}"
    new = folder / f"{_NEW}{path.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder):
            _clear(folder)
            try:
                _write(new, step, state, for_good, beside)
                _publish(new, path)
            except BaseException:
                _clear(folder)
                raise
            _prune(folder, path, keep)
    except (OSError, RuntimeError) as error:
        # Where a file cannot be written, torch raises a RuntimeError of its own over the OSError.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise CheckpointError(f"{path}: not saved: {cause.strerror}; the older checkpoints are intact") from error
    return path


def load(path: Path, divided: bool = False) -> dict[str, Any]:
    """Read the state in the checkpoint `path`, on the CPU; no code in it is run.

    `divided` leaves out what ranks have divided; `distributed.unite` puts it in. Raises CheckpointError, one line:
    missing, damaged, or of more than plain containers and tensors; UnreadableError: nobody can tell at this moment.
    """
    try:
        if not stat.S_ISDIR(os.stat(path).st_mode):
            raise FileNotFoundError
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path}: no such folder of a checkpoint") from None
    except OSError as error:
        raise UnreadableError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        sums = read_manifest(path, step_of(path))
        for name in sums.keys() - {STATE}:
            with open_file(path / name) as file:
                check_file(file, sums[name])
        with open_file(path / STATE) as file:
            check_file(file, sums[STATE])
            state = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise CheckpointError(f"{STATE} refused: it holds a {type(state).__name__}, expected a dict")
        return state if divided or len(sums) == 1 else distributed.unite(state, distributed.read(path))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: {Path(error.filename or '').name}: {error.strerror}") from None
    except OSError as error:
        name = Path(error.filename).name if error.filename else STATE
        raise UnreadableError(f"{path}: {name} cannot be read: {error.strerror or one_line(error)}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # torch.load raises anything on what torch.save did not write
        if isinstance(error, MemoryError) or CPU_MEMORY.search(str(error)):
            raise  # the file is not to blame
        raise CheckpointError(f"{path}: {STATE} refused: no plain containers and tensors: {one_line(error)}") from None


def newest(folder: Path, divided: bool = False) -> Newest:
    """Find the newest checkpoint in `folder` that loads; `divided` is as for `load`.

    Folders that dead writers left behind are cleared; the work of a live writer is not touched. A checkpoint that is
    damaged is passed over. One that cannot be read at this moment may be whole: UnreadableError.
    """
    with contextlib.suppress(OSError, CheckpointError), _lock(folder) as locked:
        if locked:  # else somebody may be writing, or we have no right to: it can wait
            _clear(folder)
    problems = []
    for path in reversed(checkpoints(folder)):
        try:
            return Newest(path, load(path, divided), problems)
        except UnreadableError:
            raise
        except CheckpointError as error:
            problems.append(f"skipped the checkpoint {error}")
    return Newest(None, None, problems)


def _check_plain(value: Any, where: str) -> None:
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            _check_plain(item, f"{where}[{i}]")
    elif type(value) not in (int, float, str, bytes, bool, type(None)) and not isinstance(value, Tensor):
        raise TypeError(f"{where} is a {type(value).__name__}; a checkpoint holds plain containers and tensors only")


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Be the one writer in `folder`; yields False on a file system without locks, where nobody can know.

    The kernel frees the lock of a process that dies, however it dies; a process id in a file would outlive it. Raises
    CheckpointError where another process is the writer.
    """
    with open(folder / ".lock", "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{folder}: another process is writing a checkpoint here") from None
        except OSError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # a process forked meanwhile would hold it until it ends


def _clear(folder: Path) -> None:
    """Remove what a writer that died or failed left in `folder`."""
    for old in folder.glob(f"{_OLD}step_*"):
        path = folder / old.name.removeprefix(_OLD)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:  # killed between the two renames of `_publish`: the older one is all there is
            os.rename(old, path)
    for left in [*folder.glob(f"{_NEW}step_*"), *folder.glob(f"{_DEAD}step_*")]:
        shutil.rmtree(left, ignore_errors=True)


def _write(new: Path, step: int, state: dict[str, Any], for_good: bool, beside: Beside | None) -> None:
    new.mkdir()
    if for_good:
        (new / KEPT).touch()
    others = {} if beside is None else beside(new)
    with Hashed(new / STATE) as file:
        torch.save(state, file)
        sync(file)
        sums = {STATE: file.sum(), **others}
    with open(new / MANIFEST, "wb") as file:
        file.write(manifest(step, sums))
        sync(file)
    sync_folder(new)


def _publish(new: Path, path: Path) -> None:
    """Give the written folder its name; a folder that has it already steps aside first."""
    old = path.with_name(f"{_OLD}{path.name}")
    if path.exists():
        os.rename(path, old)
    os.rename(new, path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _prune(folder: Path, written: Path, keep: int) -> None:
    """Keep `written` and the newest others, `keep` in all, and those marked as kept; visibly broken ones go."""
    try:
        others = [path for path in reversed(checkpoints(folder)) if path != written]
    except UnreadableError:  # another time
        return
    whole = [path for path in others if (path / MANIFEST).is_file() and (path / STATE).is_file()]
    stay = {*whole[: keep - 1], *(path for path in others if (path / KEPT).exists())}
    for path in set(others) - stay:
        # Hidden first: a kill while its files go must not leave a checkpoint that looks damaged.
        dead = folder / f"{_DEAD}{path.name}"
        with contextlib.suppress(OSError):
            os.rename(path, dead)
            shutil.rmtree(dead)
