"""Figures of a run go to metrics.jsonl, on request to TensorBoard, to a progress line, and to log.txt."""

import contextlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ccmim_fast.errors import one_line, printable, say
from ccmim_fast.runs.state import METRICS, write_whole

_FREE_BYTES = 2**20  # on the disk, before TensorBoard gets a record; a record has a few hundred


class Metrics:
    """This class writes one JSON object a line to `folder`/metrics.jsonl, and if asked the same figures to TensorBoard.

    Records past `resume_step` are dropped, so that every step of a resumed run appears once; 0: all are. A line that is
    no record (of bytes that are no text, or without a step) stays, but for a last one, which a kill has cut.
    """

    def __init__(self, folder: Path, *, tensorboard: bool, resume_step: int = 0):
        self.path = folder / METRICS
        lines = self.path.read_bytes().splitlines(keepends=True) if resume_step and self.path.exists() else []
        kept = [line for line in lines if line.endswith(b"\n") and _step_of(line) <= resume_step]
        write_whole(self.path, b"".join(kept))
        self._file, self._board = self.path.open("a", buffering=1), None
        if tensorboard:
            with self._board_off_on_error():
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(
                    str(folder / "tensorboard"), purge_step=resume_step + 1 if resume_step else None
                )

    def write(self, kind: str, step: int, **figures: Any) -> None:
        """Write one record; figures that are not finite are written as null, as JSON has no NaN."""
        safe = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}
        # A full disk ends neither the run nor the records that come when there is room again.
        with contextlib.suppress(OSError):
            self._file.write(json.dumps({"kind": kind, "step": step, **safe}) + "\n")
        # TensorBoard's thread ends with the first write that fails and takes nothing afterwards, so it gets nothing
        # while the disk is full. Each later call would raise the thread's exception object again, which keeps every
        # call's frames and with them the tensors of the steps: so nothing is called after a failure.
        with self._board_off_on_error():
            if self._board is not None and shutil.disk_usage(self.path).free > _FREE_BYTES:
                for name, value in safe.items():
                    if isinstance(value, int | float):
                        self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        with self._board_off_on_error():
            if self._board is not None:
                self._board.close()

    @contextlib.contextmanager
    def _board_off_on_error(self) -> Iterator[None]:
        """Print one line and go on without TensorBoard, which fails in its own ways (full disk, other protobuf)."""
        try:
            yield
        except Exception as error:
            self._board = None
            line = f"TensorBoard is off, metrics.jsonl goes on: {type(error).__name__}: {one_line(error)}"
            Console(stderr=True, soft_wrap=True).print(line, highlight=False, markup=False)


def _step_of(line: bytes) -> float:
    """Return the step of a record; minus infinity of a line that is none."""
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
        step = json.loads(line)["step"]
        return step if isinstance(step, int | float) else -math.inf
    return -math.inf


class ProgressLine:
    """Progress is a live line on a terminal, a plain line per log step elsewhere, and nothing where it is not shown.

    The headline is printed once, before the first step; `done` are optimizer steps that were taken before, of
    `total_steps` in all. The file `log` gets every line too; a resumed run appends to it.
    """

    def __init__(self, headline: str, total_steps: int, done: int, shown: bool, log: Path | None = None):
        self._shown, self._total, self._log, self._console = shown, total_steps, log, Console()
        self._live = shown and self._console.is_terminal
        columns = BarColumn(24), TextColumn("{task.description}")
        self._bar = Progress(*columns, console=self._console, disable=not self._live)
        self._task = self._bar.add_task("starting", total=total_steps, completed=done)
        self.note(headline)
        self._bar.start()

    def update(self, step: int, figures: dict[str, float]) -> None:
        line = _line(step, self._total, figures)
        if self._live:
            self._write_log(line)
            self._bar.update(self._task, completed=step, description=line)
        else:
            self.note(line)

    def note(self, line: str) -> None:
        """Print one line that stays, live or plain."""
        if not self._shown:
            return
        self._write_log(line)
        if self._live:
            with contextlib.suppress(OSError):
                self._console.print(printable(line), highlight=False, markup=False)
            return
        say(line)

    def _write_log(self, line: str) -> None:
        if self._log is not None:
            # A full disk ends the log, not the run.
            with contextlib.suppress(OSError), self._log.open("a", encoding="utf-8", errors="replace") as file:
                file.write(printable(line) + "\n")

    def close(self) -> None:
        if self._live:
            self._bar.stop()


def _line(step: int, total: int, f: dict[str, float]) -> str:
    parts = [f"epoch {f['epoch']:.2f}", f"step {step}/{total}", f"loss {f['loss']:.4f}"]
    parts += [f"{part} {f[part]:.4f}" for part in ("recons", "contrast") if f.get(part) is not None]
    parts += [f"lr {f['lr']:.2e}", f"{f['images_per_second']:.0f} img/s", f"data wait {f['data_wait']:.0%}"]
    if f.get("mfu") is not None:
        parts.append(f"MFU {f['mfu']:.0%}")
    minutes, seconds = divmod(int(f["eta_seconds"]), 60)
    hours, minutes = divmod(minutes, 60)
    return " · ".join([*parts, f"ETA {hours}:{minutes:02d}:{seconds:02d}"])
