"""`ccmim runs`: every run folder below a folder, how the run stands and what it logged last. Imports no torch."""

import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ccmim_fast.config.parser import Parser
from ccmim_fast.errors import ConfigError
from ccmim_fast.runs.listing import COLUMNS, describe, run_folders

WIDE = 160  # characters of a line where nobody reads it on a terminal
_HELP = """
List the run folders below FOLDER, how each run stands and what it logged last.
State: running; done; stopped (in order, before the end: by a signal); failed (the error stands below the table);
dead (gone without a word: killed). `running?` and `dead?` are on another machine and judged by their last line.
saved: the step of the newest complete checkpoint. silent: how long ago the run wrote.
"""


def runs(argv: list[str]) -> None:
    """Print a table of the runs below a folder."""
    parser = Parser("ccmim runs", _HELP)
    parser.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, default=Path("runs"))
    root = parser.parse_args(argv).folder
    if not root.is_dir():
        raise ConfigError(f"ccmim runs: {str(root)!r:.80}: no such folder; write ccmim runs FOLDER")
    rows = [describe(folder, root) for folder in run_folders(root)]
    if not rows:
        print(f"no run below {str(root)!r}")
        return
    # Narrow: it fits 80 characters with runs of short names, and folds longer ones.
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in COLUMNS:
        left = name in ("run", "state")
        table.add_column(name, justify="left" if left else "right", no_wrap=name != "run", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row.cells))
    Console(width=None if sys.stdout.isatty() else WIDE).print(table)
    for row in rows:
        if row.error:
            print(f"{row.cells[0]}: {row.error}")
