import base64
import io

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image

from ccmim_fast.errors import DataError
from ccmim_fast.report.pictures import (
    GAP,
    GRAY,
    Snapshot,
    columns_of,
    grid_of,
    heatmap,
    picture_uri,
    snapshot_grid,
    visible_set,
)

RNG = np.random.default_rng(0)


def made(images=3, height=24, width=32, patch=8, score=True, channels=3):
    L = (height // patch) * (width // patch)
    rng = np.random.default_rng(1)
    return Snapshot(
        epoch=7,
        images_BHWC=rng.integers(0, 256, (images, height, width, channels), dtype=np.uint8),
        scores_BL=rng.random((images, L), dtype=np.float32) if score else None,
        mask_BL=rng.random((images, L)) < 0.75,
        reconstruction_BHWC=rng.integers(0, 256, (images, height, width, channels), dtype=np.uint8),
    )


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)))


@pytest.mark.parametrize("score", [True, False])
def test_snapshot_comes_back_as_it_was(tmp_path, score):
    snapshot = made(score=score)
    path = tmp_path / "snapshots" / "epoch_0007.npz"
    snapshot.save(path)
    back = Snapshot.load(path)
    assert back.epoch == 7
    assert type(back.epoch) is int
    for name, before, after in zip(Snapshot._fields[1:], snapshot[1:], back[1:]):
        assert (before is None and after is None) or (before.dtype == after.dtype and (before == after).all()), name
    assert [p.name for p in path.parent.iterdir()] == ["epoch_0007.npz"]


def test_a_save_cut_short_leaves_the_old_file(tmp_path):
    path = tmp_path / "epoch_0007.npz"
    made().save(path)
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError):
        made()._replace(mask_BL=Broken()).save(path)
    assert path.read_bytes() == before


class Broken:
    def __array__(self, *args, **kwargs):
        return 1 // 0


@pytest.mark.parametrize("damage", ["half", "empty", "text", "pickle", "other", "absent"])
def test_load_names_a_damaged_file(tmp_path, damage):
    path = tmp_path / "epoch_0007.npz"
    made().save(path)
    if damage == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "pickle":
        np.savez(path, **{**made()._asdict(), "mask_BL": np.array([{"a": 1}], dtype=object)})
    elif damage == "other":
        np.savez(path, x=np.zeros(3))
    elif damage == "absent":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "text": b"no archive"}[damage])
    with pytest.raises(DataError, match=r"epoch_0007\.npz is no snapshot"):
        Snapshot.load(path)


