"""Images of every format, depth and layout that people have, and the pixels that each must be read as."""

# H height, W width, S samples of a pixel, C channels

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import tifffile
from PIL import Image, features

HEIGHT, WIDTH = 24, 36
LUMA = np.array([0.299, 0.587, 0.114])
TURNED = 6  # EXIF: the stored pixels are turned by 90 degrees


class Made(NamedTuple):
    """A file of a format, and the pixels [H, W, C] that it has for each number of channels, on a scale of 0 .. 255."""

    format: str
    depth: str  # bits and type of a sample
    layout: str
    data: bytes
    pixels: dict[int, np.ndarray | None]  # by C; None: it is to be refused
    lossy: bool = False


def smooth(samples: int) -> np.ndarray:
    """Return [H, W, S] float64 in 0 .. 1: slopes in another direction in each sample, so that JPEG loses little."""
    y, x = np.mgrid[:HEIGHT, :WIDTH] / [[[HEIGHT]], [[WIDTH]]]
    slopes = [(y + 2 * x) / 3, (2 - y - x) / 2, (1 + y - x) / 2, (3 - 2 * y - x) / 3.2, (y * x + 0.1) / 1.2]
    return np.stack(slopes[:samples], axis=2)


def whole(samples: int, dtype: type, full: int = 0) -> np.ndarray:
    """Return `smooth` as whole numbers up to `full`; 0: the type's largest."""
    return np.rint(smooth(samples) * (full or np.iinfo(dtype).max)).astype(dtype)


def on_scale(values: np.ndarray, full: float) -> np.ndarray:
    return values.astype(np.float64) * (255 / full)


def gray_or_rgb(pixels_HWS: np.ndarray) -> dict[int, np.ndarray]:
    """Return what gray or RGB is at 1 and 3 channels."""
    if pixels_HWS.shape[2] == 1:
        return {1: pixels_HWS, 3: pixels_HWS.repeat(3, 2)}
    return {1: (pixels_HWS @ LUMA)[..., None], 3: pixels_HWS}


