"""Generated images are pure, balanced, and have exact masks."""

import os

import numpy as np
import pytest
from PIL import Image

from ccmim_fast.data.made import photos as photos_module
from ccmim_fast.data.made import shapes as shapes_module
from ccmim_fast.data.made.base import balanced_labels
from ccmim_fast.data.made.photos import PhotosSource
from ccmim_fast.data.made.shapes import ShapesSource
from ccmim_fast.errors import ConfigError

SIZE = (48, 64)


def background_of(source, index):
    """Return the image without its object, [H, W, 3] uint8."""
    return np.rint(source._draw_background(index, source._parameters(index))).astype(np.uint8)


@pytest.mark.parametrize("background", ["plain", "textured"])
def test_an_image_depends_on_seed_and_id_alone(background):
    source = ShapesSource(3, 40, SIZE, background=background)
    longer = ShapesSource(3, 60, SIZE, background=background)
    assert (longer.labels_N[:40] == source.labels_N).all()
    for index in (39, 0, 7):
        assert (source.decode(index) == longer.decode(index)).all()
        assert (source.decode(index) != ShapesSource(4, 40, SIZE, background=background).decode(index)).any()
    assert len({source.decode(index).tobytes() for index in range(40)}) == 40
    assert source.decode(0).shape == (*SIZE, 3)
    assert source.decode(0).dtype == np.uint8


@pytest.mark.parametrize("background", ["plain", "textured"])
def test_pixels_outside_the_mask_are_the_background(background):
    source = ShapesSource(0, 60, SIZE, background=background)
    for index in range(60):
        image, mask, alone = source.decode(index), source.mask(index), background_of(source, index)
        assert mask.dtype == bool
        assert mask.shape == SIZE
        assert (image[~mask] == alone[~mask]).all()
        # The texture's second colour is half a range away from the first: at most one of them is near the background.
        assert (image[mask] != alone[mask]).any(axis=1).mean() > 0.9
        assert (np.ptp(image[mask].astype(int), axis=0) > 60).all()
        y0, x0, y1, x1 = source.box(index)
        assert mask[y0:y1, x0:x1].sum() == mask.sum()
        assert mask[y0].any()
        assert mask[y1 - 1].any()
        assert mask[:, x0].any()
        assert mask[:, x1 - 1].any()


def crossing_number_mask(source, index, corners):
    """Return the mask of a polygon, `corners` [n, 2] in units of the radius, by counting edges."""
    parameters = source._parameters(index)
    radius = min(SIZE) * (1 + parameters.radius / 2) / 4
    centre_y = radius + parameters.y * (SIZE[0] - 2 * radius)
    centre_x = radius + parameters.x * (SIZE[1] - 2 * radius)
    angle = np.pi / 6 * (parameters.rotation - 0.5)
    u, v = corners.T * radius
    corner_x, corner_y = (
        centre_x + np.cos(angle) * u - np.sin(angle) * v,
        centre_y + np.sin(angle) * u + np.cos(angle) * v,
    )
    y = (np.arange(SIZE[0] * 3)[:, None] + 0.5) / 3
    x = (np.arange(SIZE[1] * 3)[None] + 0.5) / 3
    inside = np.zeros((SIZE[0] * 3, SIZE[1] * 3), dtype=bool)
    for x0, y0, x1, y1 in zip(corner_x, corner_y, np.roll(corner_x, -1), np.roll(corner_y, -1)):
        crosses = (y0 > y) != (y1 > y)
        inside ^= crosses & (x < x0 + (y - y0) / (y1 - y0) * (x1 - x0))
    return inside.reshape(SIZE[0], 3, SIZE[1], 3).any(axis=(1, 3))


