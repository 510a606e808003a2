"""Images of every format, depth and layout: the pixels that were written, or a reason."""

import re
from pathlib import Path

import formats_page
import numpy as np
import pytest
from made_formats import ALL

from ccmim_fast.data.index.decode import REAL, decode, depth_of, read_header
from ccmim_fast.data.stream import dali_loader
from ccmim_fast.errors import DataError

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"


@pytest.mark.parametrize("make", ALL)
def test_pixels_are_right_or_refused(make):
    """As float32 and, where whole numbers without sign are stored, rounded to 8 bits: in both kinds of set."""
    for one in make():
        for channels, expected in one.pixels.items():
            what = f"{one.format}, {one.depth}, {one.layout}, {channels} channels"
            if expected is None:
                with pytest.raises(DataError) as caught:
                    decode(one.data, channels, REAL)
                assert len(str(caught.value)) > 20, what
                continue
            header = read_header(one.data, channels)
            assert header.size == expected.shape[:2], what
            allowed = 2.0 if one.lossy else 1 / 257 if depth_of(header.mode) != "byte" else 0.5
            found = decode(one.data, channels, REAL)
            assert found.dtype == np.float32, what
            assert found.shape == expected.shape, what
            assert abs(found - expected).mean() <= allowed, what
            if depth_of(header.mode) == "real":
                with pytest.raises(DataError, match="pixels, and 8 bits are read here"):
                    decode(one.data, channels)
            else:
                assert abs(decode(one.data, channels) - expected).mean() <= max(allowed, 0.5), what


@pytest.mark.slow
@pytest.mark.skipif(not dali_loader.is_installed(), reason="the page says what DALI reads")
def test_the_page_says_what_is_read():
    """`make formats` writes docs/formats.md; with other packages the words may differ, but not what is right."""
    found, text = formats_page.rows(), PAGE.read_text()
    assert not [row for row in found if "WRONG" in row.torch + row.dali]
    assert len(found) >= 80
    told = [line for line in text.splitlines() if re.match(r"\| \S+ .*\| \d+ \|", line)]
    if formats_page.versions() in text:
        assert formats_page.page(found) == text
    assert [line.split(" | ")[:4] for line in told] == [
        f"| {' | '.join(map(str, row[:4]))}".split(" | ") for row in found
    ]
