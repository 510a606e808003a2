"""Run folders below a folder: how each run stands and what it logged last. Imports no torch."""

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ccmim_fast.runs.state import FILE, RunState, is_alive, read_state

CONFIG, METRICS, CHECKPOINTS = "config.yaml", "metrics.jsonl", "checkpoints"
COLUMNS = ("run", "state", "epoch", "loss", "recons", "contrast", "img/s", "saved", "silent")
_TAIL = 65536  # bytes of metrics.jsonl read first; a line has about 400
_SILENT = 600  # seconds without a line, after which a run on another machine counts as gone; covers a look and a save
_LINES = 5  # the same, in log lines that should have come meanwhile, for slow steps


class RunRow(NamedTuple):
    """One run: the texts of its row, and the line of its error, or an empty one."""

    cells: tuple[str, ...]
    error: str


def run_folders(root: Path) -> Iterator[Path]:
    """The folders at and below `root` with config.yaml and metrics.jsonl, by name; links are followed, each once."""
    seen = set()
    for folder, inside, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            inside.clear()
            continue
        seen.add(real)
        inside[:] = sorted(name for name in inside if name != CHECKPOINTS and not name.startswith("."))
        if CONFIG in files and METRICS in files:
            yield Path(folder)


def describe(folder: Path, root: Path) -> RunRow:
    """The row of the run in `folder`, named as seen from `root`; what is missing or damaged is left empty."""
    state, config, last = read_state(folder), _config(folder / CONFIG), last_line(folder / METRICS)
    age = time.time() - max(_mtime(folder / METRICS), _mtime(folder / FILE))
    cells = (
        _printable(str(folder.relative_to(root))),
        judge(state, age, _silence_limit(config, last)),
        "/".join(filter(None, [_figure(last, "epoch", ".2f"), _figure(config.get("train"), "epochs", "d")])),
        *(_figure(last, key, ".4f") for key in ("loss", "recons", "contrast")),
        _figure(last, "images_per_second", ".0f"),
        _newest_step(folder / CHECKPOINTS),
        _duration(age),
    )
    return RunRow(cells, _printable(str(state.error)) if state is not None else "")


def judge(state: RunState | None, age: float, limit: float) -> str:
    """The word for a run that said `state` and wrote `age` seconds ago; `limit` counts on other machines only."""
    if state is None:
        return "unknown"  # of an older version, or damaged
    if state.state != "running":
        return state.state
    alive = is_alive(state)
    if alive is None:
        return "running?" if age < limit else "dead?"
    return "running" if alive else "dead"


def last_line(path: Path) -> dict[str, Any]:
    """The last training line of a metrics.jsonl; {} where there is none. One that was cut by a kill is passed over."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        # Nearly always the end is enough; a run that told of much else since is read whole.
        for begin in dict.fromkeys((max(0, size - _TAIL), 0)):
            file.seek(begin)
            for line in reversed(file.read().splitlines()):
                record = _record(line)
                if record.get("kind") == "train":
                    return record
    return {}


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _config(path: Path) -> dict[str, Any]:
    """The resolved configuration as it stands in the file; not validated: an older version's has other keys."""
    try:
        # The loader in C: the other takes 20 ms a file.
        config = yaml.load(path.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _silence_limit(config: dict[str, Any], last: dict[str, Any]) -> float:
    """Seconds without a line after which a run counts as gone."""
    try:
        seconds = config["run"]["log_every"] * config["train"]["batch_size"] / last["images_per_second"]
        return max(_SILENT, _LINES * seconds)
    except (KeyError, TypeError, ArithmeticError):
        return _SILENT


def _newest_step(folder: Path) -> str:
    """The step of the newest checkpoint whose files have their sizes; their checksums are looked at when it loads."""
    steps = [int(name[1]) for path in folder.glob("step_*") if (name := re.fullmatch(r"step_(\d{8,})", path.name))]
    for step in sorted(steps, reverse=True):
        path = folder / f"step_{step:08d}"
        try:
            sizes = json.loads((path / "manifest.json").read_text())["files"]
            if all((path / name).stat().st_size == said["size"] for name, said in sizes.items()):
                return str(step)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return ""


def _printable(text: str) -> str:
    """On one line; bytes of a name that are no text become question marks."""
    return " ".join(text.encode(errors="replace").decode().split())


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
