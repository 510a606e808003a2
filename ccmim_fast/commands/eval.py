"""`ccmim eval`: a checkpoint measured by a published protocol; or its scores and masks, drawn."""

from ccmim_fast.commands import take_name
from ccmim_fast.config.evaluation import EvalConfig
from ccmim_fast.config.load import presets
from ccmim_fast.config.parser import Parser
from ccmim_fast.evaluation.registry import EVALUATIONS

_HELP = """
CHECKPOINT is the folder of a run or of one of its checkpoints, a .safetensors or .pth file, or timm:NAME. Writes
result.json and result.md into run.dir; if that is not given, below the run's folder.
"""


def evaluate(argv: list[str]) -> None:
    """Carry out one of `EVALUATIONS`, or `masks`, and print the figures."""
    names = {name: evaluation.help for name, evaluation in EVALUATIONS.items()}
    names["masks"] = "scores and masks, drawn and measured"
    name, rest = take_name("ccmim eval", "evaluation", names, argv, "CHECKPOINT [settings]")
    if name == "masks":
        from ccmim_fast.evaluation.masks.command import masks

        masks(rest)
        return
    given = parser_of(name).parse_args(rest)
    from ccmim_fast.evaluation import run

    if result := run.evaluate(name, given.checkpoint, given.settings):
        print(result)


def parser_of(name: str) -> Parser:
    """Return the parser of an evaluation's settings."""
    parser = Parser(f"ccmim eval {name}", f"A checkpoint measured by {EVALUATIONS[name].help}. {_HELP}")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="what is measured")
    parser.add_settings(EvalConfig, [preset for preset in presets("eval") if preset.startswith(name)])
    return parser
