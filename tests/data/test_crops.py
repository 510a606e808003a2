"""Crops: torchvision's rule, keyed by (seed, epoch, sample id)."""

import math

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from ccmim_fast.data.stream.crops import crop_boxes, flips
from ccmim_kernels.philox import STREAM_CROP, philox_4x32, stream_key, to_unit

SCALE, RATIO = (0.2, 1.0), (0.75, 4 / 3)


def sizes_of(count, height, width):
    return np.tile(np.array([height, width], dtype=np.int32), (count, 1))


def test_a_box_depends_on_seed_epoch_and_id_alone():
    ids = np.arange(1000)
    sizes = np.random.default_rng(0).integers(1, 600, (1000, 2)).astype(np.int32)
    boxes = crop_boxes(7, 3, ids, sizes, SCALE, RATIO)
    shuffled = np.random.default_rng(1).permutation(1000)
    assert (crop_boxes(7, 3, ids[shuffled], sizes[shuffled], SCALE, RATIO) == boxes[shuffled]).all()
    for index in (0, 17, 999):
        alone = crop_boxes(7, 3, ids[index : index + 1], sizes[index : index + 1], SCALE, RATIO)
        assert (alone[0] == boxes[index]).all()
    assert boxes.dtype == np.int64
    random = sizes.min(axis=1) > 0.7 * sizes.max(axis=1)  # longer images mostly have the central crop, each time
    for other in (crop_boxes(8, 3, ids, sizes, SCALE, RATIO), crop_boxes(7, 4, ids, sizes, SCALE, RATIO)):
        assert (other == boxes).all(axis=1)[random].mean() < 0.05


@pytest.mark.parametrize("size", [(1, 1), (5000, 1), (1, 5000), (2, 3), (300, 400), (400, 300), (37, 500)])
@pytest.mark.parametrize(("scale", "ratio"), [(SCALE, RATIO), ((0.01, 0.02), (0.1, 0.2)), ((1.0, 1.0), (1.0, 1.0))])
@pytest.mark.parametrize("rule", ["torchvision", "mae"])
def test_boxes_lie_in_the_image(size, scale, ratio, rule):
    y, x, height, width = crop_boxes(0, 0, np.arange(500), sizes_of(500, *size), scale, ratio, rule).T
    assert (y >= 0).all()
    assert (x >= 0).all()
    assert (height >= 1).all()
    assert (width >= 1).all()
    assert (y + height <= size[0]).all()
    assert (x + width <= size[1]).all()


def test_area_is_uniform_and_aspect_log_uniform():
    # A square image under ratios near 1 rejects next to nothing, so the draws show through.
    count = 20000
    y, _, height, width = crop_boxes(1, 2, np.arange(count), sizes_of(count, 4000, 4000), (0.2, 0.7), RATIO).T
    limit = 1.63 / math.sqrt(count)  # Kolmogorov-Smirnov, 1 %
    steps = (np.arange(count) + 0.5) / count
    area = np.sort((height * width / 4000**2 - 0.2) / 0.5)
    assert abs(area - steps).max() < limit
    aspect = np.sort((np.log(width / height) - math.log(RATIO[0])) / math.log(RATIO[1] / RATIO[0]))
    assert abs(aspect - steps).max() < limit
    place = np.sort(y / (4000 - height))
    assert abs(place - steps).max() < limit


def scripted_torchvision(size, uniforms, monkeypatch):
    """Return torchvision's box for one image; `uniforms` [10, 4] replace its random numbers: area, aspect, y, x."""
    state = {"attempt": -1, "word": 0}

    def uniform_(tensor, low, high):
        if state["word"] % 2 == 0:
            state["attempt"] += 1
        value = uniforms[state["attempt"]][state["word"] % 2]
        state["word"] += 1
        return tensor.fill_(low + value * (high - low))

    places = iter((2, 3))

    def randint(low, high, size):
        return torch.tensor([low + int(uniforms[state["attempt"]][next(places)] * (high - low))])

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "uniform_", uniform_)
        patch.setattr(torch, "randint", randint)
        return RandomResizedCrop.get_params(torch.empty(3, *size), list(SCALE), list(RATIO))


