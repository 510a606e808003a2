import pytest
import torch

from ccmim_fast.evaluation.masks.objects import object_leakage, object_patches, score_auroc
from ccmim_fast.evaluation.masks.scores import score_entropy, top_share


def auroc_by_pairs(scores, objects):
    per_image = []
    for row, flags in zip(scores.tolist(), objects.tolist()):
        inside = [s for s, o in zip(row, flags) if o]
        outside = [s for s, o in zip(row, flags) if not o]
        if inside and outside:
            wins = sum((a > b) + 0.5 * (a == b) for a in inside for b in outside)
            per_image.append(wins / len(inside) / len(outside))
    return sum(per_image) / len(per_image)


@pytest.mark.parametrize(("images", "patches"), [(1, 2), (7, 49), (5, 196)])
@pytest.mark.parametrize("levels", [3, 10**6])
def test_auroc_equals_counting_pairs(images, patches, levels):
    """Three levels: nearly everything ties. Rows of one kind only are left out."""
    generator = torch.Generator().manual_seed(images)
    scores = torch.randint(levels, (images, patches), generator=generator).float() / levels
    objects = torch.rand(images, patches, generator=generator) < 0.3
    objects[0, 0], objects[0, 1] = True, False
    if images > 2:
        objects[1], objects[2] = False, True
    assert score_auroc(scores, objects) == pytest.approx(auroc_by_pairs(scores, objects), abs=1e-12)


def test_auroc_of_known_scores():
    objects = torch.tensor([[True, True, False, False]])
    assert score_auroc(torch.tensor([[4.0, 3, 2, 1]]), objects) == 1.0
    assert score_auroc(torch.tensor([[1.0, 2, 3, 4]]), objects) == 0.0
    assert score_auroc(torch.full((1, 4), 0.25), objects) == 0.5


def test_auroc_takes_scores_that_are_not_contiguous():
    scores = torch.rand(9, 4, generator=torch.Generator().manual_seed(0)).T
    objects = torch.arange(9).expand(4, 9) < 3
    assert score_auroc(scores, objects) == pytest.approx(auroc_by_pairs(scores, objects), abs=1e-12)


def test_auroc_errors():
    with pytest.raises(ValueError, match="none of 2 images has both"):
        score_auroc(torch.rand(2, 4), torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="NaN"):
        score_auroc(torch.tensor([[torch.nan, 1.0]]), torch.tensor([[True, False]]))


def test_leakage_equals_counting():
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(6, 20, generator=generator) < 0.75
    objects = torch.rand(6, 20, generator=generator) < 0.3
    seen = total = 0
    for mask_row, object_row in zip(mask.tolist(), objects.tolist()):
        for hidden, is_object in zip(mask_row, object_row):
            total += is_object
            seen += is_object and not hidden
    assert object_leakage(mask, objects) == pytest.approx(seen / total / (1 - mask.float().mean()))


def test_leakage_at_its_marks():
    objects = torch.arange(16).expand(500, 16) < 4
    assert object_leakage(objects, objects) == 0.0
    assert object_leakage(~objects, objects) == 4.0
    keys = torch.rand(500, 16, generator=torch.Generator().manual_seed(0))
    random = keys.argsort(dim=1).argsort(dim=1) < 12
    # 2,000 object patches, each visible with p = 1/4: a standard deviation of at most 0.04.
    assert object_leakage(random, objects) == pytest.approx(1.0, abs=0.12)


def test_leakage_errors():
    objects = torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="none of 1 images has a visible patch"):
        object_leakage(objects, objects)
    with pytest.raises(ValueError, match="none of 1 images has an object patch"):
        object_leakage(~objects, ~objects)


@pytest.mark.parametrize(("height", "width", "patch"), [(8, 12, 4), (6, 3, 3), (4, 6, 2), (2, 2, 1)])
def test_object_patches_equals_counting_pixels(height, width, patch):
    masks = torch.rand(5, height, width, generator=torch.Generator().manual_seed(patch)) < 0.5
    expected = []
    for mask in masks.tolist():
        row = []
        for top in range(0, height, patch):
            for left in range(0, width, patch):
                count = sum(mask[top + i][left + j] for i in range(patch) for j in range(patch))
                row.append(count >= patch * patch / 2)
        expected.append(row)
    assert object_patches(masks, patch).tolist() == expected


def test_object_patches_exactly_half_is_object():
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[:, :2, :2] = True
    mask[:, :, 2:] = torch.tensor([True, False])
    assert object_patches(mask, 2).tolist() == [[True, True, False, True]]


def test_object_patches_error():
    with pytest.raises(ValueError, match="patch=5 must divide the image's 8 x 10"):
        object_patches(torch.zeros(1, 8, 10, dtype=torch.bool), 5)


def test_entropy_and_top_share_at_their_marks():
    alike, one = torch.full((2, 16), 1 / 16), torch.eye(16)[:2]
    assert score_entropy(alike) == pytest.approx(1.0)
    assert score_entropy(one) == 0.0
    assert top_share(alike) == pytest.approx(0.25)
    assert top_share(one) == 1.0
    # Half of the patches share all: log 8 of log 16, and half of it in a quarter.
    half = (torch.arange(16) < 8).float()[None] / 8
    assert score_entropy(half) == pytest.approx(0.75)
    assert top_share(half) == pytest.approx(0.5)
    assert top_share(torch.tensor([[0.7, 0.2, 0.1]])) == pytest.approx(0.7)  # of 3 patches 1, though it is a third
