"""The program `ccmim`: the first word is a command of the table in `commands`."""

import os
import sys

from ccmim_fast.commands import COMMANDS, COMPLETING, HELP, take_name, usage
from ccmim_fast.errors import exit_code_of
from ccmim_fast.registry import load


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code (see `errors.py`)."""
    names = {name: command.help for name, command in COMMANDS.items()}
    if COMPLETING in os.environ:
        from argcomplete.lexers import split_line

        # Words behind `ccmim` of the line that the shell completes, but for the word under the cursor.
        argv = split_line(os.environ["COMP_LINE"], int(os.environ["COMP_POINT"]))[3][1:]
    elif argv is None:
        argv = sys.argv[1:]
    if COMPLETING not in os.environ and (not argv or argv[0] in HELP):
        print(usage("ccmim", "command", names))
        return 0

    def run() -> None:
        name, rest = take_name("ccmim", "command", names, argv)
        load(f"ccmim_fast.commands.{COMMANDS[name].place}")(rest)

    return exit_code_of(run)


if __name__ == "__main__":
    sys.exit(main())
