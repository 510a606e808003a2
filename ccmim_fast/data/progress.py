"""This module shows the progress of a long command on standard error."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextlib.contextmanager
def progress_bar(title: str, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Yield report(done, total); nothing is drawn if `quiet`, or if standard error is no terminal."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        printable = title.encode(sys.stderr.encoding or "utf-8", "replace").decode(errors="replace")
        task = bar.add_task(printable, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
