"""This file draws pictures side by side under headings, as a figure of a paper."""

import io
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ccmim_fast.report.pictures import rgb

_TILE = 0.92  # inches; seven columns make a text width of 6.7 inches
_GAP = 0.05
_LINE, _SMALL_LINE, _DROP = 0.145, 0.12, 0.05  # of text, of small text, and of a baseline above what follows
_DPI = 250
_STYLE = {"font.family": "STIXGeneral", "mathtext.fontset": "stix"}  # comes with matplotlib
_SIZE, _SMALL = 9, 7.5  # points
_SOFT = "0.35"  # gray


class Column(NamedTuple):
    """A column is what stands under one heading."""

    heading: str  # one line or several
    under: str  # smaller lines, or nothing
    pictures: Sequence[np.ndarray]  # uint8 [H, W, C], one a row
    outlined: Sequence[np.ndarray] = ()  # of each picture a part [H, W] bool whose edge is drawn in white, or nothing


def figure_png(columns: Sequence[Column], note: str = "") -> bytes:
    """Draw the columns, all of equally many pictures of one size, as PNG, with a small `note` below; bytes repeat."""
    rows = len(columns[0].pictures)
    shape_HW = columns[0].pictures[0].shape[:2]
    tall = _TILE * shape_HW[0] / shape_HW[1]
    head = _LINE * (1 + max(column.heading.count("\n") for column in columns)) + 0.04
    under = _SMALL_LINE * max(column.under.count("\n") + bool(column.under) for column in columns)
    foot = _SMALL_LINE * (1 + note.count("\n")) + _GAP if note else 0
    width = len(columns) * (_TILE + _GAP) - _GAP
    height = head + under + rows * (tall + _GAP) - _GAP + foot
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), dpi=_DPI)
        # One for all, in inches from the top: axes of its own for each picture take most of the time.
        axes = figure.add_axes((0, 0, 1, 1))
        for i, column in enumerate(columns):
            left = i * (_TILE + _GAP)
            text = {"x": left + _TILE / 2, "ha": "center", "linespacing": 1.1}
            axes.text(y=head - _DROP, s=column.heading, fontsize=_SIZE, **text)
            axes.text(y=head + under - _DROP, s=column.under, fontsize=_SMALL, color=_SOFT, **text)
            for j, picture_HWC in enumerate(column.pictures):
                top = head + under + j * (tall + _GAP)
                extent = (left, left + _TILE, top + tall, top)
                axes.imshow(rgb(picture_HWC), extent=extent, aspect="auto")
                if len(column.outlined) and column.outlined[j].any():
                    axes.contour(
                        column.outlined[j], levels=[0.5], colors="white", linewidths=0.8, origin="upper", extent=extent
                    )
        axes.text(0, height - 0.02, note, fontsize=_SMALL, color=_SOFT, va="bottom")
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.set_axis_off()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
