"""What a command makes in a new place is seen there when it is whole, and not before. Imports no torch."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ccmim_fast.errors import ConfigError
from ccmim_fast.runs.claim import LOCK, claimed, folder_made, holder_of


@contextlib.contextmanager
def new_folder(out: Path, label: str) -> Iterator[Path]:
    """Yield a folder in `OUT.partial`, beside `out`, which becomes `out` when the body has ended.

    If the body fails nothing is left. What a killed process left in `OUT.partial` is removed by the next that makes
    `out`. Raises ConfigError, whose line begins with `label`: `out` is not empty or no folder, another process makes
    it, something else is in the way, or nothing can be written there.
    """
    target = Path(os.path.realpath(out))
    partial = target.with_name(f"{target.name}.partial")
    for path, may_hold in ((target, False), (partial, holder_of(partial) is not None)):
        if os.path.lexists(path) and (not path.is_dir() or (any(path.iterdir()) and not may_hold)):
            raise ConfigError(f"{label}: {str(path)!r:.200} is not empty; name a new folder")
    try:
        with claimed(partial, f"{label}: {str(out)!r:.200}"):
            _empty(partial)
            try:
                (partial / target.name).mkdir()
                yield partial / target.name
                _move(partial / target.name, target)
            finally:
                _empty(partial)
    finally:
        with contextlib.suppress(OSError):  # not there, or another process is at work in it
            partial.rmdir()


@contextlib.contextmanager
def new_file(out: Path, label: str) -> Iterator[Path]:
    """Yield the path of a file in a hidden folder beside `out`, which becomes `out` when the body has ended.

    So do other files that the body makes beside it: weights of a graph that is too large for one file. If the body
    fails nothing is left. Raises ConfigError, whose line begins with `label`: `out` or another of these exists, as
    whoever made it did not ask for another in its place; or nothing can be written there.
    """
    check_new(out, label)
    hidden = {"dir": out.parent, "prefix": f".{out.name[:50]}-"}
    with folder_made(out.parent, f"{label}: {str(out)!r:.200}"), tempfile.TemporaryDirectory(**hidden) as folder:
        made = Path(folder) / out.name
        yield made
        for path in sorted(Path(folder).iterdir(), key=made.__eq__):  # the file itself last
            check_new(out.with_name(path.name), label)
            path.rename(out.with_name(path.name))


def check_new(out: Path, label: str) -> None:
    """Raise ConfigError if there is a file `out`: a command asks for no other in its place."""
    if os.path.lexists(out):
        raise ConfigError(f"{label}: {str(out)!r:.200} exists; remove it, or name another file")


def _move(made: Path, target: Path) -> None:
    try:
        made.rename(target)  # also where there is an empty folder
    except OSError:  # one that stays, such as a disk of its own
        for path in made.iterdir():
            shutil.move(path, target / path.name)


def _empty(folder: Path) -> None:
    """Remove all in a folder of ours but the lock."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
