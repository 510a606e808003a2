"""Run folders below a folder: how each run stands and what it logged last. Imports no torch."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ccmim_fast.checkpoints.manifest import CHECKPOINTS, checkpoints, read_manifest, step_of
from ccmim_fast.errors import CheckpointError, as_text, one_line, printable
from ccmim_fast.runs.state import CONFIG, FILE, METRICS, RunState, is_alive, read_state

COLUMNS = ("run", "state", "epoch", "loss", "recons", "contrast", "img/s", "saved", "silent")
_TAIL = 65536  # bytes of metrics.jsonl read first; a line has about 400
_SILENT = 600  # seconds without a line, after which a run on another machine counts as gone; covers a look and a save
_LINES = 5  # the same, in log lines that should have come meanwhile, for slow steps


class RunRow(NamedTuple):
    """The cells of one run's row, and its error in one line (or "")."""

    cells: tuple[str, ...]
    error: str


def run_folders(root: Path) -> Iterator[Path]:
    """Yield each folder at and below `root` that holds config.yaml and metrics.jsonl, by name; links are followed."""
    seen = set()
    for folder, inside, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            inside.clear()
            continue
        seen.add(real)
        inside[:] = sorted(name for name in inside if name != CHECKPOINTS and not name.startswith("."))
        if CONFIG in files and METRICS in files:
            yield Path(folder)


def describe(folder: Path, root: Path) -> RunRow:
    """Return the row of the run in `folder`, named relative to `root`; a missing or damaged figure is an empty cell."""
    state, config, last = read_state(folder), _config(folder / CONFIG), last_line(folder / METRICS)
    age = time.time() - max(_mtime(folder / METRICS), _mtime(folder / FILE))
    cells = (
        _printable(str(folder.relative_to(root))),
        status(state, age, _silence_limit(config, last)),
        "/".join(filter(None, [_figure(last, "epoch", ".2f"), _figure(config.get("train"), "epochs", "d")])),
        *(_figure(last, key, ".4f") for key in ("loss", "recons", "contrast")),
        _figure(last, "images_per_second", ".0f"),
        _newest_step(folder / CHECKPOINTS),
        _duration(age),
    )
    return RunRow(cells, _printable(str(state.error)) if state is not None else "")


def status(state: RunState | None, age: float, limit: float) -> str:
    """Return the word for a run whose files are `age` seconds old; `limit` counts on other machines only."""
    if state is None:
        return "unknown"  # written by an older version, or damaged
    if state.state != "running":
        return state.state
    if (alive := is_alive(state)) is None:
        return "running?" if age < limit else "dead?"
    return "running" if alive else "dead"


def last_line(path: Path) -> dict[str, Any]:
    """Return the last training record of a metrics.jsonl, or {}. A line that a kill cut short is skipped."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        # The end is enough, unless many records of other kinds came since.
        for begin in dict.fromkeys((max(0, size - _TAIL), 0)):
            file.seek(begin)
            for line in reversed(file.read().splitlines()):
                with contextlib.suppress(ValueError, RecursionError):
                    record = json.loads(line)
                    if isinstance(record, dict) and record.get("kind") == "train":
                        return record
    return {}


def _config(path: Path) -> dict[str, Any]:
    """Return the configuration as the file has it, not validated: an older version's has other keys."""
    # The loader in C: the other takes 20 ms a file.
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError, RecursionError):
        config = yaml.load(path.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return config if isinstance(config, dict) else {}
    return {}


def _silence_limit(config: dict[str, Any], last: dict[str, Any]) -> float:
    """Return the seconds without a line after which a run on another machine counts as dead."""
    try:
        seconds = config["run"]["log_every"] * config["train"]["batch_size"] / last["images_per_second"]
        return max(_SILENT, _LINES * seconds)
    except (KeyError, TypeError, ArithmeticError):
        return _SILENT


def _newest_step(folder: Path) -> str:
    """Return the step of the newest checkpoint whose files have their sizes; loading it compares checksums, too."""
    with contextlib.suppress(CheckpointError):
        for path in reversed(checkpoints(folder)):
            step = step_of(path)
            with contextlib.suppress(OSError, CheckpointError):
                if all((path / name).stat().st_size == file.size for name, file in read_manifest(path, step).items()):
                    return str(step)
    return ""


def _printable(text: str) -> str:
    """Return the text on one line, see `as_text`."""
    return printable(one_line(as_text(text), None))


def _figure(figures: Any, key: str, form: str) -> str:
    value = figures.get(key) if isinstance(figures, dict) else None
    return format(value, form) if isinstance(value, int if form == "d" else (int, float)) else ""


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{max(0, int(seconds))} s"
