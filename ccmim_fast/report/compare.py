"""This file makes the page that compares run folders, whatever state they are in."""

import os
from collections.abc import Sequence
from pathlib import Path

from ccmim_fast.errors import ConfigError, as_text
from ccmim_fast.runs.listing import COLUMNS, CONFIG, METRICS, describe
from ccmim_fast.runs.state import FILE

_NAMED = 5  # runs that a message names


def compare_runs(
    runs: Sequence[Path], out: Path, *, title: str, images: int, moments: int, data: str
) -> tuple[int, list[str]]:
    """Write one offline HTML page that compares runs with the first of them; nothing in a run changes.

    The arguments are those of `ccmim report --help`. Returns the number of runs, and a line for each part that cannot
    be shown. Raises ConfigError: a folder holds no run, or `out` is a folder.
    """
    folders = [_run(path) for path in {path.resolve(): path for path in runs}.values()]
    if out.is_dir():
        raise ConfigError(f"--out={out}: is a folder; write --out={out / 'report.html'}")
    if os.path.lexists(out) and not _is_page(out):
        raise ConfigError(f"--out={out}: exists and is no page of ccmim report; remove it, or name another file")
    # Behind the checks: torch and matplotlib take seconds to import.
    from ccmim_fast.report.html import write_report
    from ccmim_fast.report.runs import Comparison, RunView
    from ccmim_fast.report.snapshots import take_snapshots

    names = names_of(folders)
    rows, snapshots, remarks = [], [], []
    for name, folder in zip(names, folders):
        row = describe(folder, folder.parent)
        rows.append((name, [*row.cells[1:], row.error or ("" if any(row.cells[3:7]) else "no metrics yet")]))
        has_pictures = any((folder / "snapshots").glob("epoch_*.npz"))
        taken, told = take_snapshots(folder, images, 0 if has_pictures or not images else moments, data)
        snapshots.append(taken)
        remarks += told
    title = title or ("Run " if len(names) == 1 else "Runs ") + ", ".join(names)
    standing = Comparison([*COLUMNS[1:], "remark"], rows)
    write_report(out, title, [RunView(*run) for run in zip(names, folders)], {}, standing, snapshots, remarks)
    return len(folders), remarks


def _run(folder: Path) -> Path:
    """Return a run's folder; raises ConfigError, naming the runs right below it, for another."""
    if _is_run(folder):
        return folder
    there = "holds no run" if folder.is_dir() else "no such folder"
    below = [str(path) for path in sorted(folder.glob("*")) if _is_run(path)] if folder.is_dir() else []
    nearest = f"below it are {' '.join(below[:_NAMED])}" if below else "ccmim runs lists those there are"
    raise ConfigError(f"ccmim report: {str(folder)!r:.80}: {there}; {nearest}")


def _is_page(path: Path) -> bool:
    """Return whether a file is a page of ours, by its beginning: another one takes its place."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return b"""content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">""" in file.read(400)


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (CONFIG, METRICS, FILE))


def names_of(folders: Sequence[Path]) -> list[str]:
    """Name each run by its folder, or by its path below what all have in common where two have one name."""
    whole = [folder.resolve() for folder in folders]
    if len({path.name for path in whole}) < len(whole):
        top = os.path.commonpath(whole)
        names = [os.path.relpath(path, top) for path in whole]
    else:
        names = [path.name for path in whole]
    return [as_text(name) for name in names]
