"""The program `ccmim`: the first word is a command of the table in `commands`."""

import sys

from ccmim_fast.commands import COMMANDS, HELP, take_name, usage
from ccmim_fast.errors import exit_code_of


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code (see `errors.py`)."""
    argv = sys.argv[1:] if argv is None else argv
    names = {name: command.help for name, command in COMMANDS.items()}
    if not argv or argv[0] in HELP:
        print(usage("ccmim", "command", names))
        return 0

    def run() -> None:
        name, rest = take_name("ccmim", "command", names, argv)
        COMMANDS[name].load()(rest)

    return exit_code_of(run)


if __name__ == "__main__":
    sys.exit(main())
