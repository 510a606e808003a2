"""A snapshot keeps what the model saw of a few fixed images at one epoch; this file stores and draws it."""

# B images, H height, W width, C channels, L patches (row by row)

import base64
import io
import math
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image

from ccmim_fast.errors import DataError

GRAY = 128  # a masked patch: the middle of the range, as in MAE's figures
TILE = 160  # px; longer side of one picture in a grid: eight images in four columns stay near 1 MB
GAP = 6  # px between pictures
PNG_BYTES = 250_000  # of the picture of one epoch; those of two runs at five epochs then stay below 4 MB in base64


class Snapshot(NamedTuple):
    """A snapshot holds a few images at one epoch, as the model scored, masked and reconstructed them."""

    epoch: float  # trained so far; a run that was stopped has a part of one
    images_BHWC: np.ndarray  # uint8
    scores_BL: np.ndarray | None  # float32, larger = more likely masked; None where the method has no score (MAE)
    mask_BL: np.ndarray  # bool, True where masked
    # uint8; with `target.norm_pix` drawn with each target patch's own mean and deviation; None: it predicts no pixels.
    reconstruction_BHWC: np.ndarray | None

    def save(self, path: Path) -> None:
        """Write one .npz without pickles; `path` holds either the whole file or what it held before."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".partial")
        with temporary.open("wb") as file:
            np.savez_compressed(file, **{name: value for name, value in self._asdict().items() if value is not None})
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Snapshot":
        """Read what `save` wrote. Raises DataError for a file that is missing, damaged or holds something else."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {"scores_BL": None, "reconstruction_BHWC": None, **file}
            return cls(**{**arrays, "epoch": int(arrays["epoch"])})
        except (OSError, EOFError, ValueError, TypeError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{path} is no snapshot: {error}") from error


def heatmap(scores_L: np.ndarray, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Draw the scores of one image in matplotlib's magma: black is the image's lowest score, pale its highest.

    Equal scores give black throughout. `grid` is patch rows and columns, whose product is L; returns uint8 [*size, 3].
    """
    low, high = scores_L.min(), scores_L.max()
    unit_L = (scores_L - low) / (high - low) if high > low else np.zeros(scores_L.shape)
    small = Image.fromarray(unit_L.reshape(grid).astype(np.float32))
    unit_HW = np.asarray(small.resize(size[::-1], Image.Resampling.NEAREST))
    return matplotlib.colormaps["magma"](unit_HW, bytes=True)[..., :3]


def visible_set(image_HWC: np.ndarray, mask_L: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Return a copy of a uint8 image, its masked patches (True; `grid` rows and columns of them) flat gray."""
    H, W = image_HWC.shape[:2]
    mask_HW = np.kron(mask_L.reshape(grid), np.ones((H // grid[0], W // grid[1]), dtype=bool))
    return np.where(mask_HW[..., None], np.uint8(GRAY), image_HWC)


def grid_of(snapshot: Snapshot) -> tuple[int, int]:
    """Return rows and columns of a snapshot's square patches; raises ValueError where none fit."""
    H, W = snapshot.images_BHWC.shape[1:3]
    L = snapshot.mask_BL.shape[1]
    patch = math.isqrt(H * W // L)
    if patch == 0 or (H // patch) * (W // patch) != L or H % patch or W % patch:
        raise ValueError(f"{L} patches do not tile {H} x {W} pixels with squares")
    return H // patch, W // patch


def columns_of(snapshot: Snapshot) -> tuple[str, ...]:
    """Return the headings of the columns that `snapshot_grid` draws."""
    score = () if snapshot.scores_BL is None else ("score",)
    drawn = () if snapshot.reconstruction_BHWC is None else ("reconstruction",)
    return ("image", *score, "visible", *drawn)


def snapshot_grid(snapshot: Snapshot) -> bytes:
    """Draw a snapshot as PNG: a row an image, a column each of `columns_of`; the gaps are transparent."""
    grid = grid_of(snapshot)
    shown = [visible_set(image_HWC, mask_L, grid) for image_HWC, mask_L in zip(snapshot.images_BHWC, snapshot.mask_BL)]
    drawn = () if snapshot.reconstruction_BHWC is None else (snapshot.reconstruction_BHWC,)
    columns = [list(map(_tile, pictures)) for pictures in (snapshot.images_BHWC, shown, *drawn)]
    width, height = columns[0][0].size
    if snapshot.scores_BL is not None:
        heat = [Image.fromarray(heatmap(scores_L, grid, (height, width))) for scores_L in snapshot.scores_BL]
        columns.insert(1, heat)
    canvas = Image.new("RGBA", (len(columns) * (width + GAP) - GAP, len(shown) * (height + GAP) - GAP))
    for i, column in enumerate(columns):
        for j, tile in enumerate(column):
            canvas.paste(tile, (i * (width + GAP), j * (height + GAP)))
    buffer = io.BytesIO()
    canvas.save(buffer, format="PNG")
    return buffer.getvalue()


def picture_uri(png: bytes) -> str:
    """Return a PNG as the `src` of an <img>; as WebP (87 KB of 277, of four photographs) where it is large."""
    kind, data = "png", png
    if len(png) > PNG_BYTES:
        buffer = io.BytesIO()
        Image.open(io.BytesIO(png), formats=["PNG"]).save(buffer, format="WebP", quality=90)
        kind, data = "webp", buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def rgb(picture_HWC: np.ndarray) -> np.ndarray:
    """Return images of three channels; of gray ones, and of more channels than a screen has, the first is shown."""
    return picture_HWC if picture_HWC.shape[-1] == 3 else picture_HWC[..., :1].repeat(3, axis=-1)


def _tile(picture_HWC: np.ndarray) -> Image.Image:
    """Scale one uint8 picture to TILE: up by a whole factor, so that pixels stay squares, or down smoothly."""
    tile = Image.fromarray(np.ascontiguousarray(rgb(picture_HWC)))
    longer = max(tile.size)
    if longer <= TILE:
        return tile.resize([side * (TILE // longer) for side in tile.size], Image.Resampling.NEAREST)
    return tile.resize([max(1, round(side * TILE / longer)) for side in tile.size], Image.Resampling.LANCZOS)
