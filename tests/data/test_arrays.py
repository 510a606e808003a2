"""Numbers of any depth, the white that they are scaled to, and the type that a whole set gets."""

import io
import struct
import zlib
from collections import Counter

import numpy as np
import pytest
import tifffile
from made_formats import HEIGHT, WIDTH, picture, png, saved, tiff, whole
from PIL import Image

from ccmim_fast.config.schema import DataConfig
from ccmim_fast.data.build import build_loader, build_source
from ccmim_fast.data.index.arrays import Stored, scaled
from ccmim_fast.data.index.decode import BYTE, REAL, decode, decode_stored, depth_of, read_header
from ccmim_fast.data.index.formats import FORMATS, open_picture, suffix_of
from ccmim_fast.data.index.indexed import open_images
from ccmim_fast.data.shard import write_shards
from ccmim_fast.data.stats import find_range, measure_stats, pixel_notes
from ccmim_fast.data.stream import dali_loader
from ccmim_fast.errors import ConfigError, DataError

needs_dali = pytest.mark.skipif(not dali_loader.is_installed(), reason="DALI is not installed")


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("values", "full", "max_value", "expected"),
    [
        ([0, 4095], 65535, (4095,), [0, 255]),  # 12 bits in 16
        ([0, 128, 255], 255, (4095,), [0, 128, 255]),  # 8 bits beside them keep their white
        ([0, 15], 255, (15,), [0, 255]),  # 4 bits in 8
        ([0, 4095], 4095, (), [0, 255]),  # a format that states its white
        ([0, 4095], 4095, (65535,), [0, 255]),
        ([0, 2000, 4000], 65535, (2000,), [0, 255, 255]),  # beyond white
    ],
)
def test_whole_numbers_are_scaled_to_their_white(values, full, max_value, expected):
    stored = Stored(np.array(values, np.uint8 if full == 255 else np.uint16).reshape(1, -1, 1), full)
    assert scaled(stored, BYTE, max_value).ravel().tolist() == expected
    beyond = scaled(stored, REAL, max_value).ravel()
    assert np.allclose(beyond, np.array(values) * 255 / min(full, *max_value, full))  # float32 is not cut off


def test_each_channel_may_have_its_white():
    stored = Stored(np.array([[[100, 1000, 10000]]], np.uint16), 65535)
    assert scaled(stored, BYTE, (100, 1000, 20000)).ravel().tolist() == [255, 255, 128]
    assert np.allclose(scaled(stored, REAL, (100, 1000, 20000)).ravel(), [255, 255, 127.5])


def test_bytes_are_not_copied():
    pixels = np.zeros((3, 4, 3), np.uint8)
    assert scaled(Stored(pixels, 255.0), BYTE) is pixels
    assert scaled(Stored(pixels, 255.0), BYTE, (65535,)) is pixels


def test_numbers_beyond_float32_are_refused():
    values = np.array([[[1e300, 0.5]]])
    with pytest.raises(DataError, match="1 of 2 values are NaN, infinite or beyond float32"):
        scaled(Stored(values, 1.0), REAL)
    assert np.isfinite(scaled(Stored(values, 1.0), REAL, (1e300,))).all()


@pytest.mark.parametrize(
    ("mode", "depth"),
    [
        *((mode, "byte") for mode in ("L", "1", "RGB", "CMYK", "uint8", "uint8, 3 pages", "bool")),
        *((mode, "wide") for mode in ("I;16", "I;16B", "I", "uint16", "uint16, 5 pages")),
        *((mode, "real") for mode in ("F", "int8", "int16, 2 pages", "uint32", "float16", "float32", "float64")),
    ],
)
def test_depth_of_modes(mode, depth):
    assert depth_of(mode) == depth


