"""`ccmim doctor`: what this machine has, whether it works, what runs in its place, and the line that installs it."""

import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ccmim_fast.config.parser import Parser

_WIDE = 160  # characters of a line where nobody reads it on a terminal
_HELP = """
Show GPUs and libraries, each tried; what runs in place of those that fail, and how to get them. Changes nothing, and
takes about a minute where torch.compile is tried.
"""


def doctor(argv: list[str]) -> None:
    """Print a table of the parts, what `auto` comes to, and the lines that install what is missing."""
    Parser("ccmim doctor", _HELP).parse_args(argv)
    from ccmim_fast.doctor import parts
    from ccmim_fast.engine.compile import choose_compile
    from ccmim_fast.models.precision import choose_precision
    from ccmim_fast.ranks.session import open_session

    with open_session("auto") as here:
        device = here.device
    rows = [*parts.gpus(), *parts.examine(parts.parts(device.type == "cuda"))]
    table = Table("part", "found", "works", "instead")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row[:4]))
    Console(width=None if sys.stdout.isatty() else _WIDE).print(table)
    precision, compiled = choose_precision("auto", device).name, choose_compile("auto", device)
    print(f"train.device=auto is {device.type}, precision=auto {precision}, compile=auto {compiled}")
    for row in rows:
        if row.install:  # not in the table, which would break it: it is there to be copied
            print(f"for {row.name}: {row.install}")
        if row.again:
            print(f"all that {row.name} says: {row.again}")
