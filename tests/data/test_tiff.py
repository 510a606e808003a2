"""TIFFs as microscopes, satellites and cameras write them: rules of `index/tiff.py` that no table of formats shows."""

import importlib.util
import io
import lzma
import struct
import zlib

import numpy as np
import pytest
import tifffile
from made_formats import tiff

from ccmim_fast.data.index import tiff_limits
from ccmim_fast.data.index.decode import REAL, decode, read_header
from ccmim_fast.data.index.indexed import open_images
from ccmim_fast.data.index.tiff import turned
from ccmim_fast.data.stats import pixel_notes
from ccmim_fast.errors import DataError

RANDOM = np.random.default_rng(0)


def patched(data, tag, value):
    """Return a little-endian TIFF in which a short or long tag of the first page has another value."""
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    for place in range(start + 2, start + 2 + 12 * count, 12):
        code, kind = struct.unpack_from("<HH", data, place)
        if code == tag:
            packed = struct.pack("<HH", value, 0) if kind == 3 else struct.pack("<I", value)
            return data[: place + 8] + packed + data[place + 12 :]
    raise AssertionError(tag)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_orientation_at_any_number_of_channels(orientation, channels):
    stored = RANDOM.integers(0, 65536, (5, 7, channels), dtype=np.uint16)
    kind = "rgb" if channels == 3 else "minisblack"
    data = tiff(stored.squeeze(), kind, planarconfig="contig", extratags=[(274, 3, 1, orientation, True)])
    upright = turned(stored, orientation)
    assert read_header(data, channels).size == upright.shape[:2]
    assert (decode(data, channels, REAL) == upright.astype(np.float32) * np.float32(1 / 257)).all()


def test_a_set_in_several_files_is_refused_by_what_it_lacks():
    """OME's XML names the other files; none is opened, and no plane is made up."""
    parts = "".join(
        f'<TiffData FirstC="{i}" IFD="0"><UUID FileName="c{i}.ome.tif">urn:{i}</UUID></TiffData>' for i in range(4)
    )
    sizes = 'DimensionOrder="XYCZT" Type="uint8" SizeX="8" SizeY="6" SizeC="4" SizeZ="1" SizeT="1"'
    xml = f'<OME UUID="urn:0"><Image ID="Image:0"><Pixels ID="Pixels:0" {sizes}>{parts}</Pixels></Image></OME>'
    data = tiff(np.full((6, 8), 50, np.uint8), description=xml, metadata=None)
    for channels in (1, 3, 4):
        with pytest.raises(DataError, match="one of 4 files of an OME-TIFF set of 4 channels, and holds 1: write"):
            read_header(data, channels)
    # Of a set of moments each file has an image of its own.
    assert (
        decode(tiff(np.full((6, 8), 50, np.uint8), description=xml.replace('C="4"', 'C="1"'), metadata=None), 3) == 50
    ).all()
    whole = tiff(RANDOM.integers(0, 256, (4, 6, 8), dtype=np.uint8), metadata={"axes": "CYX"}, ome=True)
    assert decode(whole, 4).shape == (6, 8, 4)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_arrays_that_tifffile_takes_for_pages_are_read_as_written(dtype):
    """`imwrite(path, array)` of [H, W, 5] writes H pages of W x 5."""
    array = RANDOM.integers(0, 256, (9, 7, 5)).astype(dtype)
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array)
    assert read_header(buffer.getvalue(), 5).size == (9, 7)
    scale = {"u1": 1, "u2": 1 / 257, "f4": 255}[np.dtype(dtype).str[1:]]
    assert np.allclose(decode(buffer.getvalue(), 5, REAL), array * np.float32(scale))


@pytest.mark.skipif(importlib.util.find_spec("imagecodecs") is not None, reason="imagecodecs is installed")
@pytest.mark.parametrize(("compression", "name"), [(50000, "ZSTD"), (34887, "LERC"), (5, "LZW"), (7, "JPEG")])
def test_compressions_name_the_package_that_undoes_them(compression, name):
    data = patched(tiff(np.zeros((6, 8, 4), np.uint8), planarconfig="contig"), 259, compression)
    with pytest.raises(
        DataError, match=rf"compressed by {name}, .* imagecodecs reads: pip install 'ccmim_fast\[tiff\]'"
    ):
        read_header(data, 4)


def test_claimed_sizes_are_held_before_memory_is_touched():
    data = tiff(np.zeros((6, 8, 4), np.uint8), planarconfig="contig")
    for tag, value in ((256, 2**31 - 1), (257, 2**31 - 1)):
        with pytest.raises(DataError, match=r"pixels are more than 100,000,000"):
            read_header(patched(data, tag, value), 4)
    with pytest.raises(DataError, match="channels"):
        read_header(patched(data, 277, 60000), 4)