def test_heatmap_equals_the_colour_map_patch_by_patch():
    scores = RNG.random(12)
    picture = heatmap(scores, (3, 4), (6, 12))
    assert picture.shape == (6, 12, 3)
    assert picture.dtype == np.uint8
    for y in range(6):
        for x in range(12):
            score = scores[(y // 2) * 4 + x // 3]
            unit = (score - scores.min()) / (scores.max() - scores.min())
            # float32 between the score and the map's 256 colours: at most one colour off.
            near = [colormaps["magma"](int(unit * 256) + d, bytes=True)[:3] for d in (-1, 0, 1)]
            assert tuple(picture[y, x]) in [tuple(c) for c in near]


def test_heatmap_does_not_see_scale_or_offset():
    scores = RNG.random(16).astype(np.float32)
    one = heatmap(scores, (4, 4), (16, 16))
    assert abs(one.astype(int) - heatmap(scores * 8 + 2, (4, 4), (16, 16))).max() <= 4
    assert (heatmap(np.full(16, 0.3), (4, 4), (8, 8)) == colormaps["magma"](0, bytes=True)[:3]).all()


@pytest.mark.parametrize("grid", [(3, 4), (6, 2), (24, 32)])
def test_visible_set_equals_a_loop_and_leaves_its_input(grid):
    image = made().images_BHWC[0]
    mask = RNG.random(grid[0] * grid[1]) < 0.5
    before = image.copy()
    picture = visible_set(image, mask, grid)
    for y in range(24):
        for x in range(32):
            patch = y * grid[0] // 24 * grid[1] + x * grid[1] // 32
            expected = [GRAY] * 3 if mask[patch] else before[y, x].tolist()
            assert picture[y, x].tolist() == expected
    assert picture.dtype == np.uint8
    assert (image == before).all()


@pytest.mark.parametrize(
    ("height", "width", "patch", "grid"), [(24, 32, 8, (3, 4)), (224, 224, 16, (14, 14)), (6, 6, 1, (6, 6))]
)
def test_grid_of(height, width, patch, grid):
    assert grid_of(made(1, height, width, patch)) == grid


@pytest.mark.parametrize("patches", [11, 20, 48 * 64, 2])
def test_grid_of_patches_that_do_not_fit(patches):
    snapshot = made()._replace(mask_BL=np.zeros((3, patches), dtype=bool))
    with pytest.raises(ValueError, match=f"{patches} patches do not tile 24 x 32"):
        grid_of(snapshot)


def test_snapshot_grid_holds_every_picture_in_its_place():
    snapshot = made()
    picture = pixels(snapshot_grid(snapshot))
    height, width = 24 * 5, 32 * 5
    assert columns_of(snapshot) == ("image", "score", "visible", "reconstruction")
    assert picture.shape == (3 * (height + GAP) - GAP, 4 * (width + GAP) - GAP, 4)
    for i in range(3):
        expected = [
            snapshot.images_BHWC[i],
            heatmap(snapshot.scores_BL[i], (3, 4), (24, 32)),
            visible_set(snapshot.images_BHWC[i], snapshot.mask_BL[i], (3, 4)),
            snapshot.reconstruction_BHWC[i],
        ]
        for j, tile in enumerate(expected):
            top, left = i * (height + GAP), j * (width + GAP)
            found = picture[top : top + height, left : left + width]
            assert (found[..., :3] == tile.repeat(5, axis=0).repeat(5, axis=1)).all(), (i, j)
            assert (found[..., 3] == 255).all()
    assert (picture[height : height + GAP, :, 3] == 0).all()
    assert (picture[:, width : width + GAP, 3] == 0).all()


def test_snapshot_grid_without_scores_has_three_columns():
    snapshot = made(score=False)
    assert columns_of(snapshot) == ("image", "visible", "reconstruction")
    assert pixels(snapshot_grid(snapshot)).shape[1] == 3 * (160 + GAP) - GAP


@pytest.mark.parametrize(
    ("height", "width", "tile"), [(224, 224, (160, 160)), (64, 320, (32, 160)), (6, 6, (156, 156))]
)
def test_tiles_are_bounded(height, width, tile):
    picture = pixels(snapshot_grid(made(1, height, width, patch=2)))
    assert picture.shape[:2] == (tile[0], 4 * (tile[1] + GAP) - GAP)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_show_the_first(channels):
    snapshot = made(1, 32, 32, 8, channels=channels)
    picture = pixels(snapshot_grid(snapshot))
    assert (picture[::5, :160:5, :3] == snapshot.images_BHWC[0, :, :, :1]).all()


def test_large_pictures_are_webp_and_look_the_same():
    smooth = Image.fromarray(RNG.integers(0, 256, (12, 12, 4), dtype=np.uint8)).resize((900, 900), Image.BICUBIC)
    for size, kind in ((60, "png"), (900, "webp")):
        buffer = io.BytesIO()
        smooth.crop((0, 0, size, size)).convert("RGB").save(buffer, format="PNG")
        png = buffer.getvalue() + b"\0" * (size > 100) * 250_000
        head, data = picture_uri(png).split(",")
        assert head == f"data:image/{kind};base64"
        found = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"), dtype=float)
        assert np.abs(found - np.asarray(Image.open(io.BytesIO(png)), dtype=float)).mean() < 3


def test_a_snapshot_without_a_reconstruction(tmp_path):
    """Of a run that predicts no pixels."""
    snapshot = made()._replace(reconstruction_BHWC=None)
    snapshot.save(tmp_path / "x.npz")
    back = Snapshot.load(tmp_path / "x.npz")
    assert back.reconstruction_BHWC is None
    assert columns_of(back) == ("image", "score", "visible")
    assert pixels(snapshot_grid(back)).shape[1] == 3 * (160 + GAP) - GAP