def test_a_set_is_of_the_type_that_most_images_need(tmp_path):
    """A rare image of 16 bits slows no set of 8 bits; one of real numbers would be lost in it."""
    for name in ("a", "b"):
        picture(whole(3, np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "deep.png").write_bytes(png(whole(3, np.uint16), 2))
    few = open_images(str(tmp_path))
    assert few.dtype == few.decode(2).dtype == np.uint8
    assert abs(few.decode(2).astype(int) - few.decode(0)).max() <= 1
    for name in ("d", "e"):
        (tmp_path / f"{name}.png").write_bytes(png(whole(3, np.uint16), 2))
    most = open_images(str(tmp_path), rescan=True)
    assert most.dtype == most.decode(0).dtype == np.float32
    for name in ("d", "e"):
        (tmp_path / f"{name}.png").unlink()
    tifffile.imwrite(tmp_path / "real.tif", np.zeros((4, 4, 3), np.float32), photometric="rgb")
    assert open_images(str(tmp_path), rescan=True).dtype == np.float32
    # One that cannot be used does not count.
    tifffile.imwrite(tmp_path / "real.tif", np.zeros((4, 4, 2), np.float32), planarconfig="contig")
    assert open_images(str(tmp_path), rescan=True).dtype == np.uint8


@pytest.mark.parametrize("loader", ["torch", pytest.param("dali", marks=needs_dali)])
def test_a_stated_white_counts_for_every_loader(tmp_path, loader):
    """A JPEG that uses 16 of 256 levels: no loader is given its file as it is."""
    Image.fromarray(np.full((16, 16, 3), 12, np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.full((16, 16, 3), 12, np.uint8)).save(tmp_path / "b.jpg")
    data = DataConfig(root=str(tmp_path), loader=loader, image_size=(8, 8), max_value=(15.0,), workers=1)
    stream = build_loader(build_source(data, 0), data, 0, 2).stream(0)
    assert next(stream).images_BHWC.unique().tolist() == [204]
    stream.close()


@pytest.mark.parametrize(
    ("shape", "channels", "size"),
    [
        *((shape, 3, (4, 6)) for shape in ((4, 6), (4, 6, 1), (1, 4, 6), (4, 6, 3), (3, 4, 6))),
        *((shape, 1, (4, 6)) for shape in ((4, 6), (4, 6, 1), (1, 4, 6))),
        *((shape, 2, (4, 6)) for shape in ((4, 6, 2), (2, 4, 6))),
        *(((3, 4, 3), 3, (3, 4)), ((2, 5, 2), 2, (2, 5))),  # channels last, where both ends could be
        *(((4, 6), 2, None), ((4, 6, 3), 1, None), ((2, 3, 4, 5), 5, None), ((7,), 1, None), ((), 1, None)),
        ((0, 6, 3), 3, None),
    ],
)
def test_shapes_of_npy(shape, channels, size):
    array = np.random.default_rng(0).integers(0, 65536, shape, dtype=np.uint16)
    if size is None:
        with pytest.raises(DataError, match=r"is not \[height|no pixels"):
            read_header(npy(array), channels)
        return
    header = read_header(npy(array), channels)
    assert header.size == size
    assert decode(npy(array), channels, REAL).shape == (*size, channels)


def test_claimed_shapes_of_npy_are_held_before_memory_is_touched():
    header = np.lib.format.header_data_from_array_1_0(np.zeros(1, np.float64)) | {"shape": (9_000, 9_000, 5)}
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(DataError, match="cut off: 0 of 3,240,000,000 bytes"):
        read_header(file.getvalue(), 5)
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, header | {"shape": (2**40, 2**40, 5)})
    with pytest.raises(DataError, match="pixels are more than 100,000,000"):
        read_header(file.getvalue() + bytes(2**17), 5)


def test_the_header_of_a_large_npy_is_read_from_its_beginning(tmp_path, monkeypatch):
    from ccmim_fast.data.index import scan

    np.save(tmp_path / "a.npy", np.zeros((300, 300, 5), np.uint16))
    lengths, read = [], scan.Storage.read

    def counted(self, *place, most=None):
        lengths.append(len(read(self, *place, most=most)))
        return read(self, *place, most=most)

    monkeypatch.setattr(scan.Storage, "read", counted)
    assert open_images(str(tmp_path), 5).sizes_N2.tolist() == [[300, 300]]
    assert lengths == [2**16]


def test_jpeg_2000_is_as_large_as_its_codestream_says():
    data = saved(picture(whole(1, np.uint8)), "JPEG2000")
    start = data.index(b"\xff\x4f\xff\x51") + 8
    wide = data[:start] + struct.pack(">II", 2**20, 2**20) + data[start + 8 :]
    for read in (read_header, decode_stored):
        with pytest.raises(DataError, match="1048576 x 1048576 pixels are more than"):
            read(wide, 1)


@pytest.mark.parametrize("samples", [2, 3, 4])
def test_every_filter_of_png_is_undone(samples):
    """Pillow undoes them too, and keeps the upper 8 bits; the lower ones are noise, which no filter leaves alone."""
    values = np.random.default_rng(samples).integers(0, 65536, (23, 17, samples), dtype=np.uint16)
    plain = png(values, {2: 4, 3: 2, 4: 6}[samples])
    start = plain.index(b"IDAT") + 4
    rows = np.frombuffer(zlib.decompress(plain[start:-16]), np.uint8).reshape(23, -1).copy()
    rows[:, 0] = np.arange(23) % 5  # the same bytes, as each filter codes them
    packed = zlib.compress(rows.tobytes())
    chunk = struct.pack(">I", len(packed)) + b"IDAT" + packed + struct.pack(">I", zlib.crc32(b"IDAT" + packed))
    data = plain[: start - 8] + chunk + plain[-12:]
    colours = samples if samples == 3 else samples - 1
    found = decode_stored(data, 3 if colours == 3 else 1).values_HWC
    assert (found >> 8 == np.asarray(Image.open(io.BytesIO(data)))[..., :colours]).all()
    for damaged in (data[:-40], data[: start + 30] + bytes(9) + data[start + 39 :]):
        with pytest.raises(DataError, match=r"cut off|damaged pixels"):
            decode_stored(damaged, 1)


def test_only_named_formats_are_opened():
    """PostScript, which Pillow hands to another program, and the other formats that Pillow has beside ours."""
    assert not {"EPS", "PSD", "WMF", "FITS", "HDF5", "PCX", "TGA", "ICO"} & set(FORMATS)
    harmless = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(DataError, match="a PostScript file, which is not read"):
        open_picture(harmless)
    tga = io.BytesIO()
    Image.new("RGB", (4, 4)).save(tga, "TGA")
    with pytest.raises(DataError, match="not an image that Pillow knows"):
        open_picture(tga.getvalue())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xff\xd8\xff\xe0" + bytes(40), "a JPEG file that Pillow cannot read: "),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "a PNG file that Pillow cannot read: "),
        (b"GIF89a", "a GIF file that Pillow cannot read: "),
        (b"\0\0\0\x18ftypheic" + bytes(40), "a HEIF file or a film, which is not read: convert"),
        (b"\xff\x0a" + bytes(40), "a JPEG XL file, which is not read: convert"),
        (bytes(128) + b"DICM" + bytes(40), "a DICOM file, which is not read: convert"),
        (b"\x89HDF\r\n\x1a\n" + bytes(40), "an HDF5 file, which is not read: convert"),
        (b"text", "not an image that Pillow knows"),
    ],
)
def test_the_reason_is_that_of_the_format(data, words):
    with pytest.raises(DataError) as caught:
        read_header(data, 3)
    assert str(caught.value).startswith(words)
    assert len(str(caught.value)) > len(words) or not words.endswith(": ")