@pytest.mark.skipif(importlib.util.find_spec("imagecodecs") is not None, reason="imagecodecs is told the size")
@pytest.mark.parametrize(("compression", "pack"), [("zlib", zlib.compress), ("lzma", lzma.compress)])
def test_a_strip_gives_no_more_than_its_image(compression, pack, monkeypatch):
    """Which is counted where it might give 64 MiB more; a last strip that its writer has filled up is read."""
    image = RANDOM.integers(0, 2**16, (32, 40), np.uint16)
    honest, filled = tiff(image, compression=compression), pack(bytes(image.nbytes + 4096))
    grown = patched(patched(honest + filled, 273, len(honest)), 279, len(filled))
    for data in (honest, grown):
        assert decode(data, 1).shape == (32, 40, 1)
    monkeypatch.setattr(tiff_limits, "_SPARE", 0)
    assert decode(honest, 1).shape == (32, 40, 1)
    with pytest.raises(DataError, match="a TIFF of 2,560 bytes with a strip that gives more"):
        decode(grown, 1)


def test_a_chain_of_pages_without_end_is_refused():
    data = tiff(np.zeros((6, 8), np.uint8))
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    end = start + 2 + 12 * count
    for following, words in ((start, "chain of pages has no end"), (2**31, "pages lie beyond its end")):
        with pytest.raises(DataError, match=words):
            read_header(data[:end] + struct.pack("<I", following) + data[end + 4 :], 1)


def test_no_data_that_is_black_is_black():
    data = tiff(np.array([[[0, 7]]], np.uint16), planarconfig="contig", extratags=[(42113, 2, 2, "0", True)])
    assert decode(data, 2, REAL).ravel().tolist() == [0, np.float32(7 / 257)]


@pytest.mark.parametrize("mark", ["-9999.9", "1e+20"])
def test_no_data_of_float32_is_known_as_it_was_rounded(mark):
    array = np.zeros((8, 9, 5), np.float32)
    array[0, 0] = np.float32(mark)
    data = tiff(array, planarconfig="contig", extratags=[(42113, 2, len(mark) + 1, mark, True)])
    with pytest.raises(DataError, match=r"5 of 360 values are .*, by which the file marks pixels without data"):
        decode(data, 5, REAL)


def test_each_page_may_mark_its_own_pixels_without_data():
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as file:
        for value in range(1, 5):
            page, mark = np.full((6, 8), value, np.float32), [(42113, 2, 2, "7", True)] if value == 2 else []
            file.write(page, photometric="minisblack", metadata=None, extratags=mark)
    data = buffer.getvalue()
    assert decode(data, 4, REAL).max() == 4 * 255
    for value, is_marked in ((2, True), (3, False)):
        spoiled = data.replace(np.full(48, value, "<f4").tobytes(), np.full(48, 7, "<f4").tobytes())
        if is_marked:
            with pytest.raises(DataError, match="48 of 48 values are 7, by which the file marks"):
                decode(spoiled, 4, REAL)
        else:
            assert decode(spoiled, 4, REAL).max() == 7 * 255


def test_thumbnails_and_more_images_are_told(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(np.full((8, 9), 500, np.uint16), photometric="minisblack", metadata=None)
        file.write(np.zeros((7, 3), np.uint16), photometric="minisblack", metadata=None)
    source = open_images(str(tmp_path), 1)
    assert source.index.modes() == {"uint16, the first of 2 images": 1}
    assert "1 images are uint16, the first of 2 images" in pixel_notes(source)
    assert source.decode(0).shape == (8, 9, 1)


def test_all_pages_are_counted_where_some_are_of_another_kind():
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as file:
        for kind in ("minisblack", "miniswhite", "minisblack"):
            file.write(np.zeros((6, 8), np.uint8), photometric=kind, metadata=None)
    with pytest.raises(DataError, match=r"3 pages, 2 of them alike, which are neither 3 channels nor one image: "):
        read_header(buffer.getvalue(), 3)


def test_mixed_kinds_of_bits_are_refused_not_guessed():
    complex_data = tiff(np.zeros((4, 4), np.complex64))
    for data in (complex_data, b"II*\0" + bytes(60), tiff(np.zeros((4, 4), np.float32), "miniswhite")):
        with pytest.raises(DataError) as caught:
            read_header(data, 1)
        assert len(str(caught.value)) > 10
