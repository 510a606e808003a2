"""`ccmim import`: published weights as a checkpoint of ours."""

import argparse

from ccmim_fast.config.parser import Parser
from ccmim_fast.errors import ConfigError

_USAGE = "ccmim import FILE --arch NAME --out OUT [settings]"
_HELP = """
Make a checkpoint of published weights. FILE: MAE's or the authors' ccMIM .pth; timm's .pth or .safetensors of an
encoder; our own .safetensors; or timm:ARCH.TAG, which timm downloads. OUT: a new run folder, for ccmim export, embed,
and pretrain --run.resume OUT/checkpoints/step_00000000; or a .safetensors in our names. Sizes are read off the weights;
the other settings are those of ccmim pretrain. What is missing in FILE or unexpected is an error, but for a whole
decoder or head, which starts anew.
"""


def import_weights(argv: list[str]) -> None:
    """Make the checkpoint, and print its path and what starts anew."""
    given, settings = read_options(argv)
    from ccmim_fast.export import imported

    path, new = imported.import_weights(given.file, given.arch, given.out, settings)
    print(f"{path}; not in the file, starts anew: {', '.join(new)}" if new else path)


def read_options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the command's own options, and the settings."""
    parser = Parser("ccmim import", _HELP, usage=_USAGE)
    parser.add_argument("--arch", metavar="NAME", default="", help="timm's name; not needed where FILE tells it")
    parser.add_argument("--out", metavar="OUT", required=True, help="a new run folder, or a .safetensors")
    file = argv[0] if argv and not argv[0].startswith("-") else None
    given, settings = parser.parse_known_args(argv if file is None else argv[1:])
    if file is None:
        raise ConfigError(f"ccmim import: the file is missing; {_USAGE}")
    given.file = file
    return given, settings
