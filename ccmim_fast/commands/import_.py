"""`ccmim import`: published weights as a checkpoint of ours."""

from ccmim_fast.config.load import presets
from ccmim_fast.config.parser import Parser, words
from ccmim_fast.errors import say

_HELP = """
Make a checkpoint of published weights. FILE: a .pth or .safetensors of MAE, the authors' ccMIM, timm, DINO, DINOv2,
MoCo v3 or our own; a file or folder of transformers (ViT, ViTMAE, DeiT, DINOv2); or timm:ARCH.TAG, to download. OUT: a
new run folder, for ccmim export, embed, and pretrain --run.resume OUT/checkpoints/step_00000000; or a
.safetensors in our names. Sizes are read off the weights; the other settings are those of ccmim pretrain. What is
missing in FILE or unexpected is an error, but for a whole decoder or head, which starts anew.
"""


def import_weights(argv: list[str]) -> None:
    """Make the checkpoint, and print its path and what starts anew."""
    given = parser().parse_args(argv)
    from ccmim_fast.export import imported

    path, new = imported.import_weights(given.file, given.arch, given.out, words(given.settings), given.resample)
    say(f"{path}; not in the file, starts anew: {', '.join(new)}" if new else str(path))


def parser() -> Parser:
    """Return the parser of the command's own options, and of the settings."""
    parser = Parser("ccmim import", _HELP)
    parser.add_argument("file", metavar="FILE", help="the published weights, a file or folder, or timm:ARCH.TAG")
    parser.add_argument("--arch", metavar="NAME", default="", help="timm's name; not needed where FILE tells it")
    parser.add_argument("--out", metavar="OUT", required=True, help="a new run folder, or a .safetensors")
    of_positions = "learned positions of another data.image_size: bicubic, with timm's filter or, as MAE, without"
    parser.add_argument("--resample", choices=("antialias", "plain"), default="antialias", help=of_positions)
    parser.add_settings(presets=presets())
    return parser
