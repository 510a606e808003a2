"""The commands of `ccmim`: a file for each, named as the command, and the table that finds it.

A command's file reads options and calls a library function of another folder. It is imported when its command is
called, and imports heavy libraries (torch, timm) after the options are read: so every `--help` is quick.
"""

import os
from collections.abc import Mapping
from typing import NamedTuple

from ccmim_fast.config.keys import nearest
from ccmim_fast.config.parser import Parser
from ccmim_fast.errors import ConfigError

HELP = ("-h", "--help")
COMPLETING = "_ARGCOMPLETE"  # set by the shell while it completes a command line


class Command(NamedTuple):
    """A row of the table."""

    place: str  # `module:function` below this package; the function takes the words behind the command's name
    help: str  # one line


COMMANDS = {
    "demo": Command("demo:demo", "pretrain ccMIM and MAE on made images, compare them, write a report"),
    "pretrain": Command("pretrain:pretrain", "pretrain a vision transformer on your images"),
    "submit": Command("submit:submit", "pretrain as a job of Slurm"),
    "runs": Command("runs:runs", "list runs, how each stands and what it logged last"),
    "report": Command("report:report", "compare runs in one offline HTML page"),
    "data": Command("data:data", "index, check, gather and measure images"),
    "eval": Command("eval:evaluate", "measure a checkpoint by a published protocol, or draw its scores and masks"),
    "export": Command("export:export", "write a run's weights for another library"),
    "embed": Command("embed:embed", "write features of a folder's images"),
    "predict": Command("predict:predict", "name the classes of a folder's images by a trained classifier"),
    "import": Command("import_:import_weights", "make a checkpoint of published weights"),
    "ablate": Command("ablate:ablate", "train variants side by side, several seeds, one table"),
    "bench": Command("bench:bench", "measure speed, in a checkout"),
    "doctor": Command("doctor:doctor", "show what this machine has, and what to install for more"),
}


def usage(program: str, kind: str, names: Mapping[str, str], then: str = "[options]") -> str:
    """Return the help of a program whose first word is one of `names`: a line for each of them."""
    rows = [f"  {name:<{max(map(len, names))}}  {help}" for name, help in names.items()]
    title = f"usage: {program} {kind.upper()} {then}"
    return "\n".join([title, "", *rows, "", f"{program} {kind.upper()} --help tells more."])


def take_name(
    program: str, kind: str, names: Mapping[str, str], argv: list[str], then: str = "[options]"
) -> tuple[str, list[str]]:
    """Split a command line into its first word, which is one of `names`, and the others.

    Args:
        program: the command that `argv` stands behind, such as "ccmim data".
        kind: the noun for `names`, each of which has a line of help, such as "command".
        then: what follows the first word, for the help, which `--help` prints before it ends the program.

    Raises:
        ConfigError: the first word is missing or unknown; the message names the nearest.
    """
    if COMPLETING in os.environ and not argv:
        parser = Parser(program)
        parser.add_argument(kind, choices=list(names))
        parser.parse_args(argv)  # prints the names that the word under the cursor may become, and ends
    if argv and argv[0] in HELP:
        print(usage(program, kind, names, then))
        raise SystemExit(0)
    if not argv:
        raise ConfigError(f"{program}: the {kind} is missing; one of {', '.join(names)}")
    if argv[0] not in names:
        near = nearest(argv[0], names)
        raise ConfigError(f"{program}: {argv[0]!r:.80}: no such {kind}; nearest: {near}; one of {', '.join(names)}")
    return argv[0], argv[1:]
