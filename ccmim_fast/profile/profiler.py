"""The profiler runs torch's over some steps; it writes a trace, and a table of time against floors by kind of work."""

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function, schedule

from ccmim_fast.errors import ConfigError
from ccmim_fast.models.precision import Precision
from ccmim_fast.profile.kinds import KINDS
from ccmim_fast.profile.meter import Meter, measure_matmul_rate, measure_memory_bandwidth, synchronise
from ccmim_fast.profile.timeline import DATA_WAIT, PROFILED, read_timeline
from ccmim_fast.ranks.session import Session
from ccmim_fast.runs.folder import environment

# Steps before the profiled ones: the first counts FLOPs, in the last the profiler sets itself up.
WARM_UP = 3

# AdamW in float32: reads parameter, gradient and both moments, writes parameter and both moments.
ADAMW_BYTES = (4 + 3) * 4

Item = TypeVar("Item")


@dataclass(frozen=True)
class Profile:
    """This class profiles some optimizer steps of a run, once, on rank 0 alone."""

    steps: int  # to profile; 0 costs nothing
    session: Session
    folder: Path  # the run's; `profile/trace.json.gz`, `table.md` and `table.json` are written into it
    meter: Meter  # knows a step's arithmetic; it is paused while the table is made
    model: nn.Module  # its trainable parameters bound the optimizer's time
    precision: Precision  # of the step's matmuls
    images: int  # per step and rank
    note: Callable[[str], None]  # prints the table

    def watch(self, batches: Iterable[Item]) -> Iterable[Item]:
        """Return the batches of the run's steps, unchanged."""
        return self._watched(iter(batches)) if self.steps and self.session.is_main else batches

    def _watched(self, batches: Iterator[Item]) -> Iterator[Item]:
        """Yield the batches; a step runs while its batch is out, so the host waits for the device between steps."""
        device = self.session.device
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        yield from islice(batches, WARM_UP - 1)
        with torch.profiler.profile(activities=activities, schedule=schedule(wait=0, warmup=1, active=1)) as profiler:
            yield next(batches)
            synchronise(device)
            profiler.step()
            with record_function(PROFILED):
                for _ in range(self.steps):
                    with record_function(DATA_WAIT):
                        batch = next(batches)
                    yield batch
                synchronise(device)
        self._write(profiler)
        yield from batches

    def _write(self, profiler: torch.profiler.profile) -> None:
        folder, device = self.folder / "profile", self.session.device
        folder.mkdir(exist_ok=True)
        trace = folder / "trace.json.gz"
        profiler.export_chrome_trace(str(trace))
        with gzip.open(trace, "rt") as file:
            spent = read_timeline(json.load(file)["traceEvents"], on_gpu=device.type == "cuda")
        flops = Counter()
        for op, count in self.meter.flops_by_op.items():
            flops["attention" if "attention" in str(op) else "matmul"] += count * self.images
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        facts = {**environment(device), "threads": torch.get_num_threads(), "precision": self.precision.name}
        measured = {
            "facts": facts,
            "steps": self.steps,
            "images_per_step": self.images,
            "flops_per_step": flops,
            "optimizer_bytes_per_step": ADAMW_BYTES * trained,
            "matmul_flops_per_second": measure_matmul_rate(device, self.precision.dtype),
            "memory_bytes_per_second": measure_memory_bandwidth(device),
        }
        table = make_table(spent, measured)
        (folder / "table.json").write_text(json.dumps(table, indent=1) + "\n")
        (folder / "table.md").write_text(markdown(table))
        self.note(markdown(table))
        self.meter.pause()


def check_room(steps: int, left: int) -> None:
    """Raise ConfigError if `steps` to profile, behind the warm-up, are more than the `left` ones of the run."""
    if steps and left < WARM_UP + steps:
        raise ConfigError(
            f"train.profile={steps}: with {WARM_UP} warm-up steps it needs {WARM_UP + steps} steps, this run has "
            f"{left} left; nearest valid is {max(0, left - WARM_UP)}"
        )