def polygon(name):
    """Return the corners on the unit circle (and the star's notches), in order."""
    if name == "square":
        return np.sqrt(0.5) * np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])
    if name == "triangle":
        return np.array([[np.cos(a), np.sin(a)] for a in np.deg2rad([30, 150, 270])])
    if name == "cross":
        a, b = 0.3, np.sqrt(1 - 0.09)
        arm = [
            [a, a],
            [a, b],
            [-a, b],
            [-a, a],
            [-b, a],
            [-b, -a],
            [-a, -a],
            [-a, -b],
            [a, -b],
            [a, -a],
            [b, -a],
            [b, a],
        ]
        return np.array(arm)
    points = np.deg2rad(36 * np.arange(10))
    return np.stack([np.cos(points), np.sin(points)], axis=1) * np.where(np.arange(10) % 2, 0.45, 1.0)[:, None]


def test_gradients_have_any_direction():
    source = ShapesSource(0, 60, SIZE)
    corners = [background_of(source, index)[[0, 0, -1, -1], [0, -1, 0, -1]].sum(axis=1).argmax() for index in range(60)]
    assert (np.bincount(corners, minlength=4) >= 5).all()


@pytest.mark.parametrize("name", ["square", "triangle", "cross", "star"])
def test_masks_of_polygons_are_exact(name):
    source = ShapesSource(1, 60, SIZE)
    for index in np.flatnonzero(source.labels_N == source.class_names.index(name)):
        expected = crossing_number_mask(source, index, polygon(name))
        # A subpixel on an edge may fall either way by rounding; more than one is a fault.
        assert (source.mask(index) != expected).sum() <= 1


