"""`ccmim data index | verify | shard | stats | bench | idx | composite`: look after a set of images."""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ccmim_fast.commands import take_name
from ccmim_fast.config.parser import Parser, whole_number
from ccmim_fast.data.index.indexed import IndexedSource, open_images
from ccmim_fast.data.index.left_out import (
    MEANT,
    OTHER,
    Note,
    Notes,
    kind_of,
    left_out_lines,
    merged,
    note_lines,
    without_name,
)
from ccmim_fast.data.progress import progress_bar
from ccmim_fast.data.verify import summary, verify
from ccmim_fast.errors import printable
from ccmim_fast.runs.output import new_folder

NAMES = {
    "index": "make the index of a set of images, or bring it up to date",
    "verify": "decode every image whole, mark in the index what fails, and list it",
    "shard": "gather the images in tars, with their index",
    "stats": "measure mean and standard deviation of the pixels, printed as settings",
    "bench": "measure what reading, decoding, cropping and copying cost, and what bounds a run",
    "idx": "write the images of IDX files, as MNIST's, as a table that a run reads",
    "composite": "paste cut-outs on backgrounds: images whose objects are known to the pixel",
}
_SHOWN = 20  # bad samples listed by name, kinds of reasons
_MOST = 1_000_000  # composites
_INTERRUPTED = 130  # the exit code that a shell has for Ctrl-C


def data(argv: list[str]) -> None:
    """Run one of `NAMES` on a set of images."""
    name, rest = take_name("ccmim data", "command", NAMES, argv, "ROOT [options]")
    parser = Parser(f"ccmim data {name}", NAMES[name][0].upper() + NAMES[name][1:] + ".")
    if name in ("idx", "composite"):
        return {"idx": _idx, "composite": _composite}[name](parser, rest)
    parser.add_argument("root", help="folder of images, of tars or of tables; one of these, a pattern, a list, a URL")
    _number(parser, "--channels", 3, "1: gray, 3: RGB, else of .npy or TIFF files")
    parser.add_argument("--index", default="", help="index file; if not given: beside the tars or in the cache folder")
    parser.add_argument("--image-key", default="", help="which member of a sample is its image, as jpg or jpg;png")
    if name != "index":
        _number(parser, "--workers", 0, "threads or processes; 0: one per core", least=0)
    {"index": _index, "verify": _verify, "shard": _shard, "stats": _stats, "bench": _bench}[name](parser, rest)


def _index(parser: Parser, argv: list[str]) -> None:
    source = _open(parser.parse_args(argv), rescan=True, quiet=True)
    _print_summary(source)
    print(f"index: {source.index.path!r}")


def _verify(parser: Parser, argv: list[str]) -> None:
    parser.add_argument("--again", action="store_true", help="also decode images that were decoded before, or failed")
    given = parser.parse_args(argv)
    source = _open(given, quiet=True)
    try:
        with progress_bar("decoding") as report:
            verify(source.index, given.workers, given.again, report, source.origin)
    except KeyboardInterrupt:
        print("ccmim: stopped; the same command goes on", file=sys.stderr)
        raise SystemExit(_INTERRUPTED) from None
    _print_summary(_open(given, quiet=True), shown=None)


def _shard(parser: Parser, argv: list[str]) -> None:
    parser.add_argument("out", help="a new folder")
    _number(parser, "--side", 0, "shorter side of larger images, pixels; 0: as they are", least=0)
    _number(parser, "--quality", 90, "of JPEG, where images are made smaller", most=100)
    _number(parser, "--shard-bytes", 2**29, "bytes after which the next tar begins")
    _number(parser, "--seed", 0, "seed of the order in the tars", least=0, most=2**32 - 1)
    given = parser.parse_args(argv)
    from ccmim_fast.data.shard import write_shards

    source = _open(given)
    options = {name: getattr(given, name) for name in ("side", "quality", "shard_bytes", "seed", "workers")}
    with new_folder(Path(given.out), "ccmim data shard") as partial, progress_bar("writing") as report:
        index, left_out = write_shards(source, str(partial), report=report, **options)
    tars = _count(len(index.containers), "tar")
    print(f"{_count(len(index), 'image')} in {tars}; train on them with --data.root={given.out!r}")
    _print_list(_named(source, left_out), "left out", shown=None)


