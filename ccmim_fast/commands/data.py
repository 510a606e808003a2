"""The commands `ccmim data index | verify | shard | stats | bench`."""

import argparse
import sys
from collections.abc import Callable

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ccmim_fast.config.parser import Parser
from ccmim_fast.data.index.indexed import IndexedSource, open_images
from ccmim_fast.data.progress import progress_bar
from ccmim_fast.errors import ConfigError

_SHOWN = 20  # bad samples listed by name, kinds of reasons
_INTERRUPTED = 130  # as a shell has it for Ctrl-C
_NO_LIMIT = 2**63
_RANGES = {
    "workers": (0, _NO_LIMIT),
    "images": (1, _NO_LIMIT),
    "batch": (1, _NO_LIMIT),
    "image_size": (1, _NO_LIMIT),
    "side": (0, _NO_LIMIT),
    "channels": (1, _NO_LIMIT),
    "quality": (1, 100),
    "shard_bytes": (1, _NO_LIMIT),
    "seed": (0, 2**32 - 1),
}


def index(argv: list[str]) -> None:
    """`ccmim data index ROOT`: make the index of a set of images, or bring it up to date."""
    given = _parser("index", index).parse_args(argv)
    source = _open(given, rescan=True)
    _print_summary(source, _SHOWN)
    print(f"index: {source.index.path!r}")


def verify(argv: list[str]) -> None:
    """`ccmim data verify ROOT`: decode every image whole, mark in the index what fails, and list it."""
    from ccmim_fast.data.verify import verify as run

    parser = _parser("verify", verify)
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: one per core")
    parser.add_argument("--again", action="store_true", help="those too that were decoded before, or failed")
    given = parser.parse_args(argv)
    source = _open(given)
    try:
        with progress_bar("decoding") as report:
            run(source.index, given.workers, given.again, report)
    except KeyboardInterrupt:
        print("ccmim: stopped; the same command goes on", file=sys.stderr)
        raise SystemExit(_INTERRUPTED) from None
    source = _open(given)
    _print_summary(source, len(source))


def shard(argv: list[str]) -> None:
    """`ccmim data shard ROOT OUT`: gather the images in tars, with their index."""
    from ccmim_fast.data.shard import write_shards

    parser = _parser("shard", shard)
    parser.add_argument("out", help="a new folder")
    parser.add_argument("--side", type=int, default=0, help="shorter side of larger images, pixels; 0: as they are")
    parser.add_argument("--quality", type=int, default=90, help="of JPEG, where images are made smaller; default 90")
    parser.add_argument(
        "--shard-bytes", type=int, default=2**29, help="after which the next tar begins; default 512 MiB"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order in the tars")
    parser.add_argument("--workers", type=int, default=0, help="threads; 0: one per core")
    given = parser.parse_args(argv)
    source = _open(given)
    with progress_bar("writing") as report:
        made = write_shards(
            source,
            given.out,
            side=given.side,
            quality=given.quality,
            shard_bytes=given.shard_bytes,
            seed=given.seed,
            workers=given.workers,
            report=report,
        )
    tars = _count(len(made.index.containers), "tar")
    print(f"{_count(len(made.index), 'image')} in {tars}; train on them with --data.root={given.out!r}")
    _print_list(_named(source, made.left_out), "left out", len(source))


def stats(argv: list[str]) -> None:
    """`ccmim data stats ROOT`: mean and standard deviation of the pixels, as settings."""
    from ccmim_fast.data.stats import measure_stats

    parser = _parser("stats", stats)
    parser.add_argument("--images", type=int, default=10_000, help="drawn by a fixed key; default 10000")
    parser.add_argument("--workers", type=int, default=0, help="threads; 0: one per core")
    given = parser.parse_args(argv)
    found = measure_stats(_open(given), given.images, given.workers)
    print(f"of {_count(found.images, 'image')}:")
    for name, values in (("mean", found.mean_C), ("std", found.std_C)):
        # Quoted: brackets mean something to a shell.
        print(f"--data.{name}='[{','.join(f'{value:.4f}' for value in values)}]'")


def bench(argv: list[str]) -> None:
    """`ccmim data bench ROOT`: what reading, decoding, cropping and copying cost, and what bounds a run."""
    from ccmim_fast.data.throughput import measure_throughput

    parser = _parser("bench", bench)
    parser.add_argument("--image-size", type=int, default=224, help="pixels a side of the crops; default 224")
    parser.add_argument("--batch", type=int, default=64, help="images of a batch; default 64")
    parser.add_argument(
        "--images", type=int, default=512, help="by each loader, the same again to warm up; default 512"
    )
    parser.add_argument("--workers", type=int, default=0, help="threads; 0: one per core")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    given = parser.parse_args(argv)
    source = _open(given)
    rates = measure_throughput(source, given.image_size, given.batch, given.images, given.workers, given.device)
    for line in rates.lines():
        print(line)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "index": index,
    "verify": verify,
    "shard": shard,
    "stats": stats,
    "bench": bench,
}


def _parser(name: str, command: Callable) -> Parser:
    said = command.__doc__.partition(": ")[2]
    parser = Parser(f"ccmim data {name}", description=said[0].upper() + said[1:], allow_abbrev=False)
    parser.add_argument("root", help="folder of images, of tars or of tables; one of these, a pattern, a list, a URL")
    parser.add_argument("--channels", type=int, default=3, help="1: gray, 3: RGB (default), else uint8 .npy or TIFF")
    parser.add_argument("--index", default="", help="index file; default: beside the tars or in the cache folder")
    return parser


def _open(given: argparse.Namespace, rescan: bool = False) -> IndexedSource:
    for name, (least, most) in _RANGES.items():
        value = getattr(given, name, least)
        if not least <= value <= most:
            limit = f"at least {least}" if most == _NO_LIMIT else f"in {least}..{most}"
            raise ConfigError(f"--{name.replace('_', '-')}={value}: must be {limit}")
    return open_images(given.root, given.channels, given.index, quiet=False, rescan=rescan)


def _print_summary(source: IndexedSource, shown: int) -> None:
    from ccmim_fast.data.verify import summary

    found = summary(source.index)
    classes = f" of {_count(len(source.class_names), 'class', 'es')}" if source.class_names else ""
    print(f"{_count(found.samples, 'sample')}{classes}, {len(found.bad)} of them cannot be used")
    modes = sorted(found.modes.items(), key=lambda pair: -pair[1])
    _print_table("mode", [(name if name != "None" else "unknown", count) for name, count in modes])
    if found.bad:
        _print_table("reason", found.reasons.most_common(_SHOWN))
    _print_list(_named(source, found.bad), "cannot be used", shown)
    _print_list(source.index.notes, "not looked at", shown)


def _print_table(title: str, counts: list[tuple[str, int]]) -> None:
    table = Table(title, "samples")
    for name, count in counts:
        table.add_row(escape(name), str(count))
    Console().print(table)


def _named(source: IndexedSource, bad: list[tuple[int, str]]) -> list[tuple[str, str]]:
    """Names and reasons, the name once."""
    from ccmim_fast.data.verify import without_name

    return [(source.name(number), without_name(reason)) for number, reason in bad]


def _print_list(pairs: list[tuple[str, str]], title: str, shown: int) -> None:
    for path, reason in pairs[:shown]:
        print(f"{title}: {path!r}: {reason}")
    if len(pairs) > shown:
        print(f"{title}: {len(pairs) - shown} more; ccmim data verify lists all")


def _count(number: int, thing: str, ending: str = "s") -> str:
    return f"{number} {thing}{'' if number == 1 else ending}"
