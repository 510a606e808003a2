"""The program `ccmim`: the first word is a command of the table in `commands`."""

import os
import sys

from ccmim_fast.commands import COMMANDS, COMPLETING, HELP, take_name, usage
from ccmim_fast.errors import exit_code_of
from ccmim_fast.registry import load


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code (see `errors.py`)."""
    argv = words_before_the_cursor() if COMPLETING in os.environ else sys.argv[1:] if argv is None else argv
    names = {name: command.help for name, command in COMMANDS.items()}
    if COMPLETING not in os.environ and (not argv or argv[0] in HELP):
        print(usage("ccmim", "command", names))
        return 0

    def run() -> None:
        name, rest = take_name("ccmim", "command", names, argv)
        load(f"ccmim_fast.commands.{COMMANDS[name].place}")(rest)

    return exit_code_of(run)


def words_before_the_cursor() -> list[str]:
    """Return the words behind `ccmim` of the line that the shell completes, but for the word under the cursor."""
    from argcomplete.lexers import split_line

    return split_line(os.environ["COMP_LINE"], int(os.environ["COMP_POINT"]))[3][1:]


if __name__ == "__main__":
    sys.exit(main())
