"""Boxes, masks and pixels are resized, cropped and mirrored together."""

import numpy as np
import pytest
import torch
from torchvision.ops import masks_to_boxes

from ccmim_fast.config.evaluation import DetectConfig, EvalConfig, EvalDataConfig
from ccmim_fast.evaluation.detection.batches import ForTraining, resized_to_test
from ccmim_fast.evaluation.detection.instances import Instances

MEAN = (0.5, 0.25, 1.0)


def config(size=(64, 64), flip=True, **detect):
    return EvalConfig(data=EvalDataConfig(image_size=size, flip=flip), detect=DetectConfig(**detect))


RECIPES = {
    "short_side": config(short_sides=(40, 80, 120), long_side=150),
    "jitter": config(resize="jitter", jitter=(0.3, 2.0)),
}


def made(boxes=((10, 20, 50, 60), (60, 5, 90, 45)), size=(80, 100), crowd=(False, False)):
    """Each object is white in a channel of its own, before black."""
    image_HWC = np.zeros((*size, 3), dtype=np.uint8)
    masks_NHW = np.zeros((len(boxes), *size), dtype=bool)
    for number, (x0, y0, x1, y1) in enumerate(boxes):
        image_HWC[y0:y1, x0:x1, number] = 255
        masks_NHW[number, y0:y1, x0:x1] = True
    labels = np.arange(len(boxes))
    return image_HWC, Instances(np.array(boxes, dtype=np.float32), labels, masks_NHW, np.array(crowd))


@pytest.mark.parametrize("recipe", RECIPES)
def test_boxes_and_masks_follow_the_pixels(recipe):
    transform = ForTraining(RECIPES[recipe], (0.0, 0.0, 0.0))
    seen = 0
    for seed in range(20):
        torch.manual_seed(seed)
        image_CHW, target = transform(*made())
        assert image_CHW.dtype == torch.uint8
        assert target["masks"].shape[1:] == image_CHW.shape[1:]
        for box, label, mask_HW in zip(target["boxes"], target["labels"], target["masks"]):
            white_HW = image_CHW[label - 1] > 127
            # Pixels are interpolated, masks take the nearest: an edge may be a pixel off.
            assert (white_HW != mask_HW.bool()).sum() <= 2 * sum(white_HW.shape)
            edges = masks_to_boxes(mask_HW[None])[0] + torch.tensor([0, 0, 1, 1])
            assert (box - edges).abs().max() <= 1.01
            seen += 1
    assert seen > 20


def test_sides_are_those_of_the_recipe():
    sides, mirrored = set(), set()
    for seed in range(40):
        torch.manual_seed(seed)
        image_CHW, target = ForTraining(RECIPES["short_side"], MEAN)(*made())
        sides.add(tuple(image_CHW.shape[1:]))
        mirrored.add(bool(target["boxes"][0, 0] > target["boxes"][1, 0]))
    assert sides == {(40, 50), (80, 100), (120, 150)}  # the longer side, 150, is just allowed
    assert mirrored == {True, False}
    long = ForTraining(config(short_sides=(40, 80, 120), long_side=75, flip=False), MEAN)
    assert {tuple(long(*made())[0].shape[1:]) for _ in range(20)} == {(40, 50), (60, 75)}


def test_jitter_gives_one_size_padded_with_the_mean():
    transform = ForTraining(config(resize="jitter", jitter=(0.5, 0.5), flip=False), MEAN)
    image_CHW, target = transform(*made())
    assert image_CHW.shape == (3, 64, 64)
    padded_HW = (image_CHW == torch.tensor([127, 63, 255])[:, None, None]).all(0)
    assert padded_HW.sum() == 64 * 64 - 32 * 25  # the image is fitted into 64 x 64 and half of that
    assert not (target["masks"].bool() & padded_HW).any()


def test_boxes_are_drawn_around_what_a_crop_leaves():
    """An L whose upright part alone is in the crop: its box is not cut from the box of the whole."""
    transform = ForTraining(config((32, 32), resize="jitter", jitter=(3.0, 3.0), flip=False), MEAN)
    image_HWC, objects = made(boxes=((0, 0, 100, 100),), size=(100, 100), crowd=(False,))
    objects.masks_NHW[0, :90, 10:] = False
    narrow = 0
    for seed in range(60):
        torch.manual_seed(seed)
        target = transform(image_HWC, objects)[1]
        for box, mask_HW in zip(target["boxes"], target["masks"]):
            assert torch.equal(box, masks_to_boxes(mask_HW[None])[0] + torch.tensor([0, 0, 1, 1]))
            narrow += bool(box[2] - box[0] < 20)
    assert narrow


def test_crowds_and_what_is_cut_off_are_left_out():
    target = ForTraining(RECIPES["short_side"], MEAN)(*made(crowd=(True, False)))[1]
    assert target["labels"].tolist() == [2]
    transform = ForTraining(config((32, 32), resize="jitter", jitter=(4.0, 4.0)), MEAN)
    counts = set()
    for seed in range(30):
        torch.manual_seed(seed)
        target = transform(*made(boxes=((0, 0, 6, 6), (90, 70, 96, 76))))[1]
        assert target["boxes"].shape[1:] == (4,)
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
        counts.add(len(target["boxes"]))
    assert 0 in counts


def test_images_to_test_on_are_resized_alone():
    image_HWC, _ = made()
    assert resized_to_test(RECIPES["short_side"], image_HWC).shape == (3, 120, 150)
    assert resized_to_test(RECIPES["jitter"], image_HWC).shape == (3, 51, 64)
