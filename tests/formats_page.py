"""docs/formats.md is what this program prints: `make formats`. Each row was measured on a file that it made.

The pixels that a loader gives are compared with the array that was written, at full size, without a crop.
"""

# N files, H height, W width, C channels

import sys
import tempfile
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from made_formats import ALL, HEIGHT, WIDTH, Made

from ccmim_fast.config.schema import DataConfig
from ccmim_fast.data.build import build_loader
from ccmim_fast.data.index.indexed import IndexedSource, open_images
from ccmim_fast.data.stream import dali_loader
from ccmim_fast.errors import ConfigError, DataError

HEAD = """# Formats

Each row of this page was measured: the pixels that a loader gives were compared with the array that a file was made
of. `make formats` writes the page anew, and a test holds it. What to set is in [data.md](data.md).

- *right*: the pixels are those that were written, to half a level of 255 in the mean, or to 2 levels where the format
  is lossy. Images of more than 8 bits come as float32, to a level of 65,535.
- *refused*: the image is left out and counted, with these words. DALI has 8 bits and 1 or 3 channels;
  `data.loader=auto` takes the torch loader for other sets.
- *depth*: bits of a sample, whole numbers where nothing else is said. *channels*: `data.channels`.
"""
PACKAGES = ("pillow", "tifffile", "numpy", "imagecodecs", "nvidia-dali-cuda130")
LOADERS = ("torch", "dali")
_EXACT, _ROUNDED, _LOSSY = 1 / 257, 0.5, 2.0  # levels of 255: of float32, of uint8, of lossy formats


class Row(NamedTuple):
    """A row says what each loader makes of a file at a number of channels."""

    format: str
    depth: str
    layout: str
    channels: int
    torch: str
    dali: str


def rows() -> list[Row]:
    """Make all files, read them, and return what came of it."""
    made, found = [one for make in ALL for one in make()], []
    for channels in sorted({channels for one in made for channels in one.pixels}):
        found += _measured([one for one in made if channels in one.pixels], channels)
    return sorted(found)


def _measured(made: list[Made], channels: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        names = [f"{number:03d}" for number in range(len(made))]  # no ending: the content says what it is
        for name, one in zip(names, made):
            Path(folder, name).write_bytes(one.data)
        reasons, good = {}, {}
        for dtype, group in _groups(made).items():
            # A set has one image that can be used at least.
            np.save(Path(folder, "good.npy"), np.zeros((HEIGHT, WIDTH, channels), dtype))
            source = _open(folder, [*(names[number] for number in group), "good.npy"], channels)
            for place, number in enumerate(group):
                reason = _reason(source, place)
                reasons[number] = reason.replace(folder, "").replace("|", "\\|") if reason else ""
            if usable := [number for number in group if not reasons[number]]:
                good |= dict(zip(usable, _read(folder, [names[number] for number in usable], channels)))
    return [
        Row(one.format, one.depth, one.layout, channels, *_words(one, channels, reasons[number], good.get(number)))
        for number, one in enumerate(made)
    ]


def _groups(made: list[Made]) -> dict[type, list[int]]:
    """Divide the files into sets as people have them, by the type of most: 8 bits or more."""
    groups: dict[type, list[int]] = {np.uint8: [], np.uint16: []}
    for number, one in enumerate(made):
        groups[np.uint8 if one.depth.partition(",")[0] in ("1", "8") else np.uint16].append(number)
    return groups


def _open(folder: str, names: Iterable[str], channels: int) -> IndexedSource:
    listed = Path(folder, "list.txt")
    listed.write_text("\n".join(names))
    return open_images(str(listed), channels, path=str(Path(folder, "index")), rescan=True)


def _reason(source: IndexedSource, index: int) -> str:
    """Return why an image is refused, by its header or when it is decoded; empty if it is not."""
    if index in source.excluded_X:
        return source.index.reason(index)
    try:
        source.decode(index)
    except DataError as error:
        return str(error).partition(": ")[2]
    return ""


def _read(folder: str, names: list[str], channels: int) -> list[dict[str, np.ndarray | str]]:
    """Return what each loader gives of each file: pixels, or why it gives none."""
    found: dict[str, list] = {}
    source = _open(folder, names, channels)
    upright = [tuple(size) == (HEIGHT, WIDTH) for size in source.sizes_N2.tolist()]
    for loader in LOADERS:
        if loader == "dali" and not dali_loader.is_installed():
            found[loader] = ["not installed"] * len(names)
            continue
        images = {}
        for size in ((HEIGHT, WIDTH), (WIDTH, HEIGHT)):
            # The whole image: nothing is cropped away or resized.
            crop = {"crop_scale": (1.0, 1.0), "crop_ratio": (size[1] / size[0],) * 2, "image_size": size}
            data = DataConfig(loader=loader, channels=channels, workers=1, on_error="error", **crop)
            try:
                stream = build_loader(source, data, 0, len(names)).stream(0)
            except ConfigError as error:
                images = dict.fromkeys(range(len(names)), f"refused: {error}")
                break
            batch = next(stream)
            stream.close()
            for index, image_HWC in zip(batch.ids_B.tolist(), batch.images_BHWC.numpy()):
                if upright[index] == (size == (HEIGHT, WIDTH)):
                    images[index] = image_HWC
        found[loader] = [images[index] for index in range(len(names))]
    return [dict(zip(found, of_file)) for of_file in zip(*found.values())]


def _words(one: Made, channels: int, reason: str, read: dict[str, np.ndarray | str] | None) -> list[str]:
    expected_HWC = one.pixels[channels]
    if read is None:
        said = f"refused: {reason}" if expected_HWC is None else f"WRONG, refused: {reason}"
        return [said] * len(LOADERS)
    return [_verdict(one, expected_HWC, read[loader]) for loader in LOADERS]


def _verdict(one: Made, expected_HWC: np.ndarray | None, image_HWC: np.ndarray | str) -> str:
    if isinstance(image_HWC, str):
        return image_HWC
    if expected_HWC is None:
        return "WRONG, not refused"
    allowed = _LOSSY if one.lossy else _ROUNDED if image_HWC.dtype == np.uint8 else _EXACT
    if image_HWC.shape != expected_HWC.shape:
        return f"WRONG, {image_HWC.shape} for {expected_HWC.shape}"
    apart = float(abs(image_HWC - expected_HWC).mean())
    return "right" if apart <= allowed else f"WRONG by {apart:.3g} levels"


def versions() -> str:
    """Return the line of the page that names the packages."""
    names = []
    for package in PACKAGES:
        try:
            names.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            names.append(f"{package} not installed")
    return f"Measured with Python {sys.version_info.major}.{sys.version_info.minor}, {', '.join(names)}."


def page(found: list[Row]) -> str:
    """Return the text of docs/formats.md."""
    lines = [
        HEAD,
        versions(),
        "",
        "| format | depth | stored as | channels | torch | dali |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in found)]) + "\n"


if __name__ == "__main__":
    print(page(rows()), end="")
