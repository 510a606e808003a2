"""Labels follow their image exactly; sizes, crops and colours are mmsegmentation's; draws are keyed."""

# H height, W width

import colorsys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchvision.tv_tensors import Image, Mask

from ccmim_fast.config.evaluation import EvalConfig, EvalDataConfig, EvalTrainConfig, SegmentConfig
from ccmim_fast.data.made.shapes import ShapesSource
from ccmim_fast.data.stream.plan import Plan
from ccmim_fast.errors import DataError
from ccmim_fast.evaluation.segmentation import transforms
from ccmim_fast.evaluation.segmentation.scenes import IGNORED, Scenes
from ccmim_fast.evaluation.segmentation.transforms import (
    Augment,
    Pair,
    SceneLoader,
    distort,
    pair_of,
    saturated,
    scaled,
)
from ccmim_fast.ranks.session import Session

COLOUR = (200, 210, 220)


def plain(**changed):
    """No scaling but to 32 of 32 pixels, nothing refused."""
    return Augment(
        **{"size": (24, 20), "sides": (32, 999), "ratio": (1, 1), "most": 1, "flip": True, "colour": COLOUR} | changed
    )


def encoded(height=32, width=40):
    """Every pixel has a label of its own neighbourhood, and all three channels of the image say which."""
    labels_HW = torch.arange(height * width).view(height, width).remainder(251).to(torch.uint8)
    return Pair(Image(labels_HW.expand(3, -1, -1).clone()), Mask(labels_HW))


def test_labels_follow_the_image_exactly(monkeypatch):
    """A colour that encodes the label, cut and mirrored a hundred times; what is padded has the label of no class."""
    monkeypatch.setattr(transforms, "distort", lambda image_CHW, draws: image_CHW)
    augment = plain(size=(24, 48))
    seen = set()
    for key in range(100):
        pair = augment(encoded(), np.random.default_rng(key))
        assert pair.image_CHW.shape == (3, 24, 48)
        assert pair.labels_HW.shape == (24, 48)
        assert torch.equal(pair.image_CHW[1, :, :40], pair.labels_HW[:, :40])
        assert (pair.labels_HW[:, 40:] == IGNORED).all()
        assert pair.image_CHW[:, 5, 45].tolist() == list(COLOUR)
        seen.add(tuple(pair.labels_HW[0, :2].tolist()))
    # 9 places of the crop, mirrored or not.
    assert len(seen) == 18


