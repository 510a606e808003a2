"""`ccmim embed`: features of a folder's images."""

from pathlib import Path

from ccmim_fast.config.parser import Parser
from ccmim_fast.errors import ConfigError, say

SUFFIXES = (".npy", ".arrow")
_HELP = """
Write the features of images, in the order of their index. FILE.npy holds float32 [N, D], and FILE.jsonl beside it the
name and class of each row (-1: none); FILE.arrow holds columns name, label (where the images have classes) and
features. Images are shown whole, resized to the run's size. One that does not decode is counted and has no row.
"""


def embed(argv: list[str]) -> None:
    """Write the features, and print how many there are."""
    parser = Parser("ccmim embed", _HELP)
    parser.add_argument("run", metavar="RUN", help="a run's folder, or one of its checkpoints")
    parser.add_argument("folder", metavar="FOLDER", help="folder of images, of tars or of tables; see ccmim data")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help=f"ends in {' or '.join(SUFFIXES)}")
    parser.add_argument("--pool", choices=["avg", "cls"], default="avg", help="mean over the patches, or [CLS]")
    parser.add_how()
    given = parser.parse_args(argv)
    if given.out.suffix not in SUFFIXES:
        raise ConfigError(f"--out={str(given.out)!r:.200}: must end in {' or '.join(SUFFIXES)}")
    from ccmim_fast.export.embed import embed_folder
    from ccmim_fast.export.image_batches import left_out_words

    made = embed_folder(**vars(given))
    say(f"{given.out}: {made.images} x {made.width}{left_out_words(made.left_out, made.reason)}")
