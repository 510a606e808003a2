"""What changed between the configuration of a checkpoint and that of the run that goes on with it (fault 14)."""

from typing import NamedTuple

from ccmim_fast.config.load import difference
from ccmim_fast.config.schema import Config

# How a run is carried out and where: no result depends on it, but for rounding.
_FREE_SECTIONS = ("run", "watch", "fast")
_FREE = (
    *("data.root", "data.index", "data.on_error", "data.max_bad", "data.loader", "data.workers"),
    *("score.store", "score.device_gb", "score.host_gb", "score.shards"),
    *("train.device", "train.parallel", "train.kernels", "train.attention", "train.recompute"),
    *(
        "train.compile",
        "train.compile_mode",
        "train.cuda_graph",
        "train.find_batch",
        "train.max_steps",
        "train.profile",
    ),
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

    def __str__(self) -> str:
        return f"{self.key}: {self.before} -> {self.now}"


def changes(before: Config, now: Config) -> list[Change]:
    """The settings in which they differ, in the schema's order."""
    return [Change(key, old, new, _kind(key)) for key, old, new in difference(before, now)]


def _kind(key: str) -> str:
    if key in _SHAPES:
        return "shape"
    return "free" if key in _FREE or key.partition(".")[0] in _FREE_SECTIONS else "asked"