def test_scaled_labels_lie_where_the_image_does():
    """Blocks of 8 pixels, twice as large and half as large: away from their edges each pixel shows its label."""
    blocks_HW = torch.arange(20).view(4, 5).repeat_interleave(8, 0).repeat_interleave(8, 1).to(torch.uint8)
    pair = Pair(Image(10 * blocks_HW.expand(3, -1, -1)), Mask(blocks_HW))
    for size in ((64, 80), (16, 20)):
        block = size[0] // 4
        resized = pair.resized(size)
        middles = slice(block // 2, None, block)
        assert resized.labels_HW.shape == size
        assert torch.equal(resized.labels_HW[middles, middles], torch.arange(20).view(4, 5).to(torch.uint8))
        assert torch.equal(resized.image_CHW[0, middles, middles], 10 * resized.labels_HW[middles, middles])
        assert set(resized.labels_HW.unique().tolist()) == set(range(20))


@pytest.mark.parametrize(
    ("size", "sides", "expected"),
    [
        ((683, 512), (512, 2048), (683, 512)),
        ((300, 400), (256, 1024), (256, 341)),
        ((100, 1000), (512, 2048), (205, 2048)),  # the long side is reached first
        ((1, 999), (2, 8), (1, 8)),
    ],
)
def test_images_are_as_large_as_fits(size, sides, expected):
    assert scaled(size, sides) == expected


def test_ratios_are_drawn_between_their_bounds(monkeypatch):
    sizes = []
    resized = Pair.resized
    monkeypatch.setattr(Pair, "resized", lambda pair, size: sizes.append(size) or resized(pair, size))
    augment = plain(sides=(32, 128), ratio=(0.5, 2))
    for key in range(200):
        augment(encoded(32, 32), np.random.default_rng(key))
    heights = [height for height, _ in sizes]
    assert all(height == width for height, width in sizes)
    assert min(heights) in range(16, 19)
    assert max(heights) in range(61, 65)
    assert np.mean(heights) == pytest.approx(40, abs=3.5)  # 1.25 x 32; four standard errors of a uniform draw


def test_crops_are_not_of_one_class_alone():
    """A tenth of the image is of another class: most crops miss it, but for those that are drawn again."""
    labels_HW = torch.zeros(32, 320, dtype=torch.uint8)
    labels_HW[:, :32] = 1
    labels_HW[:, 300:] = IGNORED
    pair = Pair(Image(torch.zeros(3, 32, 320, dtype=torch.uint8)), Mask(labels_HW))

    def varied(most):
        crops = [
            plain(size=(32, 64), most=most, flip=False)._crop(pair, np.random.default_rng(key)) for key in range(300)
        ]
        shares = [(crop.labels_HW == 1).sum() / (crop.labels_HW != IGNORED).sum() for crop in crops]
        return np.mean([0.25 <= share <= 0.75 for share in shares])

    # Of 257 places the first 17 show a quarter of class 1 at least; eleven draws find one of them in 53 % of the cases.
    assert varied(1) == pytest.approx(17 / 257, abs=0.06)
    assert varied(0.75) == pytest.approx(1 - (240 / 257) ** 11, abs=0.12)


def test_colours_change_and_labels_do_not():
    pair = Pair(
        Image(torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)), Mask(torch.zeros(32, 32, dtype=torch.uint8))
    )
    images = [distort(pair.image_CHW, np.random.default_rng(key)) for key in range(200)]
    assert all(image.dtype == torch.uint8 for image in images)
    same = np.mean([torch.equal(image, pair.image_CHW) for image in images])
    assert same == pytest.approx(1 / 16, abs=0.07)  # none of the four
    means = [image.float().mean().item() - 127.5 for image in images]
    assert 15 < max(means) < 32 + 64
    assert -32 - 64 < min(means) < -15


class Scripted:
    """Draws as they are written down: chances below a half happen."""

    def __init__(self, chances, values):
        self.random, self.uniform = iter(chances).__next__, lambda low, high: next(values)
        values = iter(values)


@pytest.mark.parametrize(
    ("chances", "expected"),
    [
        # Brightness, contrast last or not, contrast and saturation, or saturation and hue and contrast.
        ((0, 1, 0, 0, 1), (255, 203, 165)),  # (200, 100, 50) x 1.5 is cut at 255, then half as far from it
        ((0, 0, 0, 1, 0), (255, 225, 188)),  # (200, 150, 125) x 1.5
    ],
)
def test_contrast_comes_before_the_others_or_after_them(chances, expected):
    image_CHW = Image(torch.tensor([190, 90, 40], dtype=torch.uint8)[:, None, None])
    values = (10, 1.5, 0.5) if chances[1] else (10, 0.5, 1.5)
    found = distort(image_CHW, Scripted(chances, values)).flatten().tolist()
    assert found == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
def test_saturation_is_that_of_hsv(factor):
    pixels = torch.rand(3, 5, 4, dtype=torch.float64) * 255
    expected = torch.empty_like(pixels)
    for y in range(5):
        for x in range(4):
            hue, saturation, value = colorsys.rgb_to_hsv(*(pixels[:, y, x] / 255).tolist())
            expected[:, y, x] = 255 * torch.tensor(colorsys.hsv_to_rgb(hue, min(1, factor * saturation), value))
    torch.testing.assert_close(saturated(pixels, factor), expected)


def test_grey_and_black_have_no_saturation():
    pixels = torch.tensor([0.0, 100.0]).expand(3, 1, 2)
    torch.testing.assert_close(saturated(pixels, 1.5), pixels)


