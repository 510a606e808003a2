"""Both loaders carry out the same plan, go on where they stopped, and name what they cannot read."""

import sys
import typing
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from ccmim_fast.config.schema import DataConfig
from ccmim_fast.data.build import build_loader, build_source
from ccmim_fast.data.index.indexed import IndexedSource, open_images
from ccmim_fast.data.made.photos import PhotosSource
from ccmim_fast.data.made.shapes import ShapesSource
from ccmim_fast.data.stream import dali_loader
from ccmim_fast.data.stream.crops import crop_boxes
from ccmim_fast.data.stream.dali_loader import DaliLoader
from ccmim_fast.data.stream.torch_loader import TorchLoader, crop_and_resize, evaluation_batches, resize
from ccmim_fast.errors import ConfigError, DataError, MachineError
from ccmim_fast.registry import IMAGE_SOURCES, LOADERS

needs_dali = pytest.mark.skipif(not dali_loader.is_installed(), reason="DALI is not installed")
both = pytest.mark.parametrize("kind", ["torch", pytest.param("dali", marks=needs_dali)])
SIZE = (40, 48)


@pytest.fixture(scope="module")
def source(photo_folder):
    return open_images(str(photo_folder))


def make_loader(source, kind, global_batch=8, seed=0, device="cpu", image_size=SIZE, workers=2, **division):
    data = DataConfig(loader=kind, image_size=image_size, workers=workers, flip=True, channels=source.channels)
    return build_loader(source, data, seed, global_batch, device=device, **division)


def take(loader, count, cursor=0):
    """Return the first `count` batches from the position `cursor` on."""
    stream = loader.stream(cursor)
    batches = list(islice(stream, count))
    stream.close()
    return batches


def images_by_id(batches):
    return {int(i): image.clone() for batch in batches for i, image in zip(batch.ids_B, batch.images_BHWC)}


@both
def test_batches_are_as_promised(source, kind):
    batches = take(make_loader(source, kind), 3)
    for batch in batches:
        assert batch.images_BHWC.shape == (8, *SIZE, 3)
        assert batch.images_BHWC.dtype == torch.uint8
        assert batch.images_BHWC.is_contiguous()
        assert batch.ids_B.dtype == batch.epochs_B.dtype == batch.labels_B.dtype == torch.int64
        assert batch.labels_B.tolist() == source.labels_N[batch.ids_B].tolist()
    assert sorted(torch.cat([batch.ids_B for batch in batches]).tolist()[:22]) == list(range(22))
    assert torch.cat([batch.epochs_B for batch in batches]).tolist() == [0] * 22 + [1] * 2


@both
@pytest.mark.parametrize("rule", ["torchvision", "mae"])
def test_crops_follow_the_rule(source, kind, rule):
    data = DataConfig(loader=kind, image_size=SIZE, workers=1, crop_scale=(0.08, 1.0), crop_rule=rule)
    [batch] = take(build_loader(source, data, 3, 8), 1)
    sizes_B2 = source.sizes_N2[batch.host_ids_B]
    boxes_B4 = crop_boxes(3, 0, batch.host_ids_B, sizes_B2, (0.08, 1.0), (0.75, 4 / 3), rule)
    np.testing.assert_allclose(batch.boxes_B4 * np.tile(sizes_B2, 2), boxes_B4)
    for image_HWC, index, box_4 in zip(batch.images_BHWC, batch.host_ids_B.tolist(), boxes_B4):
        expected_HWC = crop_and_resize(source.decode(index), box_4, False, SIZE)
        assert (image_HWC.int() - torch.from_numpy(expected_HWC.copy()).int()).abs().float().mean() < 1


@both
def test_the_stream_goes_on_at_any_place(source, kind):
    """Other batch sizes too give, pixel for pixel, the uninterrupted stream at these positions."""

    def joined(batches):
        names = ("images_BHWC", "ids_B", "epochs_B", "labels_B", "boxes_B4")
        return [torch.cat([getattr(batch, name) for batch in batches]) for name in names]

    whole = joined(take(make_loader(source, kind, 8, accumulate=2), 14))
    for cursor, batch, accumulate in ((24, 8, 2), (40, 5, 1), (3, 20, 1)):
        loader = make_loader(source, kind, batch, accumulate=accumulate)
        rest = joined(take(loader, 2, cursor))
        for part, expected in zip(rest, whole, strict=True):
            assert torch.equal(part, expected[cursor : cursor + len(part)])


@both
def test_pixels_do_not_depend_on_the_division(source, kind):
    expected = images_by_id(take(make_loader(source, kind, global_batch=12), 1, cursor=24))
    assert len(expected) == 12
    for accumulate, world_size in ((2, 1), (1, 3), (2, 2)):
        found = {}
        for rank in range(world_size):
            loader = make_loader(source, kind, 12, accumulate=accumulate, rank=rank, world_size=world_size)
            found |= images_by_id(take(loader, accumulate, cursor=24))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[i], expected[i]) for i in expected)


