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
_RUN = "config.yaml", ("environment.json", "metrics.jsonl", "state.json")  # as in runs/state.py and runs/folder.py
_RECORD = b'{"index": "'  # how each line of the records beside an index begins, with its fingerprint


def output_of(names: Collection[str]) -> str:
    """Return which output of ours a folder with these entries is: a run, shards, an unfinished one; "" if none."""
    if _RUN[0] in names and any(name in names for name in _RUN[1]):
        return "a run's folder"
    if _LOCK in names:
        return "a folder that a command of ccmim has not finished; run it again"
    return "a folder of shards that ccmim data shard wrote" if BESIDE in names else ""


def outputs_among(names: Collection[str]) -> list[str]:
    """Return the files among a folder's entries that are outputs of ours: features and the drawings of `ablate`."""
    return [
        name
        for name in names
        if (name.endswith(".npy") and f"{name[:-4]}.jsonl" in names)
        or (name.endswith(".png") and {f"{name[:-4]}.md", f"{name[:-4]}.json"} <= {*names})
    ]


def open_regular(path: str, flags: int = os.O_RDONLY) -> int:
    """Open a file, for `open(..., opener=open_regular)`, but refuse at once what is none: a FIFO would wait for ever.

    Raises OSError, also for folders, sockets and devices.
    """
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
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
        if os.path.lexists(beside) and not _is_record(beside):
            raise DataError(f"{beside!r} is no record of an index, and is not touched; set data.index to another file")


def _is_record(path: str) -> bool:
    try:
        with open(path, "rb", opener=open_regular) as file:
            start = file.read(len(_RECORD))
    except OSError:
        return False
    return start == _RECORD