def saved(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def picture(values_HWS: np.ndarray) -> Image.Image:
    return Image.fromarray(values_HWS.squeeze())


def png(values_HWS: np.ndarray, colour_type: int) -> bytes:
    """Write a PNG of 16 bits a sample, of colours and alpha too, which Pillow cannot."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = values_HWS.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values_HWS)
    head = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    parts = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(values: np.ndarray, photometric: str = "minisblack", **options) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, photometric=photometric, **options)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def planes(values_HWS: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(values_HWS, 2, 0))


def marked(jpeg: bytes, old: bytes, new: bytes) -> bytes:
    """Return a JPEG whose header says something else."""
    assert old in jpeg
    return jpeg.replace(old, new, 1)


def pictures() -> Iterator[Made]:
    """Yield what Pillow reads."""
    gray, rgb = whole(1, np.uint8), whole(3, np.uint8)
    as_gray, as_rgb = gray_or_rgb(gray.astype(float)), gray_or_rgb(rgb.astype(float))
    two = np.where(gray > 127, 255, 0).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = TURNED
    turned = {C: np.rot90(pixels, -1) for C, pixels in as_rgb.items()}
    alpha = np.concatenate([rgb, gray], axis=2)
    colours = picture(rgb).quantize(64)
    of_palette = gray_or_rgb(np.asarray(colours.convert("RGB")).astype(float))
    yield Made("PNG", "1", "gray", saved(picture(two).convert("1"), "PNG"), gray_or_rgb(two.astype(float)))
    yield Made("PNG", "8", "gray", saved(picture(gray), "PNG"), as_gray)
    gray_alpha = Image.merge("LA", [picture(gray), picture(two)])
    yield Made("PNG", "8", "gray + alpha", saved(gray_alpha, "PNG"), as_gray)
    yield Made("PNG", "8", "palette", saved(colours, "PNG"), of_palette)
    yield Made("PNG", "8", "palette + alpha", saved(colours, "PNG", transparency=bytes(range(64))), of_palette)
    yield Made("PNG", "8", "RGB", saved(picture(rgb), "PNG"), as_rgb)
    yield Made("PNG", "8", "RGB + alpha", saved(Image.fromarray(alpha), "PNG"), as_rgb)
    yield Made("PNG", "8", "RGB, EXIF turns it", saved(picture(rgb), "PNG", exif=exif), turned)
    jpegs = {"gray": (picture(gray), {}, as_gray), "RGB, 4:4:4": (picture(rgb), {"subsampling": 0}, as_rgb)}
    jpegs |= {"RGB, 4:2:0": (picture(rgb), {"subsampling": 2}, as_rgb)}
    jpegs |= {"RGB, progressive": (picture(rgb), {"progressive": True}, as_rgb)}
    jpegs |= {"RGB, restart markers": (picture(rgb), {"restart_marker_rows": 1}, as_rgb)}
    jpegs |= {"RGB, not as YCbCr": (picture(rgb), {"keep_rgb": True}, as_rgb)}
    jpegs |= {"RGB, EXIF turns it": (picture(rgb), {"exif": exif}, turned)}
    cmyk = picture(rgb).convert("CMYK")
    jpegs |= {"CMYK": (cmyk, {}, gray_or_rgb(np.asarray(cmyk.convert("RGB")).astype(float)))}
    for layout, (image, options, pixels) in jpegs.items():
        yield Made("JPEG", "8", layout, saved(image, "JPEG", quality=95, **options), pixels, lossy=True)
    whole_jpeg = saved(picture(gray), "JPEG")
    yield Made(
        "JPEG", "12", "gray", marked(whole_jpeg, b"\xff\xc0\0\x0b\x08", b"\xff\xc1\0\x0b\x0c"), {1: None, 3: None}
    )
    yield Made("WebP", "8", "RGB, lossless", saved(picture(rgb), "WEBP", lossless=True), as_rgb)
    yield Made("WebP", "8", "RGB, lossy", saved(picture(rgb), "WEBP", quality=95), as_rgb, lossy=True)
    yield Made("GIF", "8", "palette", saved(colours, "GIF"), of_palette)
    yield Made("BMP", "8", "gray", saved(picture(gray), "BMP"), as_gray)
    yield Made("BMP", "8", "RGB", saved(picture(rgb), "BMP"), as_rgb)
    yield Made("JPEG 2000", "8", "gray, lossless", saved(picture(gray), "JPEG2000"), as_gray)
    yield Made("JPEG 2000", "8", "RGB, lossless", saved(picture(rgb), "JPEG2000"), as_rgb)
    if features.check("avif"):
        yield Made("AVIF", "8", "RGB, lossy", saved(picture(rgb), "AVIF", quality=95), as_rgb, lossy=True)
    head = b"%d %d\n" % (WIDTH, HEIGHT)
    yield Made("PBM", "1", "gray", saved(picture(two).convert("1"), "PPM"), gray_or_rgb(two.astype(float)))
    few = whole(1, np.uint8, 100)
    yield Made("PGM", "8, of 100", "gray", b"P5\n" + head + b"100\n" + few.tobytes(), gray_or_rgb(on_scale(few, 100)))
    yield Made("PPM", "8", "RGB", b"P6\n" + head + b"255\n" + rgb.tobytes(), as_rgb)


def wide_pictures() -> Iterator[Made]:
    """Yield formats of pictures with more than 8 bits."""
    gray, rgb, full = whole(1, np.uint16), whole(3, np.uint16), 65535
    as_gray, as_rgb = gray_or_rgb(on_scale(gray, full)), gray_or_rgb(on_scale(rgb, full))
    yield Made("PNG", "16", "gray", saved(picture(gray), "PNG"), as_gray)
    yield Made("PNG", "16", "gray + alpha", png(np.concatenate([gray, gray], axis=2), 4), as_gray)
    yield Made("PNG", "16", "RGB", png(rgb, 2), as_rgb)
    yield Made("PNG", "16", "RGB + alpha", png(np.concatenate([rgb, gray], axis=2), 6), as_rgb)
    yield Made("JPEG 2000", "16", "gray, lossless", saved(picture(gray), "JPEG2000"), as_gray)
    head, twelve = b"%d %d\n" % (WIDTH, HEIGHT), whole(1, np.uint16, 4095)
    as_twelve = gray_or_rgb(on_scale(twelve, 4095))
    yield Made("PGM", "16, of 4095", "gray", b"P5\n" + head + b"4095\n" + twelve.astype(">u2").tobytes(), as_twelve)
    yield Made("PPM", "16", "RGB", b"P6\n" + head + b"65535\n" + rgb.astype(">u2").tobytes(), as_rgb)
    # tifffile needs the package imagecodecs for LZW; Pillow reads these without it.
    yield Made("TIFF", "16", "gray, LZW", saved(picture(gray), "TIFF", compression="tiff_lzw"), as_gray)


def tiffs() -> Iterator[Made]:
    """Yield TIFFs of gray and colours."""
    for bits, dtype in (("8", np.uint8), ("16", np.uint16)):
        full = np.iinfo(dtype).max
        gray, rgb, half = whole(1, dtype), whole(3, dtype), np.full((HEIGHT, WIDTH, 1), full // 2 + 1, dtype)
        as_gray, as_rgb = gray_or_rgb(on_scale(gray, full)), gray_or_rgb(on_scale(rgb, full))
        made: dict[str, tuple[bytes, dict]] = {
            "gray": (tiff(gray[..., 0]), as_gray),
            "gray, white is zero": (tiff(full - gray[..., 0], "miniswhite"), as_gray),
            "gray, big-endian": (tiff(gray[..., 0], byteorder=">"), as_gray),
            "gray, BigTIFF": (tiff(gray[..., 0], bigtiff=True), as_gray),
            "gray, tiles, deflate": (tiff(gray[..., 0], tile=(16, 16), compression="zlib"), as_gray),
            "RGB": (tiff(rgb, "rgb"), as_rgb),
            "RGB, planes": (tiff(planes(rgb), "rgb", planarconfig="separate"), as_rgb),
            "RGB, deflate, predictor": (tiff(rgb, "rgb", compression="zlib", predictor=True), as_rgb),
            "3 gray pages": (tiff(planes(rgb)), {1: None, 3: as_rgb[3]}),
            "3 bands": (tiff(rgb, planarconfig="contig"), {1: None, 3: as_rgb[3]}),
            "2 pages of RGB": (tiff(np.stack([rgb, rgb]), "rgb"), {1: None, 3: None}),
        }
        for name, values, pixels in (("gray", gray, as_gray), ("RGB", rgb, as_rgb)):
            kind = "minisblack" if name == "gray" else "rgb"
            blended = np.rint(values * (half / full)).astype(dtype)
            plain, mixed = (np.concatenate([colours, half], axis=2) for colours in (values, blended))
            apart = gray_or_rgb(on_scale(blended, full) * full / half)
            made[f"{name} + alpha"] = tiff(plain, kind, extrasamples=["unassalpha"], planarconfig="contig"), pixels
            options = {"extrasamples": ["assocalpha"], "planarconfig": "contig"}
            made[f"{name} + blended alpha"] = tiff(mixed, kind, **options), apart
        for layout, (data, pixels) in made.items():
            yield Made("TIFF", bits, layout, data, pixels)
    yield from _rare_tiffs()


def _rare_tiffs() -> Iterator[Made]:
    gray, rgb = whole(1, np.uint8), whole(3, np.uint8)
    two = gray > 127
    as_two = gray_or_rgb(np.where(two, 255.0, 0.0))
    yield Made("TIFF", "1", "gray", tiff(two[..., 0]), as_two)
    yield Made("TIFF", "1", "gray, white is zero", tiff(~two[..., 0], "miniswhite"), as_two)
    colours = np.random.default_rng(0).integers(0, 256, (3, 256), dtype=np.uint16)
    as_palette = gray_or_rgb(np.moveaxis(colours[:, gray[..., 0]], 0, 2).astype(float))
    for name, colour_map in (("16 bits", 257 * colours), ("8 bits", colours)):
        yield Made("TIFF", "8", f"palette of {name}", tiff(gray[..., 0], "palette", colormap=colour_map), as_palette)
    cmyk = picture(rgb).convert("CMYK")
    as_cmyk = gray_or_rgb(np.asarray(cmyk.convert("RGB")).astype(float)) | {4: np.asarray(cmyk).astype(float)}
    yield Made("TIFF", "8", "CMYK", tiff(np.asarray(cmyk), "separated"), as_cmyk)
    yield Made("TIFF", "8", "CIELab", tiff(rgb, "cielab"), {1: None, 3: None})
    yield Made("TIFF", "8", "YCbCr, not compressed", tiff(rgb, "ycbcr"), {1: None, 3: None})
    lzw = saved(picture(rgb), "TIFF", compression="tiff_lzw")
    yield Made("TIFF", "8", "RGB, LZW", lzw, gray_or_rgb(rgb.astype(float)))
    jpeg = saved(picture(rgb), "TIFF", compression="jpeg", quality=95)
    yield Made("TIFF", "8", "RGB, JPEG", jpeg, gray_or_rgb(rgb.astype(float)), lossy=True)


def bands() -> Iterator[Made]:
    """Yield images of microscopes and satellites: any number of channels and any type."""
    types: list[tuple[str, type, float]] = [
        ("8", np.uint8, 255),
        ("16", np.uint16, 65535),
        ("16 signed", np.int16, 32767),
    ]
    types += [("32 real", np.float32, 1), ("16 real", np.float16, 1), ("64 real", np.float64, 1)]
    for depth, dtype, full in types:
        real = np.dtype(dtype).kind == "f"
        values = smooth(5).astype(dtype) if real else whole(5, dtype)
        values = values - np.asarray(full / 2).astype(dtype) if real or depth == "16 signed" else values
        pixels = {5: on_scale(values, full), 3: None}
        yield Made("TIFF", depth, "5 bands", tiff(values, planarconfig="contig"), pixels)
        yield Made("TIFF", depth, "5 pages", tiff(planes(values)), pixels)
        yield Made(".npy", depth, "[H, W, 5]", npy(values), pixels)
        yield Made(".npy", depth, "[5, H, W]", npy(planes(values)), pixels)
        gray = values[..., :1]
        yield Made(".npy", depth, "[H, W]", npy(gray[..., 0]), gray_or_rgb(on_scale(gray, full)))
    deep = whole(5, np.uint16)
    pixels = {5: on_scale(deep, 65535)}
    yield Made("TIFF", "16", "5 planes", tiff(planes(deep), planarconfig="separate"), pixels)
    white = tiff(65535 - planes(deep), "miniswhite")
    yield Made("TIFF", "16", "5 pages, white is zero", white, pixels)
    stored, tag = np.rot90(deep), (274, 3, 1, TURNED, True)
    turned = tiff(np.ascontiguousarray(stored), planarconfig="contig", extratags=[tag])
    yield Made("TIFF", "16", "5 bands, to be turned", turned, pixels)
    yield Made(".npy", "16", "[H, W, 5] in columns", npy(np.asfortranarray(deep)), pixels)
    for name, wrong in (("NaN", np.nan), ("infinity", np.inf)):
        holes = smooth(5).astype(np.float32)
        holes[0, 0, 0] = wrong
        yield Made(".npy", "32 real", f"[H, W, 5] with {name}", npy(holes), {5: None})
    marked_none = smooth(5).astype(np.float32)
    marked_none[0, 0, 0] = -9999
    nodata = [(42113, 2, 6, "-9999", True)]
    data = tiff(marked_none, planarconfig="contig", extratags=nodata)
    yield Made("TIFF", "32 real", "5 bands with GDAL's no data", data, {5: None})
    yield Made(".npy", "64 complex", "[H, W, 5]", npy(smooth(5).astype(np.complex64)), {5: None})
    yield Made(".npy", "16", "[H, W, 5], cut off", npy(deep)[:-100], {5: None})
    yield Made("TIFF", "16", "5 bands, cut off", tiff(deep, planarconfig="contig")[:-1000], {5: None})


ALL: tuple[Callable[[], Iterator[Made]], ...] = (pictures, wide_pictures, tiffs, bands)
