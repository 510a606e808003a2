"""Pixels of every kind of file, by Pillow and by DALI: fault table, row 3."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from ccmim_fast.data.index.bad_samples import BadSamples
from ccmim_fast.data.index.decode import decode, read_header
from ccmim_fast.data.index.formats import suffix_of
from ccmim_fast.data.index.indexed import open_images
from ccmim_fast.data.stream.dali_loader import DaliLoader, is_installed
from ccmim_fast.data.stream.plan import Plan
from ccmim_fast.data.stream.torch_loader import TorchLoader

needs_dali = pytest.mark.skipif(not is_installed(), reason="DALI is not installed")
TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}  # stored pixels -> upright pixels, by the EXIF standard


def exif(orientation):
    data = Image.Exif()
    data[0x0112] = orientation
    return data


def late_exif(png):
    """Return the same PNG with its EXIF chunk behind the pixels."""
    start = png.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(png[start : start + 4], "big")
    return png[:start] + png[end:-12] + png[start:end] + png[-12:]


def sixteen_bits(image):
    wide = np.asarray(image.convert("L")).astype(np.uint16) * 257
    return Image.fromarray(wide + np.random.default_rng(0).integers(0, 2, wide.shape, dtype=np.uint16) * (wide < 65535))


def write_kinds(image, root):
    """Write one file of each kind; the names say which."""
    rgba = image.copy()
    rgba.putalpha(image.convert("L"))
    gamma = PngImagePlugin.PngInfo()
    gamma.add(b"gAMA", (100000).to_bytes(4, "big"))
    xmp = b"<x:xmpmeta><tiff:Orientation>6</tiff:Orientation></x:xmpmeta>"
    for orientation in range(1, 9):
        image.save(root / f"exif{orientation}.jpg", exif=exif(orientation), quality=95)
    image.save(root / "xmp.jpg", xmp=xmp, quality=95)
    image.save(root / "xmp_and_exif.jpg", xmp=xmp, exif=exif(3), quality=95)
    image.convert("L").save(root / "gray.jpg", quality=95)
    image.convert("CMYK").save(root / "cmyk.jpg", quality=95)
    image.save(root / "progressive.jpg", progressive=True, quality=95)
    image.save(root / "rgb_coded.jpg", keep_rgb=True, quality=95)
    image.save(root / "rgb.png")
    image.save(root / "exif6.png", exif=exif(6))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif(6))
    (root / "late_exif6.png").write_bytes(late_exif(buffer.getvalue()))
    image.save(root / "gamma.png", pnginfo=gamma)
    image.save(root / "transparent.png", transparency=(10, 10, 10))
    image.convert("L").save(root / "gray.png")
    image.convert("LA").save(root / "la.png")
    image.quantize(64).save(root / "palette.png")
    image.quantize(64).save(root / "palette_alpha.png", transparency=bytes(range(64)))
    rgba.save(root / "rgba.png")
    sixteen_bits(image).save(root / "sixteen.png")
    sixteen_bits(image).save(root / "sixteen.tif")
    image.save(root / "exif6.tif", exif=exif(6))
    image.convert("CMYK").save(root / "cmyk.tif")
    image.save(root / "exif6.webp", exif=exif(6), lossless=True)
    image.quantize(64).save(root / "palette.gif")
    image.save(root / "rgb.bmp")


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_a_dib_is_a_bmp_without_the_header_of_its_file(mode):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8)).convert(mode)
    whole, bare = io.BytesIO(), io.BytesIO()
    image.save(whole, "BMP")
    image.save(bare, "DIB")
    assert not bare.getvalue().startswith(b"BM")
    assert suffix_of(bare.getvalue()) == ".dib"
    assert read_header(bare.getvalue(), 3) == read_header(whole.getvalue(), 3)
    assert (decode(bare.getvalue(), 3) == decode(whole.getvalue(), 3)).all()


@pytest.fixture(scope="module")
def kinds_folder(tmp_path_factory, photograph):
    root = tmp_path_factory.mktemp("kinds")
    write_kinds(photograph, root)
    return root


@pytest.mark.parametrize("name", [*(f"exif{n}.jpg" for n in range(1, 9)), "exif6.png", "exif6.tif", "exif6.webp"])
def test_exif_turns_the_pixels(kinds_folder, photograph, name):
    upright = TURNS[int(name[4])](np.asarray(photograph)).astype(int)
    image = decode((kinds_folder / name).read_bytes(), 3)
    assert image.shape == upright.shape
    assert abs(image - upright).mean() < 2  # JPEG's loss


def test_headers_give_the_decoded_sizes(kinds_folder):
    source = open_images(str(kinds_folder))
    assert len(source.excluded_X) == 0
    for index in range(len(source)):
        assert source.decode(index).shape == (*source.sizes_N2[index], 3), source.name(index)


def test_exif_behind_a_pngs_pixels_is_not_looked_for(kinds_folder, photograph, monkeypatch):
    data = (kinds_folder / "late_exif6.png").read_bytes()
    assert (decode(data, 3) == np.asarray(photograph)).all()

    def refuse(_):
        raise AssertionError("a header was asked for, not the pixels")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", refuse)
    assert read_header(data, 3).size == (300, 400)


def test_sixteen_bit_gray_is_scaled(kinds_folder, photograph):
    gray = np.asarray(photograph.convert("L"))[..., None]
    for name in ("sixteen.png", "sixteen.tif"):
        assert (decode((kinds_folder / name).read_bytes(), 1) == gray).all()
        assert (decode((kinds_folder / name).read_bytes(), 3) == gray).all()


def test_modes_become_rgb_or_gray(kinds_folder, photograph):
    rgb, gray = np.asarray(photograph), np.asarray(photograph.convert("L"))[..., None]
    for name in ("rgb.png", "rgba.png", "gamma.png", "transparent.png", "rgb.bmp"):
        assert (decode((kinds_folder / name).read_bytes(), 3) == rgb).all(), name
        assert (decode((kinds_folder / name).read_bytes(), 1) == gray).all(), name
    for name in ("gray.png", "la.png"):
        assert (decode((kinds_folder / name).read_bytes(), 3) == gray).all(), name
        assert (decode((kinds_folder / name).read_bytes(), 1) == gray).all(), name
    for name in ("palette.png", "palette_alpha.png", "palette.gif", "cmyk.tif"):
        assert abs(decode((kinds_folder / name).read_bytes(), 3) - rgb.astype(int)).mean() < 12, name


def test_palettes_with_alpha_do_not_warn(kinds_folder, recwarn):
    decode((kinds_folder / "palette_alpha.png").read_bytes(), 3)
    assert list(recwarn) == []


@needs_dali
@pytest.mark.parametrize("channels", [1, 3])
def test_dali_gives_pillows_pixels(kinds_folder, channels):
    source = open_images(str(kinds_folder), channels)
    plan = Plan(source, seed=1, global_batch=len(source), crop_scale=(0.1, 0.6), flip=True)
    arguments = plan, BadSamples(source, "error", 0.0), (96, 80), 2, torch.device("cpu")
    streams = TorchLoader(*arguments).stream(0), DaliLoader(*arguments).stream(0)
    expected, found = map(next, streams)
    for stream in streams:
        stream.close()
    assert found.images_BHWC.shape == (len(source), 96, 80, channels)
    assert (found.ids_B == expected.ids_B).all()
    difference = (found.images_BHWC.int() - expected.images_BHWC.int()).abs().float().mean(dim=(1, 2, 3))
    report = {source.name(i).rsplit("/", 1)[1]: round(d, 2) for i, d in zip(found.ids_B.tolist(), difference.tolist())}
    print(f"DALI against Pillow, {channels} channels, mean difference in 1/255:", report)  # visible with pytest -rP
    # The fault table allows 2/255. Seen: 0.14 to 0.20; the gray that DALI's libpng makes of an RGB PNG differs by 0.5.
    assert max(report.values()) < 0.4, report
