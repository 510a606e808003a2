"""`ccmim ablate`: variants of a run side by side, several seeds, one table."""

import shlex
from pathlib import Path

from ccmim_fast.ablation.variants import ABLATIONS
from ccmim_fast.commands import take_name
from ccmim_fast.config.load import presets
from ccmim_fast.config.parser import Parser, whole_number, words
from ccmim_fast.errors import ConfigError

_HELP = """
Train each variant for equal epochs with each seed; where scores are compared, train the variants that are slower than
the bank also for as long as the bank takes. Settings are for all variants alike; without --config they are those of
the demo, whose objects and labels are known. On other images, labels in data.root and in --test give
the accuracies. A run that was finished before in --runs is not repeated. Writes OUT.md, OUT.json and OUT.png.
"""


def ablate(argv: list[str]) -> None:
    """Run one of `ABLATIONS` and print the path of its table."""
    names = {name: ablation.title for name, ablation in ABLATIONS.items()}
    name, rest = take_name("ccmim ablate", "ablation", names, argv, "[options] [settings]")
    given = vars(parser_of(name).parse_args(rest))
    settings = {"config": "demo", **given.pop("settings")}
    for key, instead in (("seed", "--seeds N"), ("run.dir", "--runs DIR")):
        if key in settings:
            raise ConfigError(f"--{key}: each run has its own; use {instead}")
    from ccmim_fast.ablation.run import run_ablation

    print(run_ablation(name, words(settings), command=shlex.join(["ccmim", "ablate", *argv]), **given))


def parser_of(name: str) -> Parser:
    """Return the parser of the settings and of an ablation's options, the keyword arguments of `run_ablation`."""
    parser = Parser(f"ccmim ablate {name}", _HELP)
    parser.add_argument("--seeds", type=whole_number(1), default=3, help="runs of each variant")
    parser.add_argument("--jobs", type=whole_number(1), default=1, help="runs at a time, which share the cores")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[], help="train these variants alone")
    parser.add_argument("--test", default="", metavar="DIR", help="labelled images that features are tested on")
    parser.add_argument("--runs", type=Path, default=Path(f"runs/ablate-{name}"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path(f"runs/ablate-{name}/table"), help="path without its ending")
    parser.add_settings(presets=presets())
    return parser