def _idx(parser: Parser, argv: list[str]) -> None:
    parser.add_argument("images", help="IDX file of images, or one compressed by gzip: train-images-idx3-ubyte.gz")
    parser.add_argument("out", help="a new file NAME.parquet")
    parser.add_argument("--labels", default="", help="IDX file of their classes: train-labels-idx1-ubyte.gz")
    given = parser.parse_args(argv)
    from ccmim_fast.data.idx import write_table

    if not given.out.lower().endswith(".parquet"):
        parser.error(f"OUT={given.out!r} must end in .parquet")
    count = write_table(given.images, given.labels, given.out)
    print(f"{_count(count, 'image')}; train on them with --data.root={given.out!r}")


def _composite(parser: Parser, argv: list[str]) -> None:
    parser.add_argument("cutouts", help="images with an alpha channel, a folder for each class, or without classes")
    parser.add_argument("backgrounds", help="images of any kind")
    parser.add_argument("--out", required=True, help="a new folder")
    _number(parser, "--samples", 1000, "images to train on", most=_MOST)
    _number(parser, "--test", 0, "images to test on, of pictures held out for them", 0, _MOST)
    held = "share of the pictures that --test takes; 0: it shows those of training, otherwise composed"
    parser.add_argument("--held-out", type=_share_or_none, default=0.25, help=held)
    size = {"type": whole_number(8, 4096), "nargs": "+", "metavar": "PIXELS"}
    parser.add_argument("--image-size", **size, default=[64], help="height and width, or one number for both")
    scale = {"type": _share, "nargs": 2, "metavar": ("MIN", "MAX"), "default": [0.4, 0.8]}
    parser.add_argument("--scale", **scale, help="longer side of an object, as a share of the image's shorter side")
    parser.add_argument("--no-flip", action="store_true", help="do not mirror half of the objects")
    parser.add_argument("--classes", nargs="+", metavar="NAME", default=[], help="the only classes that are used")
    parser.add_argument("--without", nargs="+", metavar="NAME", default=[], help="classes that are not used")
    _number(parser, "--seed", 0, "seed of all that is drawn", least=0, most=2**32 - 1)
    _number(parser, "--workers", 0, "threads; 0: one per core", least=0)
    given = parser.parse_args(argv)
    from ccmim_fast.data.composite import PARTS, Composer, Style

    if len(given.image_size) > 2:
        parser.error(f"--image-size: {len(given.image_size)} numbers; write HEIGHT WIDTH, or one number for both")
    if given.scale[0] > given.scale[1]:
        parser.error(f"--scale: {given.scale[0]} is more than {given.scale[1]}; write the smaller one first")
    style = Style(given.seed, (given.image_size * 2)[:2], given.scale, not given.no_flip)
    with new_folder(Path(given.out), "ccmim data composite") as partial, progress_bar("writing") as report:
        sources = [open_images(root, 3, quiet=True) for root in (given.cutouts, given.backgrounds)]
        composer = Composer(*sources, style, given.classes, given.without, given.workers)
        parts = composer.parts(given.held_out if given.test else 0)
        for note in composer.left_out():
            print(*note_lines([note]), file=sys.stderr)
        samples = {part: count for part, count in zip(PARTS, (given.samples, given.test)) if count}
        for part, count in samples.items():
            composer.write(partial, part, parts[part], count, report)
    for part, count in samples.items():
        cutouts, backgrounds = sum(map(len, parts[part].cutouts)), len(parts[part].backgrounds)
        classes = f" of {_count(len(composer.class_names), 'class', 'es')}" if composer.class_names else ""
        made = f"{_count(cutouts, 'cut-out')} and {_count(backgrounds, 'background')}"
        print(f"{part}: {_count(count, 'image')}{classes}, made of {made}")
    print(f"train on them with --data.root={str(Path(given.out, PARTS[0]))!r}")


def _share(text: str) -> float:
    """Read a number above 0, up to 1."""
    try:
        if 0 < float(text) <= 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r:.40} must be a number above 0, up to 1")


def _share_or_none(text: str) -> float:
    return 0.0 if text.strip() in ("0", "0.0") else _share(text)