@both
def test_a_batch_is_not_overwritten_by_the_next(source, kind):
    loader = make_loader(source, kind, global_batch=2)
    kept, copies = [], []
    for batch in take(loader, 11):
        kept.append(batch.images_BHWC)
        copies.append(batch.images_BHWC.clone())
    assert len(kept) == 11
    assert all(torch.equal(image, copy) for image, copy in zip(kept, copies))


@both
def test_a_stream_can_be_left(source, kind):
    loader = make_loader(source, kind, global_batch=2)
    expected = take(loader, 4)
    left, other = loader.stream(0), loader.stream(0)
    for index in range(3):
        assert torch.equal(next(left).images_BHWC, expected[index].images_BHWC)
        assert torch.equal(next(other).images_BHWC, expected[index].images_BHWC)
    left.close()
    assert torch.equal(next(other).images_BHWC, expected[3].images_BHWC)
    other.close()


@needs_dali
@pytest.mark.parametrize("made", [None, ShapesSource, PhotosSource])
def test_loaders_agree(source, made):
    images = source if made is None else made(0, 20, (64, 80))
    expected, found = (
        images_by_id(take(make_loader(images, kind, 20, seed=5), 1, cursor=40)) for kind in ("torch", "dali")
    )
    assert expected.keys() == found.keys()
    for index, image in expected.items():
        difference = (image.int() - found[index].int()).abs().float()
        # Pillow rounds between its two passes, DALI does not: more than one level apart only at hard edges.
        assert difference.mean() < 0.6, index
        assert difference.max() < 24, index


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@both
def test_batches_on_the_gpu_are_the_same(source, kind):
    expected = images_by_id(take(make_loader(source, "torch", 20), 1))
    found = images_by_id(take(make_loader(source, kind, 20, device="cuda"), 1))
    for index, image in expected.items():
        assert found[index].is_cuda
        assert (image.int() - found[index].cpu().int()).abs().float().mean() <= 2  # faults.md, row 3


def test_torch_loader_cuts_resizes_and_mirrors(source):
    loader = make_loader(source, "torch", 22)
    (batch,), micro = take(loader, 1), next(loader.plan.micro_batches(0))
    assert {*micro.flips_B.tolist()} == {True, False}
    for image, index, _, (y, x, height, width), flipped in zip(batch.images_BHWC, *micro, strict=True):
        whole = Image.fromarray(source.decode(index))
        expected = whole.crop((x, y, x + width, y + height)).resize(SIZE[::-1], Image.Resampling.BICUBIC)
        if flipped:
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        assert_close(image.numpy(), expected)


def assert_close(image, expected):
    """Compare with Pillow's pixels: the filter is the same, its weights are rounded otherwise."""
    difference = abs(image.astype(int) - np.asarray(expected))
    assert difference.mean() < 0.4
    assert difference.max() <= 12


@pytest.mark.parametrize("size", [(300, 400), (224, 224), (17, 900), (1, 1)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_resizing_is_pillows(photograph, size, mode):
    image = np.asarray(photograph.convert(mode)).reshape(300, 400, -1)
    found = resize(image, size)
    assert found.shape == (*size, image.shape[2])
    assert_close(
        found.squeeze(), np.asarray(photograph.convert(mode).resize(size[::-1], Image.Resampling.BICUBIC)).squeeze()
    )
    if size == (300, 400):
        assert (found == image).all()


def test_any_number_of_channels_is_resized_alike():
    image = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    box = np.array([3, 2, 20, 15])
    expected = crop_and_resize(image, box, True, SIZE)
    five = crop_and_resize(image[..., [0, 1, 2, 1, 0]], box, True, SIZE)
    assert (five == expected[..., [0, 1, 2, 1, 0]]).all()
    assert (crop_and_resize(image[..., 1:2], box, True, SIZE) == expected[..., 1:2]).all()


@both
@pytest.mark.parametrize("size", [(1, 1), (5000, 1), (1, 5000)])
def test_extreme_sizes_load(tmp_path, kind, size):
    for index in range(3):
        Image.fromarray(np.full((*size, 3), 50 * index, dtype=np.uint8)).save(tmp_path / f"{index}.jpg")
    (batch,) = take(make_loader(open_images(str(tmp_path)), kind, 3), 1, cursor=6)
    assert batch.epochs_B.tolist() == [2, 2, 2]
    assert (batch.images_BHWC == batch.images_BHWC[:, :1, :1, :1]).all()
    assert (batch.images_BHWC[:, 0, 0, 0].int() - 50 * batch.ids_B).abs().max() <= 1
    assert batch.labels_B is None


def test_evaluation_shows_every_image_whole_and_once(source):
    batches = list(evaluation_batches(source, SIZE, 5, torch.device("cpu")))
    assert [len(batch.ids_B) for batch in batches] == [5, 5, 5, 5, 2]
    assert torch.cat([batch.ids_B for batch in batches]).tolist() == list(range(22))
    assert torch.cat([batch.labels_B for batch in batches]).tolist() == source.labels_N.tolist()
    images = torch.cat([batch.images_BHWC for batch in batches])
    for index in (0, 21):
        expected = Image.fromarray(source.decode(index)).resize(SIZE[::-1], Image.Resampling.BICUBIC)
        assert_close(images[index].numpy(), expected)


def test_evaluation_shows_the_middle_as_a_resize_and_a_central_crop_do(source):
    """The crop is MAE's: the shorter side to 256, then the central 224, here of an eighth, up to one rounded pixel."""
    side = 28
    batches = list(evaluation_batches(source, (side, side), 22, torch.device("cpu"), central=0.875))
    for index in (0, 21):
        image = Image.fromarray(source.decode(index))
        resized = v2.Resize(round(side / 0.875), v2.InterpolationMode.BICUBIC)(image)
        expected = np.asarray(v2.CenterCrop(side)(resized), dtype=float)
        found = batches[0].images_BHWC[index].numpy().astype(float)
        whole = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC), dtype=float)
        assert abs(found - expected).mean() < 0.5 * abs(whole - expected).mean()


