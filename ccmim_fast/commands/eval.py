"""`ccmim eval`: a checkpoint measured by a published protocol; or its scores and masks, drawn."""

from pathlib import Path

from ccmim_fast.commands import take_name
from ccmim_fast.config.evaluation import EvalConfig
from ccmim_fast.config.load import presets
from ccmim_fast.config.parser import Parser, whole_number, words
from ccmim_fast.errors import say
from ccmim_fast.evaluation.registry import EVALUATIONS

_HELP = """
CHECKPOINT is the folder of a run or of one of its checkpoints, a .safetensors or .pth file, or timm:NAME. Writes
result.json and result.md into run.dir; if that is not given, below the run's folder.
"""
_MASKS = """
Show what a model attends to, and what it hides: scores of each source and the masks of each strategy, drawn (masks.png)
and measured: how well the scores find the objects and how many object patches stay visible, where objects are known,
and how unlike the scores are. Of the settings, those of data, mask and score, seed, run.dir, run.overwrite and
train.device count here; their defaults are the run's own.
"""


def evaluate(argv: list[str]) -> None:
    """Carry out one of `EVALUATIONS`, or `masks`, and print the figures."""
    names = {name: evaluation.help for name, evaluation in EVALUATIONS.items()}
    names["masks"] = "scores and masks, drawn and measured"
    name, rest = take_name("ccmim eval", "evaluation", names, argv, "CHECKPOINT [settings]")
    given = vars(parser_of(name).parse_args(rest))
    if name == "masks":
        from ccmim_fast.evaluation.masks.command import show_masks

        show_masks(settings=words(given.pop("settings")), **given)
        return
    from ccmim_fast.evaluation import run

    if result := run.evaluate(name, **given):
        say(result)


def parser_of(name: str) -> Parser:
    """Return the parser of an evaluation's settings."""
    what = _MASKS if name == "masks" else f"A checkpoint measured by {EVALUATIONS[name].help}."
    parser = Parser(f"ccmim eval {name}", what + _HELP)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="what is measured")
    if name != "masks":
        parser.add_settings(EvalConfig, [preset for preset in presets("eval") if preset.startswith(name)])
        return parser
    parser.add_argument("images", metavar="IMAGES", nargs="?", default="", help="a folder instead of the run's own")
    parser.add_argument("--drawn", type=whole_number(1, 64), default=4, help="images drawn")
    parser.add_argument("--measure", type=whole_number(1, 10_000), default=256, help="images measured")
    parser.add_argument("--moments", type=whole_number(1, 64), default=1, help="checkpoints of the run, side by side")
    parser.add_argument("--masks", type=Path, metavar="FOLDER", help="PNG files of the objects, named as the images")
    parser.add_settings(presets=presets())
    return parser