def _stats(parser: Parser, argv: list[str]) -> None:
    _number(parser, "--images", 10_000, "images measured, drawn by a fixed key")
    given = parser.parse_args(argv)
    from ccmim_fast.data.stats import find_range, measure_stats

    source = _open(given)
    settings = {}
    if (better := find_range(source)) is not None:
        print(better.words().partition(":")[0], "now")
        settings["max_value"] = source.max_value = better.max_value
    found = measure_stats(source, given.images, given.workers)
    notes = Notes()
    for number, reason in found.failed:
        notes.add(source.name(number), kind_of(reason))
    for line in note_lines(merged(notes)):
        print(line, file=sys.stderr)
    print(f"of {_count(found.images, 'image')}:")
    # A channel of one value has no deviation; it is divided by one.
    settings |= {"mean": found.mean_C, "std": tuple(value or 1.0 for value in found.std_C)}
    for name, values in settings.items():
        # Quoted: brackets mean something to a shell.
        print(f"--data.{name}='[{','.join(_digits(value) for value in values)}]'")


def _bench(parser: Parser, argv: list[str]) -> None:
    _number(parser, "--image-size", 224, "pixels a side of the crops")
    _number(parser, "--batch", 64, "images of a batch")
    _number(parser, "--images", 512, "images by each loader, and as many to warm up")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where batches are copied to")
    given = parser.parse_args(argv)
    from ccmim_fast.data.throughput import measure_throughput

    source = _open(given)
    rates = measure_throughput(source, given.image_size, given.batch, given.images, given.workers, given.device)
    print("\n".join(rates.lines()))


def _number(parser: Parser, option: str, default: int, text: str, least: int = 1, most: int | None = None) -> None:
    parser.add_argument(option, type=whole_number(least, most), default=default, help=text)


def _open(given: argparse.Namespace, rescan: bool = False, quiet: bool = False) -> IndexedSource:
    """Open the images and, unless `quiet`, tell first what is left out."""
    source = open_images(given.root, given.channels, given.index, False, rescan, given.image_key)
    for line in [] if quiet else left_out_lines(source):
        print(line, file=sys.stderr)
    return source


def _print_summary(source: IndexedSource, shown: int | None = _SHOWN) -> None:
    found = summary(source.index)
    classes = f" of {_count(len(source.class_names), 'class', 'es')}" if source.class_names else ""
    print(f"{_count(found.samples, 'sample')}{classes}, {len(found.bad)} of them cannot be used")
    unlabelled = 0 if source.labels_N is None else int((source.labels_N < 0).sum())
    if unlabelled:
        print(f"{unlabelled} of them have no class: pretraining uses them, an evaluation leaves them out")
    _print_table("mode", [(name.replace("None", "unknown"), count) for name, count in found.modes.most_common()])
    if found.bad:
        _print_table("reason", found.reasons.most_common(_SHOWN))
    _print_list(_named(source, found.bad), "cannot be used", shown)
    for note in merged(source.index.notes):
        _print_note(note)


def _print_table(title: str, counts: list[tuple[str, int]]) -> None:
    table = Table(title, "samples")
    for name, count in counts:
        table.add_row(escape(printable(name)), str(count))
    Console().print(table)


def _named(source: IndexedSource, bad: list[tuple[int, str]]) -> list[tuple[str, str]]:
    """Return the name and the reason of each bad sample; the name is taken out of the reason."""
    return [(source.name(number), without_name(reason)) for number, reason in bad]


def _print_list(pairs: list[tuple[str, str]], title: str, shown: int | None) -> None:
    for path, reason in pairs[:shown]:
        print(f"{title}: {path!r}: {printable(reason)}")
    if shown is not None and len(pairs) > shown:
        print(f"{title}: {len(pairs) - shown} more; ccmim data verify lists all")


def _print_note(note: Note) -> None:
    """Print what is left out for one reason: the count, and as many names as the index keeps of it."""
    counted = f"{note.count:,} not taken" if note.kind in (MEANT, OTHER) else f"{note.count:,} left out"
    print(f"{counted}: {printable(note.reason)}")
    shown = note.paths[: 1 if note.kind == OTHER else _SHOWN]
    for path in shown:
        print(f"  {path!r}")
    if note.count > len(shown):
        print(f"  and {note.count - len(shown):,} more")


def _digits(number: float) -> str:
    """Return four decimals, or of a small or large number the digits that it takes."""
    return f"{number:.4f}" if 0.01 <= abs(number) < 10 or not number else f"{number:.6g}"


def _count(number: int, thing: str, ending: str = "s") -> str:
    return f"{number} {thing}{'' if number == 1 else ending}"
