"""These are the files that a run writes into its folder: all that `--overwrite` ever removes. Imports no torch."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from ccmim_fast.checkpoints.manifest import CHECKPOINTS, MANIFEST, STATE, checkpoints, read_manifest, step_of
from ccmim_fast.errors import CheckpointError
from ccmim_fast.runs.claim import LOCK, holder_of
from ccmim_fast.runs.state import CONFIG, ENVIRONMENT, FILE, METRICS, read_state

RANKS = "ranks"  # the folder of heartbeats
# What says how a run was started, and is of no worth without what the run made.
_ABOUT = (CONFIG, ENVIRONMENT, FILE, "log.txt", "autotune.json", f".{FILE}.new", f".{METRICS}.new", "scores_*.bin")
_ABOUT += (f"{RANKS}/rank_*", f"{RANKS}/.rank_*.new", f"{RANKS}/stopped_*", f"{CHECKPOINTS}/.lock")
_CHECKPOINT = tuple(
    f"{CHECKPOINTS}/{hidden}step_*/{name}"
    for hidden in ("", ".new_", ".old_", ".dead_")
    for name in (STATE, MANIFEST, "kept", ".metadata", "*.distcp")
)
_RESULTS = (METRICS, "tensorboard/events.out.tfevents.*", "captures/step_*_rank_*.pt", "snapshots/epoch_*.npz")
_RESULTS += ("profile/trace.json.gz", "profile/table.json", "profile/table.md")
_RESULTS += ("result.json", "result.md", "masks.png", "moments.png", "summary.json", *_CHECKPOINT)
WRITTEN = (*_ABOUT, *_RESULTS)  # patterns of paths in the folder; `*` stands for a part of one name


def written_in(folder: Path, also: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield the files in `folder` that bear the name of a run's file, or one of the patterns `also`.

    Raises UnreadableError where nobody can tell which checkpoints there are.
    """
    checkpoints(folder / CHECKPOINTS)
    return _found(folder, (*WRITTEN, *also))


def holds_results(folder: Path) -> bool:
    """Return whether a run's folder holds more than words on how the run was started."""
    return any(path.name != METRICS or path.lstat().st_size for path in _found(folder, _RESULTS))


def is_run(folder: Path) -> bool:
    """Return whether a command of ours wrote in `folder`, as its files tell: names alone are anybody's."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        facts = json.loads((folder / ENVIRONMENT).read_bytes())
        if isinstance(facts, dict) and "ccmim_fast" in facts:
            return True
    if others_in(folder) == [RANKS]:  # by a rank that ended later than the first
        return True
    return read_state(folder) is not None or holder_of(folder) is not None or _holds_checkpoint(folder)


def others_in(folder: Path, known: tuple[str, ...] = ()) -> list[str]:
    """Return the names in `folder`, sorted, but for that of the lock and for patterns that are `known`."""
    return sorted(path.name for path in folder.iterdir() if not any(path.match(one) for one in (LOCK, *known)))


def _holds_checkpoint(folder: Path) -> bool:
    for path in checkpoints(folder / CHECKPOINTS):
        with contextlib.suppress(OSError, CheckpointError):
            return bool(read_manifest(path, step_of(path)))
    return False


def _found(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    for pattern in patterns:
        yield from (path for path in folder.glob(pattern) if path.is_file() or path.is_symlink())
