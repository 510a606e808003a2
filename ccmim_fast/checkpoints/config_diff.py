"""What changed between the configuration of a checkpoint and that of the run that goes on with it (fault 14)."""

from typing import NamedTuple

from ccmim_fast.config.keys import show
from ccmim_fast.config.load import difference
from ccmim_fast.config.schema import Config

# How a run is carried out and where: no result depends on it, but for rounding.
_FREE_SECTIONS = ("run", "watch", "fast")
_FREE = (
    *("data.root", "data.test", "data.index", "data.on_error", "data.max_bad", "data.loader", "data.workers"),
    *("score.store", "score.device_gb", "score.host_gb", "score.shards"),
    *("train.device", "train.parallel", "train.kernels", "train.attention", "train.recompute"),
    *("train.compile", "train.compile_mode", "train.cuda_graph", "train.find_batch"),
    *("train.max_steps", "train.profile"),
)
# The weights, the optimizer's state or the maps have other shapes.
_SHAPES = (
    *("data.image_size", "data.channels", "model.arch", "model.patch_size", "model.embed_dim", "model.depth"),
    *("model.num_heads", "score.grid", "decoder.depth", "decoder.dim", "decoder.num_heads", "target.kind"),
    *("target.hog_bins", "target.hog_cell", "heads.dim", "contrast.loss", "optim.name"),
)


class Change(NamedTuple):
    """One setting. `kind`: `free`, `shape` (refused), or `asked` (the run becomes another one: it must be allowed)."""

    key: str
    before: object
    now: object
    kind: str


_WORDS = {"free": "", "shape": "another model", "asked": "needs --allow-change"}


def changes(before: Config, now: Config) -> list[Change]:
    """The settings in which they differ, in the schema's order."""
    return [Change(key, old, new, _kind(key)) for key, old, new in difference(before, now)]


def table(found: list[Change]) -> list[str]:
    """The changes, one a line under a head; those of the run's own folder and logging are left out. None: no line."""
    rows = [(c.key, show(c.before), show(c.now), _WORDS[c.kind]) for c in found if not c.key.startswith("run.")]
    if not rows:
        return []
    rows.insert(0, ("changed since the checkpoint", "then", "now", ""))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _kind(key: str) -> str:
    if key in _SHAPES:
        return "shape"
    return "free" if key in _FREE or key.partition(".")[0] in _FREE_SECTIONS else "asked"
