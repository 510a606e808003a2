"""What this product itself has written: it is never read as images, and nothing else is ever written over."""

import json
import os
import stat
from collections.abc import Collection

import pyarrow as pa

from ccmim_fast.errors import DataError

BESIDE = "ccmim-index.arrow"  # the index's name in a folder of tars, where `ccmim data shard` writes it
_LOCK = ".ccmim.lock"  # lies where a command is at work, or was when it was killed; as in runs/claim.py
_MARK = b"ccmim"  # the key of our metadata in an Arrow file's schema
# How files of ours begin, as runs/state.py, runs/folder.py, runs/metrics.py and ablation/run.py write them.
_CONFIG = "config.yaml"
_RUN = {
    "environment.json": b'{\n "command": "',
    "state.json": b'{\n "state": "',
    "metrics.jsonl": b'{"kind": "',
}
_ABLATION = b'{\n "environment": {'
_LONGEST_ROW = 2**16  # bytes of a line beside features; a path has 4096 at most
_RECORD = b'{"index": "'  # how each line of the records beside an index begins, with its fingerprint


def output_of(folder: str, names: Collection[str]) -> str:
    """Return which output of ours a folder with these entries is: a run, shards, an unfinished one; "" if none."""
    if _CONFIG in names and any(_begins(os.path.join(folder, name), start) for name, start in _RUN.items()):
        return "a run's folder"
    if _LOCK in names:
        return "a folder that a command of ccmim has not finished; run it again"
    return "a folder of shards that ccmim data shard wrote" if BESIDE in names else ""


def outputs_among(folder: str, names: Collection[str]) -> list[str]:
    """Return the files among a folder's entries that are outputs of ours: features and the drawings of `ablate`."""
    known = {*names}
    return [
        name for name in names if name.endswith((".npy", ".png")) and _is_output(folder, name[:-4], name[-4:], known)
    ]


def _is_output(folder: str, stem: str, ending: str, names: Collection[str]) -> bool:
    """Tell by the content of the files beside it, as users have captions or notes with such names, too."""
    beside = os.path.join(folder, stem)
    if ending == ".npy":
        return f"{stem}.jsonl" in names and _names_rows(f"{beside}.jsonl")
    return {f"{stem}.md", f"{stem}.json"} <= names and _begins(f"{beside}.json", _ABLATION)


def _names_rows(path: str) -> bool:
    """Tell whether the first line of a file is that of features: the name of an image, and its label if it has one."""
    try:
        with open(path, "rb", opener=open_regular) as file:
            row = json.loads(file.readline(_LONGEST_ROW))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(row, dict) and list(row) in (["name"], ["name", "label"])


def _begins(path: str, start: bytes) -> bool:
    try:
        with open(path, "rb", opener=open_regular) as file:
            return file.read(len(start)) == start
    except OSError:
        return False


def open_regular(path: str, flags: int = os.O_RDONLY) -> int:
    """Open a file, for `open(..., opener=open_regular)`, but refuse at once what is none: a FIFO would wait for ever.

    Raises OSError, also for folders, sockets and devices.
    """
    return _opened(path, flags)[0]


def read_regular(path: str, most: int | None = None) -> bytes:
    """Read a file whole or, with `most`, so many of its first bytes. Raises OSError as `open_regular`.

    Each call of the system hands Python's lock to another thread: `open` makes twice as many as are made here.
    """
    descriptor, size = _opened(path, os.O_RDONLY)
    try:
        wanted = size if most is None else min(size, most)
        data = os.read(descriptor, wanted)
        while len(data) < wanted and (more := os.read(descriptor, wanted - len(data))):  # 2 GiB at most at once
            data += more
        return data
    finally:
        os.close(descriptor)


def _opened(path: str, flags: int) -> tuple[int, int]:
    """Open a regular file; return its descriptor and its size in bytes."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode):
        return descriptor, status.st_size
    os.close(descriptor)
    raise OSError(None, "not a regular file", path)


def is_marked(path: str) -> bool:
    """Tell whether an Arrow file carries our mark, as an index or as features."""
    return bool(_mark_of(path))


def is_index(path: str) -> bool:
    """Tell whether a file is an index, of whatever version, also one that is cut short."""
    return "format" in _mark_of(path)


def _mark_of(path: str) -> dict:
    """Return what an Arrow file says about itself as one of ours, else {}; it stands at the beginning."""
    try:
        with open(path, "rb", opener=open_regular) as file:
            if file.read(8) != b"ARROW1\0\0":
                return {}
            said = json.loads((pa.ipc.open_stream(pa.PythonFile(file)).schema.metadata or {}).get(_MARK, b"{}"))
    except (OSError, pa.ArrowException, ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def marked(schema: pa.Schema, content: dict) -> pa.Schema:
    """Return the schema of a file of ours, with what it says about itself."""
    return schema.with_metadata({_MARK: json.dumps(content)})


def check_index_place(path: str) -> None:
    """Raise DataError if an index written to `path` would replace, or records beside it would change, foreign files."""
    if os.path.lexists(path) and not is_index(path):
        raise DataError(f"{path!r} is no index, and is not written over; set data.index to another file")
    for beside in (f"{path}.bad", f"{path}.verify"):
        if os.path.lexists(beside) and not _begins(beside, _RECORD):
            raise DataError(f"{beside!r} is no record of an index, and is not touched; set data.index to another file")
