import pytest
import torch

from ccmim_fast.data.stream.batch import Batch
from ccmim_fast.errors import DataError, NumericsError
from ccmim_fast.evaluation.frozen.features import extract


def made(sizes=(4, 4, 3), labelled=True):
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        images = torch.randint(256, (size, 4, 4, 3), generator=generator, dtype=torch.uint8)
        ids = torch.arange(size)
        yield Batch(images, ids, torch.zeros_like(ids), images[:, 0, 0, 0].long() if labelled else None)


def encode(images_BHWC):
    """Two prefix tokens that are far from the patches (one token a pixel row)."""
    assert torch.is_inference_mode_enabled()
    patches = images_BHWC.double().flatten(2) / 255
    return torch.cat([torch.full_like(patches[:, :1], 7), torch.full_like(patches[:, :1], 9), patches], dim=1)


def test_average_of_the_patches_in_order():
    features, labels = extract(encode, made(), prefix=2)
    rows = [image for batch in made() for image in batch.images_BHWC.tolist()]
    expected = [[sum(row[i][c] for row in image) / 4 / 255 for i in range(4) for c in range(3)] for image in rows]
    torch.testing.assert_close(features, torch.tensor(expected))
    assert labels.tolist() == [image[0][0][0] for image in rows]
    assert labels.dtype == torch.int64


def test_cls_is_the_first_token():
    features, _ = extract(encode, made(), prefix=2, pool="cls")
    assert features.shape == (11, 12)
    assert (features == 7).all()


def test_features_can_be_trained_on():
    features, _ = extract(encode, made(sizes=(4,)), prefix=2)
    assert not features.is_inference()
    (features @ torch.ones(12, requires_grad=True)).sum().backward()


def test_without_labels():
    features, labels = extract(encode, made(labelled=False), prefix=2)
    assert len(features) == 11
    assert labels is None


def test_errors():
    with pytest.raises(DataError, match="no images"):
        extract(encode, [])
    with pytest.raises(ValueError, match="pool='cls' with prefix=0"):
        extract(encode, made(), prefix=0, pool="cls")
    with pytest.raises(ValueError, match="pool='max'"):
        extract(encode, made(), pool="max")
    with pytest.raises(NumericsError, match="features of 11 of 11 images"):
        extract(lambda images: encode(images) * torch.nan, made())