def test_boxes_are_torchvisions(monkeypatch):
    sizes = np.random.default_rng(5).integers(1, 500, (400, 2)).astype(np.int32)
    sizes[:6] = [[1, 1], [5000, 1], [1, 5000], [10, 100], [100, 10], [3, 2]]
    ids = np.arange(400) + 2**33  # both words of an id count
    boxes = crop_boxes(11, 5, ids, sizes, SCALE, RATIO)
    key = stream_key(11, STREAM_CROP)
    torch.set_default_dtype(torch.float64)  # torchvision draws in the default type
    try:
        for index, sample in enumerate(ids.tolist()):
            counter = torch.arange(10), torch.tensor(sample & 0xFFFFFFFF), torch.tensor(sample >> 32), torch.tensor(5)
            uniforms = torch.stack([to_unit(word) for word in philox_4x32(key, *counter)], dim=1).tolist()
            expected = scripted_torchvision(sizes[index].tolist(), uniforms, monkeypatch)
            assert tuple(boxes[index]) == tuple(expected), sizes[index]
    finally:
        torch.set_default_dtype(torch.float32)


def test_maes_boxes_are_drawn_once_and_cut_to_the_image():
    """One draw of area, aspect and place, in loops; sides beyond the image become the image's."""
    sizes = np.random.default_rng(6).integers(2, 500, (400, 2)).astype(np.int32)
    sizes[:4] = [[1, 1], [5000, 1], [10, 100], [100, 10]]
    ids = np.arange(400) + 2**33
    boxes = crop_boxes(11, 5, ids, sizes, (0.08, 1.0), RATIO, "mae")
    cut = 0
    for box, sample, (height, width) in zip(boxes.tolist(), ids.tolist(), sizes.tolist()):
        counter = torch.tensor(0), torch.tensor(sample & 0xFFFFFFFF), torch.tensor(sample >> 32), torch.tensor(5)
        area, aspect, y, x = (to_unit(word).item() for word in philox_4x32(stream_key(11, STREAM_CROP), *counter))
        area = height * width * (0.08 + 0.92 * area)
        aspect = math.exp(math.log(0.75) + aspect * (math.log(4 / 3) - math.log(0.75)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        cut += w > width or h > height
        w, h = min(max(1, w), width), min(max(1, h), height)
        assert box == [int(y * (height - h + 1)), int(x * (width - w + 1)), h, w]
    assert cut > 100
    other = crop_boxes(11, 6, ids, sizes, (0.08, 1.0), RATIO, "mae")
    assert (other == boxes).all(axis=1).mean() < 0.05


@pytest.mark.parametrize(
    ("size", "rule", "mean"),
    [
        ((375, 500), "mae", 0.519),
        ((375, 500), "torchvision", 0.433),
        ((500, 375), "mae", 0.519),
        ((224, 224), "mae", 0.534),
        ((224, 224), "torchvision", 0.480),
    ],
)
def test_mean_areas_of_both_rules(size, rule, mean):
    """Of 0.08 to 1 of an image. Figures of 200,000 draws of MAE's and of torchvision's own classes."""
    count = 40000 if rule == "torchvision" else 400000  # of which the mean deviates by 0.0004
    boxes = crop_boxes(0, 0, np.arange(count), sizes_of(count, *size), (0.08, 1.0), RATIO, rule)
    near = 0.006 if rule == "torchvision" else 0.0009
    assert boxes[:, 2:].prod(axis=1).mean() / math.prod(size) == pytest.approx(mean, abs=near)


def test_flips_are_keyed_fair_and_independent_of_the_crop():
    ids = np.arange(20000)
    flipped = flips(0, 0, ids)
    assert flipped.dtype == bool
    assert abs(flipped.mean() - 0.5) < 0.015  # four standard deviations
    assert (flips(0, 0, ids[500:600]) == flipped[500:600]).all()
    assert abs((flips(0, 1, ids) == flipped).mean() - 0.5) < 0.015
    area = crop_boxes(0, 0, ids, sizes_of(len(ids), 1000, 1000), SCALE, RATIO)[:, 2:].prod(axis=1)
    assert abs(np.corrcoef(flipped, area)[0, 1]) < 0.03
