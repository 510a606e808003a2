"""The types of settings: a Python type with a unit, and for a number the interval in which it lies."""

from typing import Annotated, Literal, NamedTuple

from ccmim_fast.registry import LOADERS


class Unit(NamedTuple):
    """The unit of a number or a text, and the interval of a number, such as "[0, 1)": a round bracket excludes."""

    name: str
    within: str = ""


def whole(unit: str, low: int = 1, high: int = 2**31 - 1) -> object:
    """Return the type of whole numbers; int32 is what the kernels' words (ccmim_kernels/philox.py) and sizes hold."""
    return Annotated[int, Unit(unit, f"[{low}, {high}]")]


def real(unit: str, within: str) -> object:
    """Return the type of numbers in an interval."""
    return Annotated[float, Unit(unit, within)]


Scheduled = float | tuple[float, float]  # one number, or from the first epoch to the last, in equal steps


def scheduled(unit: str, within: str) -> object:
    """Return the type of numbers in an interval that may change over a run."""
    return Annotated[Scheduled, Unit(unit, within)]


_WIDEST = 65536  # ten times the widest published ViT (ViT-22B: 6144)

Seed = whole("number", 0, 2**32 - 1)
Epochs, EpochsOr0 = whole("epochs"), whole("epochs", 0)
Steps, StepsOr0 = whole("optimizer steps"), whole("optimizer steps", 0)
Images, ImagesOr0 = whole("images"), whole("images", 0)
Blocks, BlocksOr0 = whole("blocks"), whole("blocks", 0)
Width, WidthOr0 = whole("channels", 4, _WIDEST), whole("channels", 0, _WIDEST)
Heads, HeadsOr0 = whole("heads", 1, _WIDEST), whole("heads", 0, _WIDEST)
Channels = whole("channels", 1, _WIDEST)
Side = whole("pixels", 2, _WIDEST)
Pixels = whole("pixels")
Patches, PatchesOr0 = whole("patches"), whole("patches", 0, _WIDEST)
Count = whole("number")
Threads = whole("threads", 0, 4096)
Classes = whole("classes", 2, 6)

Share, Part, Decay = real("share", "[0, 1]"), real("share", "(0, 1]"), real("share", "[0, 1)")
Mean = real("share of white", "[-1, 1]")  # below 0 in bands of signed numbers
Factor, Positive = real("factor", "[0, inf)"), real("factor", "(0, inf)")
ScheduledShare, ScheduledPositive = scheduled("share", "[0, 1]"), scheduled("factor", "(0, inf)")
Zoom, Scale = real("factor", "(0, 100]"), real("factor", "[0.1, 10]")
Milestone = real("share", "(0, 1)")
Rate = real("learning rate", "[0, inf)")
WarmUp = real("epochs", "[0, inf)")
Gigabytes = real("10^9 bytes", "[0, inf)")
Minutes = real("minutes", "(0, 100000)")  # up to two months

File, Folder, Name = (Annotated[str, Unit(name)] for name in ("path of a file", "path of a folder", "name"))

Loader = Literal[("auto", *LOADERS)]
OnError = Literal["skip", "error"]
Background = Literal["plain", "textured"]
CropRule = Literal["torchvision", "mae"]
Resample = Literal["antialias", "plain"]
Precision = Literal["auto", "fp32", "fp16", "bf16"]
Device = Literal["auto", "cpu", "cuda"]
Attention = Literal["auto", "sdpa", "plain", "flash", "cudnn", "efficient", "xformers"]