def scenes_of(source):
    labels = lambda index: np.full((32, 32), index % 3, np.uint8)  # noqa: E731
    return Scenes(source, ("a", "b", "c"), labels)


def stream(scenes, cursor, count, workers=1, batch=4):
    """The first batches of a loader without scaling, of 24 x 20 pixels."""
    data = EvalDataConfig(image_size=(24, 20), workers=workers, max_bad=0.2)
    segment = SegmentConfig(sides=(32, 999), ratio=(1, 1), most=1)
    config = EvalConfig(seed=7, data=data, segment=segment, train=EvalTrainConfig(batch_size=batch))
    mean = SimpleNamespace(mean=tuple(level / 255 for level in COLOUR))
    images, here = SimpleNamespace(source=scenes), Session(0, 1, torch.device("cpu"))
    batches = SceneLoader(SimpleNamespace(config=config, here=here, train=images, weights=mean)).stream(cursor)
    return [next(batches) for _ in range(count)]


def test_batches_depend_on_seed_epoch_and_sample_alone():
    """The third batch is the same for whoever begins there; another epoch shows the samples otherwise."""
    scenes = scenes_of(ShapesSource(0, 12, (32, 32), 3))
    first = stream(scenes, 0, 6)
    again = stream(scenes, 8, 1, workers=2)
    assert torch.equal(first[2].images_BCHW, again[0].images_BCHW)
    assert torch.equal(first[2].labels_BHW, again[0].labels_BHW)
    assert first[0].images_BCHW.shape == (4, 3, 24, 20)
    assert first[0].images_BCHW.dtype == first[0].labels_BHW.dtype == torch.uint8
    epochs = [torch.cat([batch.images_BCHW for batch in first[start : start + 3]]) for start in (0, 3)]
    assert not any(torch.equal(one, other) for one in epochs[0] for other in epochs[1])


def test_an_image_that_cannot_be_decoded_is_replaced_with_its_labels():
    source = ShapesSource(0, 12, (32, 32), 3)
    good = stream(scenes_of(source), 0, 3)
    decode = source.decode

    def broken(index):
        if index == 4:
            raise DataError("shape 4: broken")
        return decode(index)

    source.decode = broken
    bad = stream(scenes_of(source), 0, 3)
    changed = [
        (one, other)
        for whole, part in zip(good, bad)
        for one, other in zip(zip(*whole), zip(*part))
        if not torch.equal(one[0], other[0])
    ]
    [((_, wanted_HW), (_, shown_HW))] = changed
    # Not the labels of sample 4 with another image: those of the sample that is shown.
    shown = Plan(scenes_of(source), 7, 4).fallback(4, 0, 0).ids_B.item()
    assert wanted_HW.unique().tolist() == [4 % 3]
    assert shown_HW.unique().tolist() == [shown % 3] != [4 % 3]


def test_a_scene_whose_labels_are_wrong_is_replaced_like_a_bad_image():
    scenes = scenes_of(ShapesSource(0, 12, (32, 32), 3))
    labels = scenes.labels

    def wrong(index):
        if index == 4 or all_wrong:
            raise DataError("a.png: label 9 must be in 0..3")
        return labels(index)

    all_wrong, scenes.labels = False, wrong
    whole, shown = (stream(one, 0, 3) for one in (scenes_of(ShapesSource(0, 12, (32, 32), 3)), scenes))
    assert (
        sum(not torch.equal(*two) for one in zip(whole, shown) for two in zip(one[0].labels_BHW, one[1].labels_BHW))
        == 1
    )
    all_wrong = True
    with pytest.raises(DataError, match=r"more than data\.max_bad=0\.2, the last a.png: label 9 must be in 0\.\.3;"):
        stream(scenes, 0, 1)


def test_a_pair_has_its_images_own_pixels():
    scenes = scenes_of(ShapesSource(0, 4, (32, 32), 3))
    pair = pair_of(*scenes.sample(2))
    assert np.array_equal(pair.image_CHW.permute(1, 2, 0).numpy(), scenes.decode(2))
    assert pair.size == (32, 32)
