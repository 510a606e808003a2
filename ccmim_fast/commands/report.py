"""`ccmim report`: runs side by side in one HTML file, finished or not."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from ccmim_fast.config.parser import Parser
from ccmim_fast.errors import ConfigError
from ccmim_fast.runs.listing import COLUMNS, CONFIG, METRICS, describe
from ccmim_fast.runs.state import FILE

_SIGNS = (CONFIG, METRICS, FILE)  # a folder with one of them is a run's
_NAMED = 5  # runs that a message names


def report(argv: list[str]) -> Path:
    """`ccmim report RUN [RUN ...] [--out report.html]`: one offline HTML page that compares runs.

    Losses, throughput and the other figures of metrics.jsonl as curves; scores, masks and reconstructions of a few of
    the run's images by each of its checkpoints; evaluations (eval/*/result.json, by ccmim eval); settings other than
    the first run's and than the defaults; environments. Runs may be going on, stopped or damaged: the page says so.
    Nothing in a run changes. The page needs no network, no script and no other file.
    """
    given = _parser().parse_args(argv)
    folders = [_run(path) for path in {path.resolve(): path for path in given.runs}.values()]
    if given.out.is_dir():
        raise ConfigError(f"--out={given.out}: is a folder; write --out={given.out / 'report.html'}")
    # Behind the checks: torch and matplotlib take seconds to import.
    from ccmim_fast.report import RunView, write_report
    from ccmim_fast.report.runs import Comparison
    from ccmim_fast.report.snapshots import take_snapshots

    names = names_of(folders)
    rows = [(name, describe(folder, folder.parent)) for name, folder in zip(names, folders)]
    standing = Comparison(
        [*COLUMNS[1:], "remark"],
        [
            (name, [*row.cells[1:], row.error or ("" if any(row.cells[3:7]) else "no metrics yet")])
            for name, row in rows
        ],
    )
    kept = [any((folder / "snapshots").glob("epoch_*.npz")) for folder in folders]
    images = [0 if has else given.images for has in kept]
    root = "" if given.data is None else str(given.data)
    snapshots = [
        take_snapshots(folder, count, given.moments if count else 0, root) for folder, count in zip(folders, images)
    ]
    title = given.title or ("Run " if len(names) == 1 else "Runs ") + ", ".join(names)
    write_report(given.out, title, [RunView(*run) for run in zip(names, folders)], {}, standing, snapshots)
    print(f"{given.out}: {len(folders)} run{'s' * (len(folders) > 1)}, {given.out.stat().st_size / 1e6:.1f} MB")
    for remark in (remark for of_run in snapshots for remark in of_run.remarks):
        print(remark)
    return given.out


def _run(folder: Path) -> Path:
    """Returns a run's folder. Raises ConfigError, naming the runs right below it, for another."""
    if _is_run(folder):
        return folder
    there = "holds no run" if folder.is_dir() else "no such folder"
    below = [str(path) for path in sorted(folder.glob("*")) if _is_run(path)] if folder.is_dir() else []
    nearest = f"below it are {' '.join(below[:_NAMED])}" if below else "ccmim runs lists those there are"
    raise ConfigError(f"ccmim report: {str(folder)!r:.80}: {there}; {nearest}")


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _SIGNS)


def names_of(folders: Sequence[Path]) -> list[str]:
    """What the page calls each: its name, or its path below what all have in common where two have one name."""
    whole = [folder.resolve() for folder in folders]
    if len({path.name for path in whole}) < len(whole):
        top = os.path.commonpath(whole)
        names = [os.path.relpath(path, top) for path in whole]
    else:
        names = [path.name for path in whole]
    # Names of files may be bytes that are no text, which no page holds.
    return [name.encode(errors="replace").decode() for name in names]


def _parser() -> argparse.ArgumentParser:
    text = report.__doc__.replace("`", "")
    parser = Parser("ccmim report", description=text, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run; the first is compared with")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="default report.html")
    parser.add_argument("--title", help="default: the runs' names")
    parser.add_argument("--images", type=_count, default=4, help="images drawn; default 4")
    parser.add_argument("--moments", type=_count, default=5, help="checkpoints drawn; default 5; 0: no pictures")
    parser.add_argument("--data", type=Path, metavar="ROOT", help="images to draw, where the run's own are not here")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or not text.isascii() or not int(text) <= 64:
        raise argparse.ArgumentTypeError(f"{text!r:.20} must be a whole number, 0..64")
    return int(text)
