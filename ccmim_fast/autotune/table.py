"""Tables of decisions: in a run's folder, and in the user's cache folder, one file for each machine and each shape."""

import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from ccmim_fast.autotune.decide import Decision
from ccmim_fast.runs.folder import version_of
from ccmim_fast.runs.state import read_record, write_record

FILE = "autotune.json"  # in a run's folder
_PACKAGES = ("ccmim_fast", "torch", "triton", "xformers", "nvidia-dali-cuda130", "nvidia-dali-cuda120")


class Table(NamedTuple):
    """This tuple is what was decided."""

    where: dict[str, str]  # device, versions of libraries, sizes of the run: the table holds for these alone
    decisions: dict[str, Decision]  # by the name of the question, such as "attention 50 x 12 x 64"
    seconds: float = 0.0  # that the measurement took; 0: nothing was measured

    def chosen(self) -> dict[str, str]:
        """Return what was chosen, by the name of the question."""
        return {name: decision.chosen for name, decision in self.decisions.items()}

    @property
    def complete(self) -> bool:
        """Tell whether every question was answered by a measurement, or left no choice."""
        return all(decision.milliseconds or decision.dropped for decision in self.decisions.values())

    def notes(self) -> list[str]:
        """Return what the user of a run is told: how it was decided, and a line for each candidate that is wrong."""
        if not self.decisions:
            return []
        how = f"measured in {self.seconds:.1f} s" if self.seconds else "not measured"
        if self.seconds and not self.complete:
            how = f"some of them not measured: {self.seconds:.1f} s were too short"
        head = f"auto: {len(self.decisions)} choices, {how}; they are in {FILE}"
        return [head, *(f"{name}: not {c}: {w}" for name, d in self.decisions.items() for c, w in d.dropped.items())]

    def lines(self) -> list[str]:
        """Return the table as text: a question, what is chosen, and the milliseconds of each candidate."""
        rows = []
        for name, decision in self.decisions.items():
            times = [f"{candidate} {time:.3f}" for candidate, time in decision.milliseconds.items()]
            wrong = [f"{candidate}: {why}" for candidate, why in decision.dropped.items()]
            rows.append((name, decision.chosen, "; ".join([", ".join(times), *wrong]).strip("; ")))
        widths = [max(len(row[column]) for row in rows) for column in range(2)] if rows else []
        return ["  ".join([*(c.ljust(w) for c, w in zip(row, widths)), row[2]]).rstrip() for row in rows]


def machine(device: torch.device) -> dict[str, str]:
    """Return what a time depends on beside the sizes: the device, and the versions of libraries."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
    else:
        name = f"{_processor()}, {torch.get_num_threads()} threads"
    return {"device": name} | {package: version_of(package) for package in _PACKAGES}


def folder() -> Path:
    """Return the folder of the tables in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "ccmim_fast" / "autotune"


def path_of(where: dict[str, str]) -> Path:
    """Return the file of a table in the user's cache folder."""
    return folder() / f"{hashlib.sha256(json.dumps(where, sort_keys=True).encode()).hexdigest()[:16]}.json"


def read_table(path: Path, where: dict[str, str] | None = None) -> Table | None:
    """Return a table that `write_table` wrote; None where there is none, or it is of another machine or other sizes.

    One line tells of a file that is damaged.
    """
    if not path.is_file():
        return None
    try:
        record = read_record(path, Table)
        table = Table(
            {str(key): str(value) for key, value in record.where.items()},
            {name: _decision(**given) for name, given in record.decisions.items()},
            float(record.seconds),
        )
    except (AttributeError, TypeError, ValueError):
        print(f"{path}: damaged, ignored", file=sys.stderr)
        return None
    return table if where is None or table.where == where else None


def write_table(path: Path, table: Table) -> None:
    """Write a table; where the disk refuses, there is none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    write_record(path, table._replace(decisions={name: d._asdict() for name, d in table.decisions.items()}))


def kept_tables(device: torch.device) -> Iterator[Table]:
    """Yield the tables of this machine in the user's cache folder, the newest first."""
    here = machine(device)
    for path in sorted(folder().glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        table = read_table(path)
        if table is not None and here.items() <= table.where.items():
            yield table


def _decision(chosen: str, milliseconds: dict[str, float], dropped: dict[str, str]) -> Decision:
    times = {str(candidate): float(time) for candidate, time in milliseconds.items()}
    return Decision(str(chosen), times, {str(candidate): str(why) for candidate, why in dropped.items()})


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