def test_a_picture_among_images_of_other_channels_says_what_is_read():
    with pytest.raises(DataError, match=r"1 or 3 channels; images of 5 channels are TIFF or \.npy files"):
        read_header(saved(picture(whole(3, np.uint8)), "PNG"), 5)


@pytest.mark.parametrize("frame", range(0xC0, 0xD0))
def test_only_common_jpegs_are_given_to_every_decoder(frame):
    """Baseline, extended and progressive ones of 8 bits; DALI's pipeline ends at lossless ones, in each batch anew."""
    if frame in (0xC4, 0xC8, 0xCC):
        return
    jpeg = saved(picture(whole(3, np.uint8)), "JPEG")
    other = jpeg.replace(b"\xff\xc0\0\x11", bytes([0xFF, frame, 0, 0x11]), 1)
    try:
        plain = read_header(other, 3).plain
    except DataError:
        plain = 0
    assert plain == int(frame in (0xC0, 0xC1, 0xC2))


@needs_dali
def test_gray_of_saturated_colours_is_the_same_from_both_loaders(tmp_path):
    """Colours that YCbCr has and RGB has not; the luma is taken as it is stored."""
    for number, values in enumerate(((20, 255, 128), (235, 16, 240), (128, 0, 0), (16, 128, 255))):
        parts = [Image.new("L", (64, 64), value) for value in values]
        Image.merge("YCbCr", parts).save(tmp_path / f"{number}.jpg", quality=100, subsampling=0)
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2], stripes[:, 1::2] = (0, 0, 255), (255, 0, 0)
    Image.fromarray(stripes).save(tmp_path / "stripes.jpg", quality=75)
    source, found = open_images(str(tmp_path), 1), {}
    for loader in ("torch", "dali"):
        data = DataConfig(
            loader=loader, image_size=(64, 64), channels=1, workers=1, crop_scale=(1, 1), crop_ratio=(1, 1)
        )
        stream = build_loader(source, data, 0, len(source)).stream(0)
        found[loader] = next(stream).images_BHWC.numpy().astype(int)
        stream.close()
    assert abs(found["torch"] - found["dali"]).mean((1, 2, 3)).max() < 0.5


