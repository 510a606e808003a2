"""`ccmim predict`: the classes of a folder's images."""

from pathlib import Path

from ccmim_fast.config.parser import Parser, whole_number
from ccmim_fast.errors import ConfigError, say

SUFFIXES = (".csv", ".tsv", ".parquet", ".jsonl")
_HELP = """
Name the class of each image by a classifier that ccmim eval finetune, transfer or linear has trained. FILE has a row an
image, in the order of their index: name, label (the folder's own class, where the images have classes), class,
probability, then class_2, probability_2 and so on. Images are shown as in the test of the evaluation. One that does not
decode is counted and has no row.
"""


def predict(argv: list[str]) -> None:
    """Write the table, and print how many rows there are and how many are right."""
    given = parser().parse_args(argv)
    if given.out.suffix not in SUFFIXES:
        raise ConfigError(f"--out={str(given.out)!r:.200}: must end in {', '.join(SUFFIXES)}")
    from ccmim_fast.export.image_batches import left_out_words
    from ccmim_fast.export.predict import predict_folder

    made = predict_folder(**vars(given))
    right = f", {made.right} of {made.known} right ({made.right / made.known:.2%})" if made.known else ""
    if unknown := made.labelled - made.known:
        right += f", {unknown} of classes that the classifier has not"
    say(f"{given.out}: {made.images} images, {made.classes} classes{right}{left_out_words(made.left_out, made.reason)}")


def parser() -> Parser:
    """Return the parser of the command's options."""
    parser = Parser("ccmim predict", _HELP)
    parser.add_argument("run", metavar="RUN", help="the folder of such an evaluation, or what ccmim export made of it")
    parser.add_argument("folder", metavar="FOLDER", help="folder of images, of tars or of tables; see ccmim data")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help=f"ends in {', '.join(SUFFIXES)}")
    parser.add_argument("--top", type=whole_number(1), default=5, help="classes named for an image, of as many as are")
    parser.add_how()
    return parser
