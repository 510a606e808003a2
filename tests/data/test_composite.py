"""Composites: what `ccmim data composite` writes is exact, held apart, and the same whatever made it."""

import io
import json
import shutil
import warnings

import numpy as np
import pytest
from PIL import Image

from ccmim_fast.cli import main
from ccmim_fast.data.composite import described
from ccmim_fast.data.index.indexed import open_images
from ccmim_fast.data.made import cutout
from ccmim_fast.evaluation.detection.instances import CocoSource, parts_of
from ccmim_fast.evaluation.masks.objects import MaskFolder


def picture(seed, height=60, width=48, hidden=(0, 255, 0)):
    """A disc of one colour; what its transparent pixels hold is another."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    inside = np.hypot((y - height / 2) / height, (x - width / 2) / width) < 0.4
    pixels = np.zeros((height, width, 4), np.uint8)
    pixels[:] = (*hidden, 0)
    pixels[inside] = (*generator.integers(0, 256, 3), 255)
    return Image.fromarray(pixels)


@pytest.fixture
def folders(tmp_path):
    """Four cut-outs of each of three kinds, one in a folder below, and three backgrounds: gray, small, with alpha."""
    cutouts, backgrounds = tmp_path / "cutouts", tmp_path / "backgrounds"
    backgrounds.mkdir()
    for number in range(12):
        path = (
            cutouts / "abc"[number % 3] / ("deeper" if number > 8 else "") / f"{number}.{'png' if number else 'webp'}"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path, **({} if number else {"lossless": True}))
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 256, (90, 140), np.uint8)).save(backgrounds / "gray.png")
    Image.fromarray(generator.integers(0, 256, (20, 9, 3), np.uint8)).save(backgrounds / "small.png")
    Image.fromarray(generator.integers(0, 256, (300, 200, 4), np.uint8)).save(backgrounds / "alpha.png")
    return tmp_path


def make(folders, *options, out="out", code=0):
    places = [str(folders / name) for name in ("cutouts", "backgrounds")]
    assert main(["data", "composite", *places, "--out", str(folders / out), *map(str, options)]) == code
    return folders / out


def files_of(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.png")}


def rows_of(out, part):
    return json.loads((out / "annotations" / f"instances_{part}.json").read_text())


def test_images_masks_boxes_and_labels_belong_together(folders):
    out = make(folders, "--samples", 9, "--test", 6, "--image-size", 32, 48)
    for part, count in zip(parts_of(str(out)), (9, 6)):
        source, coco = open_images(str(out / part)), CocoSource(str(out), part, train=True)
        masks = MaskFolder(out / "masks" / part, str(out / part), source)
        assert source.class_names == coco.class_names == ("a", "b", "c")
        assert len(source) == len(coco) == count
        assert np.bincount(source.labels_N).tolist() == [count // 3] * 3
        by_name = {coco.name(index): index for index in range(count)}
        for index in range(count):
            image_HW3, found = coco.sample(by_name[source.name(index)])
            mask_HW = masks.mask(index)
            assert image_HW3.shape == (32, 48, 3)
            assert (found.masks_NHW == mask_HW).all()
            y, x = np.nonzero(mask_HW)
            assert found.boxes_N4.tolist() == [[x.min(), y.min(), x.max() + 1, y.max() + 1]]
            assert found.labels_N.tolist() == [source.labels_N[index]]
            assert 0.4 * 32 - 2 <= max(np.ptp(x), np.ptp(y)) + 1 <= 0.8 * 32 + 1


def test_the_runs_are_those_of_the_mask():
    from faster_coco_eval import mask as library

    generator = np.random.default_rng(0)
    for corner in (False, True):
        mask_HW = generator.random((7, 5)) < 0.5
        mask_HW[0, 0] = corner
        said = described(mask_HW)
        runs = library.frPyObjects(said["segmentation"], 7, 5)
        assert (library.decode(runs) == mask_HW).all()
        assert said["area"] == mask_HW.sum()
        assert said["bbox"] == library.toBbox(runs).tolist()


def test_no_cutout_and_no_background_is_in_both_parts(folders):
    out = make(folders, "--samples", 60, "--test", 60, "--held-out", 0.5)
    for key, counts in (("cutout", (6, 6)), ("background", (1, 2))):
        used = [{image[key] for image in rows_of(out, part)["images"]} for part in ("train", "test")]
        assert not used[0] & used[1]
        assert tuple(map(len, used)) in (counts, counts[::-1])
    # Each image shows the cut-out that is named: its colour is nowhere else.
    for image in rows_of(out, "test")["images"]:
        name = image["file_name"]
        mask_HW = np.asarray(Image.open(out / "masks/test" / name)) > 0
        colours = np.asarray(Image.open(out / "test" / name))[mask_HW]
        colour = np.asarray(Image.open(folders / "cutouts" / image["cutout"]))[30, 24, :3]
        assert (colours == colour).all(axis=1).mean() > 0.7
        assert image["cutout"][0] == name[0]


def test_where_nothing_is_held_out_the_test_shows_the_same_pictures_elsewhere(folders):
    out = make(folders, "--samples", 60, "--test", 60, "--held-out", 0)
    shown = [{image["cutout"] for image in rows_of(out, part)["images"]} for part in ("train", "test")]
    assert shown[0] == shown[1]
    images = [{path.read_bytes() for path in (out / part).rglob("*.png")} for part in ("train", "test")]
    assert not images[0] & images[1]
    alone = make(folders, "--samples", 60, out="alone")
    assert {path.read_bytes() for path in (alone / "train").rglob("*.png")} == images[0]


def test_a_sample_depends_on_the_seed_and_its_number_alone(folders):
    whole = files_of(make(folders, "--samples", 9, "--workers", 1, out="whole"))
    first = files_of(make(folders, "--samples", 5, "--workers", 3, out="first"))
    assert len(first) == 10
    assert first.items() <= whole.items()
    assert files_of(make(folders, "--samples", 5, "--seed", 1, out="other")) != first


def test_classes_are_locked_away(folders):
    assert rows_of(make(folders, "--samples", 4, "--classes", "a", "c", out="1"), "train")["categories"] == [
        {"id": 1, "name": "a"},
        {"id": 2, "name": "c"},
    ]
    out = make(folders, "--samples", 4, "--without", "a", "c", out="2")
    assert [path.name for path in (out / "train").iterdir()] == ["b"]


@pytest.mark.parametrize(("options", "least", "most"), [([], 12, 28), (["--no-flip"], 0, 0)])
def test_half_of_the_objects_are_mirrored(folders, options, least, most):
    """Of a disc with a flag to its right, the flag is then at the left."""
    pixels = np.array(picture(0))
    pixels[10:20, 24:] = (255, 255, 255, 255)
    for name in "abc":
        shutil.rmtree(folders / "cutouts" / name)
    Image.fromarray(pixels).save(folders / "cutouts/flag.png")
    mirrored = 0
    for mask in (make(folders, "--samples", 40, *options) / "masks/train").iterdir():
        mask_HW = np.asarray(Image.open(mask)) > 0
        rows, columns = np.nonzero(mask_HW)
        middle = (columns.min() + columns.max()) / 2
        upper = rows < rows.min() + np.ptp(rows) // 3
        mirrored += columns[upper].mean() < middle
    assert least <= mirrored <= most


def test_flat_cutouts_have_no_labels(folders):
    flat = folders / "flat"
    flat.mkdir()
    for number in range(3):
        picture(number).save(flat / f"{number}.png")
    assert (
        main(
            ["data", "composite", str(flat), str(folders / "backgrounds"), "--out", str(folders / "out"), "--samples=7"]
        )
        == 0
    )
    assert open_images(str(folders / "out/train")).labels_N is None
    coco = CocoSource(str(folders / "out"), "train", train=True)
    assert (len(coco), coco.class_names) == (7, ("object",))


def test_what_is_of_no_use_is_left_out_and_told(folders, capsys):
    a = folders / "cutouts/a"
    picture(20).convert("RGB").save(a / "no-alpha.png")
    Image.new("RGBA", (40, 40), (9, 9, 9, 255)).save(a / "opaque.png")
    Image.new("RGBA", (40, 40), (9, 9, 9, 60)).save(a / "clear.png")
    picture(21, 12, 12).save(a / "tiny.png")
    line = np.zeros((200, 200, 4), np.uint8)
    line[range(200), range(200)] = 255
    Image.fromarray(line).save(a / "thin.png")
    (a / "cut.png").write_bytes((a / "3.png").read_bytes()[:-60])
    (a / "copy.png").write_bytes((a / "3.png").read_bytes())
    picture(22).save(folders / "cutouts/top.png")
    (folders / "cutouts/one").mkdir()
    picture(23).save(folders / "cutouts/one/1.png")
    (folders / "backgrounds/cut.png").write_bytes((folders / "backgrounds/gray.png").read_bytes()[:200])
    out = make(folders, "--samples", 6, "--test", 3)
    told = capsys.readouterr().err.splitlines()
    for words in (
        "no alpha channel: no cut-out; the first 'A/no-alpha.png'",
        "opaque everywhere: no cut-out; the first 'A/opaque.png'",
        "transparent everywhere: at no pixel is alpha at least a half; the first 'A/clear.png'",
        "smaller than the smallest object that is drawn; the first 'A/tiny.png'",
        "too thin: next to nothing is left of it at the smallest size; the first 'A/thin.png'",
        "the same pixels as another; the first 'A/copy.png'",
    ):
        assert [line for line in told if line == "1 left out: " + words.replace("A/", f"{a}/")], words
    assert any("top.png" in line for line in told)
    assert any(line.endswith("a class of one cut-out, where each part needs one; the first 'one'") for line in told)
    assert any(line.startswith("2 left out: image file is truncated; the first ") for line in told)
    assert [category["name"] for category in rows_of(out, "train")["categories"]] == ["a", "b", "c"]


def loops(pixels_hw4, background_HW3, alpha_hw, y, x):
    """Alpha compositing of whole numbers, pixel by pixel, in float64."""
    expected = background_HW3.astype(np.float64)
    for i in range(pixels_hw4.shape[0]):
        for j in range(pixels_hw4.shape[1]):
            share = alpha_hw[i, j] / 255
            for c in range(3):
                expected[y + i, x + j, c] = share * pixels_hw4[i, j, c] + (1 - share) * expected[y + i, x + j, c]
    return expected


def test_pasting_is_alpha_compositing_rounded_once():
    generator = np.random.default_rng(0)
    pixels_hw4 = generator.integers(0, 256, (9, 7, 4), np.uint8)
    pixels_hw4[0, :2, 3] = 127, 128
    background_HW3 = generator.integers(0, 256, (16, 16, 3), np.uint8)
    object_hw4 = cutout.resized(Image.fromarray(pixels_hw4), 9)  # as large as it is
    image_HW3, mask_HW = cutout.paste(background_HW3, object_hw4, 5, 4)
    expected = loops(pixels_hw4, background_HW3, pixels_hw4[..., 3].astype(np.float64), 5, 4)
    assert abs(image_HW3 - expected).max() <= 0.5 + 1e-4
    inside = np.zeros((16, 16), bool)
    inside[5:14, 4:11] = pixels_hw4[..., 3] >= 128
    assert (mask_HW == inside).all()


@pytest.mark.parametrize("side", [13, 40, 120])
def test_no_rim_has_the_colour_of_transparent_pixels(side):
    """A gray disc, whose transparent pixels are green, stays gray on gray of the same tone: at no pixel it differs."""
    image = picture(0)
    pixels = np.array(image)
    pixels[pixels[..., 3] > 0, :3] = 100
    object_hw4 = cutout.resized(Image.fromarray(pixels), side)
    image_HW3, _ = cutout.paste(np.full((128, 128, 3), 100, np.uint8), object_hw4, 2, 3)
    assert (image_HW3 == 100).all()
    # On another tone each pixel lies between the two.
    image_HW3, mask_HW = cutout.paste(np.full((128, 128, 3), 200, np.uint8), object_hw4, 2, 3)
    assert image_HW3.min() == 100
    assert image_HW3.max() == 200
    assert (image_HW3[mask_HW] <= 150).all()
    assert (image_HW3[~mask_HW] >= 150).all()


@pytest.mark.parametrize("size", [(80, 50), (64, 500), (900, 600)])
@pytest.mark.parametrize("image_size", [(32, 32), (24, 40)])
def test_a_crop_shows_the_background_alone(size, image_size):
    """To its edges, whatever the size and the place; of the ramps along both sides, none is turned or stretched."""
    y, x = np.mgrid[: size[0], : size[1]]
    ramps = np.stack([255 * y / (size[0] - 1), 255 * x / (size[1] - 1), np.full(size, 255.0)], axis=-1)
    image = Image.fromarray(np.rint(ramps).astype(np.uint8))
    for u_3 in ((0.001, 0.001, 0.001), (0.999, 0.999, 0.999), (0.5, 0.999, 0.001)):
        crop_HW3 = cutout.crop_background(image, image_size, np.array(u_3)).astype(np.float64)
        assert crop_HW3.shape == (*image_size, 3)
        assert (crop_HW3[..., 2] == 255).all()
        assert abs(np.diff(crop_HW3[..., 0], axis=1)).max() <= 1
        assert abs(np.diff(crop_HW3[..., 1], axis=0)).max() <= 1
        rows, columns = np.ptp(crop_HW3[:, 0, 0]) * size[0], np.ptp(crop_HW3[0, :, 1]) * size[1]
        assert rows / columns == pytest.approx(image_size[0] / image_size[1], rel=0.2)


def test_large_pictures_are_averaged_first_and_look_the_same():
    """Of a picture of many pixels a part is kept; what is drawn of it differs by little, also at the rim."""
    image = picture(5, 1800, 1440)
    file = io.BytesIO()
    image.save(file, "PNG")
    opened = cutout.open_cutout(file.getvalue(), 20, 40)
    assert max(opened.size) <= 2 * 4 * 40
    whole_hw4, kept_hw4 = (cutout.resized(one, 40) for one in (image.crop(image.getbbox()), opened))
    assert whole_hw4.shape == kept_hw4.shape
    assert abs(whole_hw4 - kept_hw4).max() <= 16
    assert abs(whole_hw4 - kept_hw4).mean() <= 0.5


def test_backgrounds_of_16_bits_are_scaled_and_orientation_counts(tmp_path):
    Image.fromarray(np.linspace(0, 65535, 64 * 80).astype(np.uint16).reshape(64, 80)).save(tmp_path / "1.png")
    opened = cutout.open_background((tmp_path / "1.png").read_bytes(), (32, 32))
    assert (opened.mode, opened.getpixel((0, 0)), opened.getpixel((79, 63))) == ("RGB", (0,) * 3, (255,) * 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    picture(1, 60, 40).save(tmp_path / "2.png", exif=exif)
    opened = cutout.open_cutout((tmp_path / "2.png").read_bytes(), 10, 50)
    assert opened.width > opened.height


@pytest.mark.parametrize("mode", ["LA", "P", "PA", "tRNS"])
def test_alpha_of_every_mode_is_read(mode, tmp_path):
    image = picture(3)
    if mode == "tRNS":
        pixels = np.asarray(image)
        flat = np.where(pixels[..., 3:] > 0, pixels[..., :3], 1).astype(np.uint8)
        Image.fromarray(flat).save(tmp_path / "1.png", transparency=(1, 1, 1))
    elif mode == "P":
        image.quantize(16, Image.Quantize.FASTOCTREE).save(tmp_path / "1.png")
    else:
        image.convert("LA").save(tmp_path / ("1.tif" if mode == "PA" else "1.png"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = cutout.open_cutout((tmp_path / "1.png" if mode != "PA" else tmp_path / "1.tif").read_bytes(), 10, 50)
    inside = np.asarray(image)[..., 3] > 0
    rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
    window = inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert (np.asarray(opened)[..., 3] > 127).tolist() == window.tolist()


MISTAKES = {
    "out exists": (["--out", "BASE"], 2, "is not empty; name a new folder"),
    "no out": ([], 2, "--out"),
    "class": (["--out", "NEW", "--classes", "aa"], 2, "--classes 'aa': no such class; did you mean 'a'?"),
    "without": (["--out", "NEW", "--without", "x"], 2, "--without 'x': no such class; did you mean "),
    "none left": (["--out", "NEW", "--without", "a", "b", "c"], 2, "no class is left"),
    "scale": (["--out", "NEW", "--scale", "0.8", "0.4"], 2, "--scale: 0.8 is more than 0.4; write the smaller one"),
    "scale of more": (["--out", "NEW", "--scale", "0.8", "1.5"], 2, "--scale: '1.5' must be a number above 0"),
    "size": (["--out", "NEW", "--image-size", "64", "64", "9"], 2, "3 numbers; write HEIGHT WIDTH"),
    "all held out": (["--out", "NEW", "--held-out", "nan"], 2, "--held-out: 'nan' must be a number above 0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(folders, capsys, name):
    options, code, words = MISTAKES[name]
    places = [str(folders / place) for place in ("cutouts", "backgrounds")]
    options = [option.replace("BASE", str(folders)).replace("NEW", str(folders / "new")) for option in options]
    assert main(["data", "composite", *places, "--samples", "3", *options]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error
    assert not [path for path in folders.iterdir() if path.name.startswith("new")]


@pytest.mark.parametrize("swapped", [False, True])
def test_folders_of_nothing_useful_are_told(folders, capsys, swapped):
    """Backgrounds in the place of cut-outs: none has alpha but one, whose pixels are opaque here and there."""
    empty = folders / "empty"
    empty.mkdir()
    places = [str(folders / "cutouts"), str(empty)]
    assert main(["data", "composite", *places[:: -1 if swapped else 1], "--out", str(folders / "new")]) == 3
    assert "empty" in capsys.readouterr().err.splitlines()[-1]


def test_one_background_cannot_be_in_both_parts(folders, capsys):
    for name in ("small.png", "alpha.png"):
        (folders / "backgrounds" / name).unlink()
    make(folders, "--samples", 3, "--test", 3, code=3)
    assert capsys.readouterr().err.endswith("backgrounds': no two backgrounds, one for each part, can be used\n")
    make(folders, "--samples", 3)