def test_a_loader_that_has_8_bits_refuses_more(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((8, 9, 3), np.uint16), photometric="rgb")
    source = open_images(str(tmp_path))
    with pytest.raises(ConfigError, match=r"reads pixels of 8 bits, not of more; set data\.loader=torch"):
        build_loader(source, DataConfig(loader="dali"), 0, 1)
    assert type(build_loader(source, DataConfig(), 0, 1)).__name__ == "TorchLoader"


def images_of(folder, dtype, low, high, channels=2, count=4):
    """Save images of uniform draws as .npy, and open them."""
    for seed in range(count):
        draws = np.random.default_rng(seed).uniform(low, high, (9, 11, channels))
        np.save(folder / f"{seed}.npy", draws.astype(dtype))
    names = folder / "list.txt"  # its names may end as they like, at 3 channels too
    names.write_text("".join(f"{seed}.npy\n" for seed in range(count)))
    return open_images(str(names), channels)


@pytest.mark.parametrize(
    ("dtype", "low", "high", "max_value", "better"),
    [
        (np.uint16, 0, 4000, (), (4095.0,)),
        (np.uint16, 0, 30000, (), None),
        (np.uint16, 0, 9000, (4095,), (16383.0,)),  # beyond what was set
        (np.uint16, 0, 4000, (4095,), None),
        (np.uint8, 0, 14, (), (15.0,)),
        (np.uint8, 0, 200, (), None),
        (np.int16, -900, 1000, (), (1023.0,)),
        (np.float32, 0, 1.2, (), None),
        (np.float32, 0, 9000, (), (9000.0,)),
        (np.float32, -0.01, 0.02, (), (0.02,)),
        (np.uint16, 0, [100, 60000], (), None),  # one channel uses the range
        (np.float64, 0, [1, 3000], (), (1.0, 3000.0)),
    ],
)
def test_a_white_that_fits_is_proposed(tmp_path, dtype, low, high, max_value, better):
    source = images_of(tmp_path, dtype, low, high)
    source.max_value = max_value
    found = find_range(source)
    if better is None:
        assert found is None
        assert pixel_notes(source) == []
        return
    assert found.max_value == better
    assert "set --data.max_value=" in pixel_notes(source)[0]
    source.max_value = found.max_value
    assert find_range(source) is None
    stats = measure_stats(source, 10)
    assert all(-1 <= mean <= 1 for mean in stats.mean_C)


def test_statistics_of_wide_images_are_numpys(tmp_path):
    source = images_of(tmp_path, np.float32, -3, [2, 50], count=6)
    source.max_value = (10.0,)
    values_PC = (
        np.concatenate([np.load(tmp_path / f"{i}.npy").reshape(-1, 2) for i in range(6)]).astype(np.float64) / 10
    )
    found = measure_stats(source, 100, workers=2)
    assert found.mean_C == pytest.approx(values_PC.mean(0), rel=1e-5)
    assert found.std_C == pytest.approx(values_PC.std(0), rel=1e-5)


def test_nan_in_a_few_images_does_not_hide_the_range(tmp_path):
    images_of(tmp_path, np.float32, 0, 5000)
    holes = np.load(tmp_path / "0.npy")
    holes[0, 0] = np.nan
    np.save(tmp_path / "0.npy", holes)
    source = open_images(str(tmp_path / "list.txt"), 2, rescan=True)
    assert find_range(source).max_value == (5000.0,)
    assert measure_stats(source, 10).images == 3


def test_shards_keep_wide_images_as_they_are(tmp_path):
    (tmp_path / "in").mkdir()
    source = images_of(tmp_path / "in", np.uint16, 0, 60000, channels=3)
    with pytest.raises(ConfigError, match="--side=8: most images have more than 8 bits"):
        write_shards(source, str(tmp_path / "small"), side=8)
    index, left_out = write_shards(source, str(tmp_path / "out"))
    assert not left_out
    assert index.modes() == Counter({"uint16": 4})
    assert suffix_of(npy(np.zeros((2, 2)))) == ".npy"
    assert suffix_of(tiff(np.zeros((HEIGHT, WIDTH), np.uint8))) == ".tif"