def test_evaluation_by_parts_shows_every_image_once(source):
    parts = [evaluation_batches(source, SIZE, 4, torch.device("cpu"), part=(rank, 3)) for rank in range(3)]
    ids = [torch.cat([batch.ids_B for batch in part]).tolist() for part in parts]
    assert ids == [list(range(rank, 22, 3)) for rank in range(3)]


def test_sources_are_built_from_the_configuration(photo_folder, tmp_path):
    folder = build_source(DataConfig(root=str(photo_folder), channels=1), seed=0)
    assert isinstance(folder, IndexedSource)
    assert folder.decode(0).shape[2] == 1
    shapes = build_source(DataConfig("shapes", str(tmp_path), image_size=SIZE, samples=6, classes=3), seed=1)
    assert (shapes.decode(2) == ShapesSource(1, 6, SIZE, 3).decode(2)).all()
    photos = build_source(DataConfig("photos", image_size=SIZE, samples=6), seed=1)
    assert (photos.decode(2) == PhotosSource(1, 6, SIZE).decode(2)).all()
    with pytest.raises(ConfigError, match=r"channels=4 must be 3 for data\.source=shapes"):
        build_source(DataConfig("shapes", channels=4), seed=0)
    with pytest.raises(DataError, match=r"no folder ''; set data\.root"):
        build_source(DataConfig(), seed=0)


def test_auto_is_dali_for_files_where_it_is_installed(source, monkeypatch):
    made = ShapesSource(0, 20, SIZE)
    assert isinstance(make_loader(made, "auto"), TorchLoader)
    monkeypatch.setattr(dali_loader, "is_installed", lambda: False)
    assert isinstance(make_loader(source, "auto"), TorchLoader)
    if "nvidia.dali" in sys.modules or dali_loader.importlib.util.find_spec("nvidia"):
        monkeypatch.setattr(dali_loader, "is_installed", lambda: True)
        assert isinstance(make_loader(source, "auto"), DaliLoader)


def test_faults_of_the_configuration_are_one_line(source, monkeypatch):
    with pytest.raises(DataError, match=r"22 images are fewer than train\.batch_size=32"):
        make_loader(source, "torch", 32)
    monkeypatch.setitem(sys.modules, "nvidia.dali.plugin.pytorch", None)
    with pytest.raises(MachineError, match=r"data\.loader=dali needs DALI .*pip install nvidia-dali-cuda130"):
        make_loader(source, "dali")


def test_dali_refuses_other_channel_counts(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((6, 7, 5), dtype=np.uint8))
    five = open_images(str(tmp_path), channels=5)
    with pytest.raises(ConfigError, match=r"reads 1 or 3 channels, not 5; set data\.loader=torch"):
        make_loader(five, "dali", 1)
    (batch,) = take(make_loader(five, "auto", 1), 1)
    assert batch.images_BHWC.shape == (1, *SIZE, 5)


def test_the_settings_name_the_registries():
    hints = typing.get_type_hints(DataConfig)
    assert set(typing.get_args(hints["loader"])) == {"auto", *LOADERS}
    assert set(typing.get_args(hints["source"])) == set(IMAGE_SOURCES)