def make_table(spent: Mapping[tuple[str, str], float], measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of `table.json`: what was measured, and each kind's time beside its floor.

    No implementation of the same arithmetic gets below a floor on this device: that of products and attention is their
    time at its matmul rate, AdamW's is that at its memory bandwidth. The other kinds have none, as a good enough
    compiler might fuse or hide them: so all of their time is over the floor.

    Args:
        spent: microseconds by (kind, name), over all steps.
        measured: `steps`, of which each has `images_per_step`, `flops_per_step` by kind and `optimizer_bytes_per_step`;
            of the device `matmul_flops_per_second` and `memory_bytes_per_second`; `facts`, printable values by name.
    """
    steps, flops = measured["steps"], measured["flops_per_step"]
    floors = {kind: count / measured["matmul_flops_per_second"] * 1e3 for kind, count in flops.items()}
    floors["optimizer"] = measured["optimizer_bytes_per_step"] / measured["memory_bytes_per_second"] * 1e3
    whole = sum(spent.values()) / steps / 1e3
    rows = [_row(kind, spent, steps, whole, floors.get(kind)) for kind in KINDS]
    rows = [row for row in rows if row["ms"] or row["floor_ms"]]
    worst = max(rows, key=lambda row: row["over_floor_ms"])
    over, floor = worst["over_floor_ms"], worst["floor_ms"]
    above = "with no floor below it" if floor is None else f"above its floor of {floor:.1f} ms"
    share = f"{over / whole:.0%} of the step's {whole:.1f} ms"
    return {
        **measured,
        "ms_per_step": whole,
        "mfu": sum(flops.values()) / measured["matmul_flops_per_second"] / (whole / 1e3),
        "kinds": rows,
        "sentence": f"Largest loss: {worst['kind']}, {over:.1f} ms per step {above}, {share}.",
    }


def _row(kind: str, spent: Mapping[tuple[str, str], float], steps: int, whole: float, floor: float | None) -> dict:
    names = Counter({name: us / steps / 1e3 for (of, name), us in spent.items() if of == kind})
    ms = sum(names.values())
    return {
        "kind": kind,
        "ms": ms,
        "share": ms / whole,
        "floor_ms": floor,
        "over_floor_ms": ms - (floor or 0.0),
        "names": [{"name": name, "ms": ms} for name, ms in names.most_common(5) if name],
    }


def markdown(table: Mapping[str, Any]) -> str:
    """Return the table for people, in milliseconds per step."""
    facts, images, whole = table["facts"], table["images_per_step"], table["ms_per_step"]
    lines = [
        f"{table['steps']} steps of {images} images, {facts['precision']}, {facts['device']}, "
        f"{facts['threads']} threads, torch {facts['torch']}: {whole:.1f} ms per step, "
        f"{images / whole * 1e3:.1f} img/s, MFU {table['mfu']:.0%}. Measured right after: matmul "
        f"{table['matmul_flops_per_second'] / 1e12:.3g} TFLOP/s, "
        f"memory {table['memory_bytes_per_second'] / 1e9:.3g} GB/s.",
        "",
        "| kind | ms per step | share | floor | over it | mostly |",
        "|---|---:|---:|---:|---:|---|",
        *(_line(row) for row in table["kinds"]),
        "",
        table["sentence"],
    ]
    return "\n".join(lines) + "\n"


def _line(row: Mapping[str, Any]) -> str:
    floor = "-" if row["floor_ms"] is None else f"{row['floor_ms']:.1f}"
    names = ", ".join(f"`{_short(part['name'])}` {part['ms']:.1f}" for part in row["names"][:2])
    return f"| {row['kind']} | {row['ms']:.1f} | {row['share']:.1%} | {floor} | {row['over_floor_ms']:.1f} | {names} |"


def _short(name: str) -> str:
    """Return the name without namespaces and characters that would end a cell; a C++ template can fill a page."""
    return re.sub(r"^void |aten::|at::native::|\(anonymous namespace\)::", "", name).replace("|", "/")[:60]