def test_disc_and_ring_are_round():
    source = ShapesSource(1, 60, (90, 90))
    for index in np.flatnonzero(np.isin(source.labels_N, [0, 3])):
        y0, x0, y1, x1 = source.box(index)
        assert abs((y1 - y0) - (x1 - x0)) <= 1
        assert 90 / 2 <= y1 - y0 <= 90 * 3 / 4 + 2
        hole = 0.25 if source.class_names[source.labels_N[index]] == "ring" else 0
        share = source.mask(index).sum() / ((y1 - y0) * (x1 - x0))
        assert abs(share - np.pi / 4 * (1 - hole)) < 0.07
        assert source.mask(index)[(y0 + y1) // 2, (x0 + x1) // 2] == (hole == 0)


@pytest.mark.parametrize("classes", [2, 5, 6])
def test_labels_are_balanced_whatever_the_stride(classes):
    labels = balanced_labels(0, 6000, classes)
    assert (np.bincount(labels, minlength=classes) == 6000 // classes).all()
    for stride in (2, 3, 5, 6):
        assert (abs(np.bincount(labels[::stride], minlength=classes) / (6000 / stride / classes) - 1) < 0.25).all()
    assert balanced_labels(0, 7, classes).shape == (7,)


def test_background_colour_and_place_tell_nothing_of_the_label():
    source = ShapesSource(0, 3000, (16, 16), classes=3)
    parameters = np.array([source._parameters(index) for index in range(3000)])
    for label in range(3):
        # 1000 uniforms per class: the mean's deviation is 0.0091, quarters hold 250 with a deviation of 13.7.
        drawn = parameters[source.labels_N == label]
        assert (abs(drawn.mean(axis=0) - 0.5) < 4 * 0.0091).all()
        quarters = np.stack([np.bincount((column * 4).astype(int), minlength=4) for column in drawn.T])
        assert (abs(quarters - 250) < 4.5 * 13.7).all()
    correlation = np.corrcoef(parameters.T)
    colours = np.array([background_of(source, index).mean(axis=(0, 1)) for index in range(1500)])
    for label in range(3):
        mean = colours[source.labels_N[:1500] == label].mean(axis=0)
        assert (abs(mean - colours.mean(axis=0)) < 4.5 * colours.std(axis=0) / np.sqrt(500)).all()
    assert abs(correlation - np.eye(len(correlation))).max() < 4.5 / np.sqrt(3000)


@pytest.mark.parametrize("make", [ShapesSource, PhotosSource])
def test_the_cache_holds_what_is_generated(make, tmp_path, monkeypatch):
    # On a full disk a write to mapped memory would end the process by a signal.
    opened, modes = np.lib.format.open_memmap, []
    monkeypatch.setattr(
        np.lib.format,
        "open_memmap",
        lambda *names, mode, **more: modes.append(mode) or opened(*names, mode=mode, **more),
    )
    drawn, cached = make(2, 12, SIZE), make(2, 12, SIZE, cache_dir=str(tmp_path / "cache"))
    assert all((drawn.decode(index) == cached.decode(index)).all() for index in range(12))
    if make is ShapesSource:
        assert all((drawn.mask(index) == cached.mask(index)).all() for index in range(12))
        assert drawn.box(3) == cached.box(3)
    assert set(modes) == {"r"}
    (file,) = (tmp_path / "cache").iterdir()  # nothing unfinished stays behind
    written = os.stat(file).st_mtime_ns
    make(2, 12, SIZE, cache_dir=str(tmp_path / "cache"))
    assert os.stat(file).st_mtime_ns == written
    make(3, 12, SIZE, cache_dir=str(tmp_path / "cache"))
    make(2, 13, SIZE, cache_dir=str(tmp_path / "cache"))
    assert len(list((tmp_path / "cache").iterdir())) == 3
    file.write_bytes(file.read_bytes()[:-1000])
    assert (make(2, 12, SIZE, cache_dir=str(tmp_path / "cache")).decode(11) == drawn.decode(11)).all()


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    class StoppedError(Exception):
        pass

    def stop(*_):
        raise StoppedError

    monkeypatch.setattr(shapes_module, "_paint_object", stop)
    with pytest.raises(StoppedError):
        ShapesSource(0, 4, SIZE, cache_dir=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_images_that_are_too_small_are_refused():
    """The ranges of the other parameters are those of their settings."""
    with pytest.raises(ConfigError, match=r"image_size=\(4, 64\) must be at least 8"):
        ShapesSource(0, 10, (4, 64))


@pytest.mark.parametrize("size", [(8, 8), (8, 200), (31, 33)])
def test_small_and_long_images_hold_their_object(size):
    source = ShapesSource(0, 100, size, background="textured")
    for index in range(100):
        source.decode(index)
        assert source.mask(index).sum() >= 4


def test_photos_are_cut_at_any_place_and_scale(monkeypatch):
    y, x = np.mgrid[:240, :240].astype(np.uint8)
    photo = Image.fromarray(np.stack([y, x, y], axis=2))
    monkeypatch.setattr(photos_module, "_open_photo", lambda path: photo)
    crops = np.stack([PhotosSource(0, 80, (32, 32)).decode(index) for index in range(80)]).astype(int)
    for channel, axis in ((0, 1), (1, 2)):
        extent = np.ptp(crops[..., channel], axis=(1, 2)) / 240
        assert extent.min() < 0.35
        assert 0.8 < extent.max() < 0.92
        start = crops[..., channel].min(axis=(1, 2)) / (240 * (1.03 - extent))
        assert start.min() < 0.1
        assert start.max() > 0.8
        assert (np.diff(crops[..., channel], axis=axis) >= 0).all()  # neither mirrored nor rotated


def test_photos_are_crops_of_photographs(monkeypatch):
    import socket

    def refuse(*_, **__):
        raise AssertionError("a download was tried")

    monkeypatch.setattr(socket, "socket", refuse)
    source = PhotosSource(0, 80, SIZE)
    assert source.class_names[0] == "astronaut"
    assert len(source.class_names) == 8
    assert (np.bincount(source.labels_N) == 10).all()
    assert source.sizes_N2.tolist() == [list(SIZE)] * 80
    crops = [source.decode(index) for index in range(80)]
    assert all(crop.shape == (*SIZE, 3) and crop.std() > 1 for crop in crops)
    assert len({crop.tobytes() for crop in crops}) == 80
    assert (PhotosSource(0, 30, SIZE).decode(29) == crops[29]).all()
