"""How far a long command is, on standard error."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextlib.contextmanager
def progress_bar(title: str, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Gives report(done, total); where standard error is no terminal, or with `quiet`, nothing is drawn."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda done, total: None
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(
            title.encode(sys.stderr.encoding or "utf-8", "replace").decode(errors="replace"), total=None
        )
        yield lambda done, total: bar.update(task, completed=done, total=total)
