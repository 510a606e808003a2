"""Where figures go: metrics.jsonl always, TensorBoard where asked, a progress line for whoever is watching, log.txt."""

import contextlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

_ROOM = 2**20  # bytes; a record for TensorBoard has a few hundred


class Metrics:
    """Writes one JSON object a line to `folder`/metrics.jsonl, and the same figures to TensorBoard.

    Lines of an interrupted run past the step it resumes from are dropped, so that every step is told once.

    Args:
        folder: the run's folder.
        tensorboard: write event files too; where that fails the run goes on without.
        resume_step: first step that will be written anew; 0 starts an empty file.
    """

    def __init__(self, folder: Path, *, tensorboard: bool, resume_step: int = 0):
        self.path = folder / "metrics.jsonl"
        kept = _lines_before(self.path, resume_step) if resume_step else []
        self.path.write_text("".join(kept))
        self._file = self.path.open("a", buffering=1)
        self._board = None
        if tensorboard:
            with self._board_off_if_it_fails():
                self._board = _open_board(folder, resume_step)

    def write(self, kind: str, step: int, **figures: Any) -> None:
        """One record; figures that are not finite are written as null, as JSON has no NaN."""
        safe = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}
        # A full disk ends neither the run nor the records that come when there is room again.
        with contextlib.suppress(OSError):
            self._file.write(json.dumps({"kind": kind, "step": step, **safe}) + "\n")
        if self._board is None:
            return
        # TensorBoard's thread ends with the first write that fails, and takes nothing afterwards: it gets nothing while
        # the disk is full. What failed it is raised at each later call, by one object that holds on to every call's
        # frames, and by them to the steps' tensors: so it is called no more.
        with self._board_off_if_it_fails():
            if shutil.disk_usage(self.path).free > _ROOM:
                self._write_board(kind, step, safe)

    def _write_board(self, kind: str, step: int, figures: dict[str, Any]) -> None:
        for name, value in figures.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        if self._board is not None:
            with self._board_off_if_it_fails():
                self._board.close()

    @contextlib.contextmanager
    def _board_off_if_it_fails(self) -> Iterator[None]:
        """TensorBoard fails in its own ways (a full disk, a protobuf of another version): one line, then without it."""
        try:
            yield
        except Exception as error:
            self._board = None
            reason = " ".join(str(error).split())[:200]
            line = f"TensorBoard is off, metrics.jsonl goes on: {type(error).__name__}: {reason}"
            Console(stderr=True, soft_wrap=True).print(line, highlight=False, markup=False)


def _lines_before(path: Path, step: int) -> list[str]:
    if not path.exists():
        return []
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            # The last line of a killed run may be cut.
            continue
    return kept


def _open_board(folder: Path, resume_step: int):
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step or None)


class ProgressLine:
    """A live line on a terminal, a plain line per log step elsewhere; silent on ranks other than 0.

    Args:
        headline: printed once, before the first step.
        total_steps: optimizer steps of the whole run.
        done: steps already taken.
        shown: False: print nothing.
        log: file that gets every line too, behind those of the run that this one goes on with.
    """

    def __init__(self, headline: str, total_steps: int, done: int, shown: bool, log: Path | None = None):
        self._log = log if shown else None
        self._console = Console()
        self._live = shown and self._console.is_terminal
        self._plain = shown and not self._live
        self._progress = Progress(BarColumn(24), TextColumn("{task.description}"), console=self._console)
        self._task = self._progress.add_task("starting", total=total_steps, completed=done)
        self._total = total_steps
        self._keep(headline)
        if self._plain:
            self._print(headline)
        elif self._live:
            self._console.print(headline, highlight=False, markup=False)
        if self._live:
            self._progress.start()

    def update(self, step: int, figures: dict[str, float]) -> None:
        line = _line(step, self._total, figures)
        self._keep(line)
        if self._live:
            self._progress.update(self._task, completed=step, description=line)
        elif self._plain:
            self._print(line)

    def note(self, line: str) -> None:
        """One line that stays, whether live or plain."""
        self._keep(line)
        if self._live:
            self._console.print(line, highlight=False, markup=False)
        elif self._plain:
            self._print(line)

    def _keep(self, line: str) -> None:
        """A full disk ends the log, not the run."""
        if self._log is not None:
            with contextlib.suppress(OSError), self._log.open("a", encoding="utf-8", errors="replace") as file:
                file.write(line + "\n")

    def _print(self, line: str) -> None:
        """A reader that went away (`| head`) ends the lines, not the run."""
        try:
            print(line, flush=True)
        except BrokenPipeError:
            self._plain = False
            # What is left in the buffer goes nowhere; else the interpreter complains at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def close(self) -> None:
        if self._live:
            self._progress.stop()


def _line(step: int, total: int, f: dict[str, float]) -> str:
    parts = [f"epoch {f['epoch']:.2f}", f"step {step}/{total}", f"loss {f['loss']:.4f}"]
    parts += [f"{part} {f[part]:.4f}" for part in ("recons", "contrast") if f.get(part) is not None]
    parts += [f"lr {f['lr']:.2e}", f"{f['images_per_second']:.0f} img/s", f"data wait {f['data_wait']:.0%}"]
    if f.get("mfu") is not None:
        parts.append(f"MFU {f['mfu']:.0%}")
    minutes, seconds = divmod(int(f["eta_seconds"]), 60)
    hours, minutes = divmod(minutes, 60)
    return " · ".join([*parts, f"ETA {hours}:{minutes:02d}:{seconds:02d}"])
