"""Reading a map at a crop's patches and writing to the cells under it, against loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ccmim_fast.bank.bank import read_maps, update_maps

WHOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
MIRRORED = torch.tensor([[0.0, 1.0, 1.0, -1.0]], dtype=torch.float64)


def interpolated(values, y, x):
    """Bilinear by hand: `values` have their centres at 0.5, 1.5, ... and y, x are in the same unit."""
    rows, columns = len(values), len(values[0])
    y, x = min(max(y - 0.5, 0), rows - 1), min(max(x - 0.5, 0), columns - 1)
    top, left = min(int(y), rows - 2) if rows > 1 else 0, min(int(x), columns - 2) if columns > 1 else 0
    bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
    down, across = y - top, x - left
    upper = values[top][left] * (1 - across) + values[top][right] * across
    lower = values[bottom][left] * (1 - across) + values[bottom][right] * across
    return upper * (1 - down) + lower * down


def slow_read(map_GG, box, grid):
    y, x, height, width = box
    cells = len(map_GG)
    found = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            v = y + height * (row + 0.5) / grid[0]
            u = x + width * (column + 0.5) / grid[1]
            found.append(interpolated(map_GG, v * cells, u * cells))
    return found


def assert_near(after_GG, slow_GG):
    """All cells but those of which rounding decides whether they are in the crop."""
    for after_G, slow_G in zip(after_GG.tolist(), slow_GG, strict=True):
        for after, slow in zip(after_G, slow_G, strict=True):
            assert slow is None or abs(after - slow) < 1e-9


def slow_update(map_GG, box, scores, grid, momentum, scored=None):
    """Cells whose centre is nearly on the crop's edge are None: rounding decides there.

    So it does for cells of which a patch with a score has next to no share.
    """
    scored = scored or [[1.0] * grid[1]] * grid[0]
    known = [[score * one for score, one in zip(*rows)] for rows in zip(scores, scored)]
    y, x, height, width = box
    cells = len(map_GG)
    after = [list(row) for row in map_GG]
    for row in range(cells):
        for column in range(cells):
            v, u = ((row + 0.5) / cells - y) / height, ((column + 0.5) / cells - x) / width
            if min(abs(v), abs(1 - v), abs(u), abs(1 - u)) < 1e-9:
                after[row][column] = None
            elif 0 <= v <= 1 and 0 <= u <= 1:
                share, before = interpolated(scored, v * grid[0], u * grid[1]), map_GG[row][column]
                mean = interpolated(known, v * grid[0], u * grid[1]) / share if share else 0
                kept = 1 - (1 - momentum) * share if before else 0.0
                after[row][column] = None if 0 < share < 2e-3 else kept * before + (1 - kept) * mean
    return after


@st.composite
def crops(draw):
    """A crop as in `Batch.boxes_B4`: any image, any box of whole pixels in it, mirrored or not."""
    sides, ends = [], []
    for _ in range(2):
        side = draw(st.integers(1, 700))
        start = draw(st.integers(0, side - 1))
        stop = draw(st.integers(start + 1, side))
        sides.append(side)
        ends.append((start, stop))
    (top, bottom), (left, right) = ends
    box = [top / sides[0], left / sides[1], (bottom - top) / sides[0], (right - left) / sides[1]]
    if draw(st.booleans()):
        box[1], box[3] = box[1] + box[3], -box[3]
    return box


GRIDS = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(crops(), GRIDS, st.integers(1, 12), st.integers(0, 2**31))
@settings(max_examples=150, deadline=None)
def test_read_equals_loops(box, grid, cells, seed):
    maps = torch.randn(1, cells, cells, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    maps[:, torch.rand(cells, cells, generator=torch.Generator().manual_seed(seed)) < 0.3] = 0
    scores, share = read_maps(maps, torch.tensor([box], dtype=torch.float64), grid)
    assert scores.shape == share.shape == (1, grid[0] * grid[1])
    expected = torch.tensor(slow_read(maps[0].tolist(), box, grid), dtype=torch.float64)
    torch.testing.assert_close(scores[0], expected, rtol=0, atol=1e-9)
    known = torch.tensor(slow_read((maps[0] != 0).double().tolist(), box, grid), dtype=torch.float64)
    torch.testing.assert_close(share[0], known, rtol=0, atol=1e-9)


@given(crops(), GRIDS, st.integers(1, 12), st.integers(0, 2**31), st.sampled_from([0.0, 0.5, 0.9]))
@settings(max_examples=150, deadline=None)
def test_update_equals_loops(box, grid, cells, seed, momentum):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(1, cells, cells, dtype=torch.float64, generator=generator)
    maps[torch.rand(1, cells, cells, generator=generator) < 0.3] = 0
    scores = torch.randn(1, grid[0] * grid[1], dtype=torch.float64, generator=generator)
    after = update_maps(maps, torch.tensor([box], dtype=torch.float64), scores, grid, momentum)
    slow = slow_update(maps[0].tolist(), box, scores[0].unflatten(0, grid).tolist(), grid, momentum)
    assert_near(after[0], slow)


@given(crops(), GRIDS, st.integers(1, 12), st.integers(0, 2**31), st.sampled_from([0.0, 0.5, 0.9]))
@settings(max_examples=150, deadline=None)
def test_update_with_some_of_the_patches_equals_loops(box, grid, cells, seed, momentum):
    """What stands in the place of a missing score is not looked at, NaN or not."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(1, cells, cells, dtype=torch.float64, generator=generator)
    maps[torch.rand(1, cells, cells, generator=generator) < 0.3] = 0
    scores = torch.randn(1, grid[0] * grid[1], dtype=torch.float64, generator=generator)
    scored = torch.rand(1, grid[0] * grid[1], generator=generator) < 0.5
    as_rows = (x[0].double().unflatten(0, grid).tolist() for x in (scores, scored))
    slow = slow_update(maps[0].tolist(), box, next(as_rows), grid, momentum, next(as_rows))
    given = scores.where(scored, math.nan)
    after = update_maps(maps, torch.tensor([box], dtype=torch.float64), given, grid, momentum, scored)
    assert_near(after[0], slow)


def test_a_cell_keeps_what_it_holds_by_the_share_that_nobody_saw():
    """By hand: two patches, of which the left one alone has a score, over four cells, one of them empty."""
    maps = torch.tensor([[[8.0, 8.0, 0.0, 8.0]]]).expand(1, 4, 4).clone()
    after = update_maps(maps, WHOLE, torch.tensor([[4.0, 100.0]]), (1, 2), 0.5, torch.tensor([[True, False]]))
    # Shares 1, 3 / 4, 1 / 4 and 0 of the left patch: the empty cell has its score alone.
    assert after[0, 0].tolist() == [0.5 * 8 + 0.5 * 4, 0.625 * 8 + 0.375 * 4, 4.0, 8.0]


def test_an_empty_cell_takes_no_score_by_rounding():
    """A crop of a third of the image, whose patches have their centres on those of cells but for the last bits."""
    box = torch.tensor([[1 / 3, 1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64)
    scored = torch.arange(25) % 2 == 0
    after = update_maps(torch.zeros(1, 15, 15), box, torch.ones(1, 25), (5, 5), 0.5, scored[None])
    assert torch.equal(after[0, 5:10, 5:10].flatten() != 0, scored)
    assert int((after != 0).sum()) == 13


def test_with_a_score_of_every_patch_the_maps_are_the_same():
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(5, 16, 16, generator=generator).half()
    boxes = torch.tensor([[0.1, 0.2, 0.7, 0.6]], dtype=torch.float64).expand(5, 4)
    scores = torch.randn(5, 196, generator=generator)
    expected = update_maps(maps, boxes, scores, (14, 14), 0.5)
    found = update_maps(maps, boxes, scores, (14, 14), 0.5, torch.ones(5, 196, dtype=torch.bool))
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=0)  # the last bit of float16
    nothing = update_maps(maps, boxes, scores, (14, 14), 0.5, torch.zeros(5, 196, dtype=torch.bool))
    assert torch.equal(nothing, maps)


@pytest.mark.parametrize("side", [1, 3, 7, 14, 16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_whole_image_is_read_and_written_bit_for_bit(side, dtype):
    """As many patches as cells: nothing is interpolated, so nothing is rounded either."""
    maps = torch.randn(3, side, side).to(dtype)
    scores, share = read_maps(maps, WHOLE.expand(3, 4), (side, side))
    assert torch.equal(scores, maps.float().flatten(1))
    assert torch.equal(share, torch.ones_like(share))
    written = update_maps(torch.zeros_like(maps), WHOLE.expand(3, 4), scores, (side, side), 0.5)
    assert written.dtype == dtype
    assert torch.equal(written, maps)


def test_a_mirrored_crop_is_read_and_written_backwards():
    maps = torch.randn(1, 6, 6)
    scores, _ = read_maps(maps, MIRRORED, (6, 6))
    assert torch.equal(scores.view(6, 6), maps[0].flip(1))
    written = update_maps(torch.zeros_like(maps), MIRRORED, scores, (6, 6), 0.5)
    torch.testing.assert_close(written, maps, rtol=0, atol=0)


def test_what_is_written_is_read_again_by_the_same_crop():
    """A ramp is what bilinear interpolation keeps, whatever the crop; off the edges, where it is clamped."""
    box = torch.tensor([[0.1, 0.2, 0.7, 0.6]], dtype=torch.float64)
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    ramp = 1 + 0.3 * rows - 0.2 * columns
    maps = update_maps(torch.zeros(1, 64, 64), box, ramp.flatten()[None], (8, 8), 0.5)
    again, share = read_maps(maps, box, (8, 8))
    inner = (slice(None), slice(1, -1), slice(1, -1))
    torch.testing.assert_close(again.view(1, 8, 8)[inner], ramp[None][inner], rtol=0, atol=1e-5)
    assert bool((share == 1).all())


def test_cells_outside_the_crop_stay_and_inside_are_mixed():
    maps = torch.full((1, 4, 4), 2.0)
    maps[0, 0, 0] = 0  # never seen
    left_half = torch.tensor([[0.0, 0.0, 1.0, 0.5]], dtype=torch.float64)
    after = update_maps(maps, left_half, torch.full((1, 4), 10.0), (2, 2), 0.75)[0]
    assert torch.equal(after[:, 2:], torch.full((4, 2), 2.0))
    assert after[0, 0] == 10.0
    assert torch.equal(after[1:, :2], torch.full((3, 2), 0.75 * 2 + 0.25 * 10))


def test_a_crop_between_centres_leaves_nothing():
    maps = torch.zeros(1, 4, 4)
    tiny = torch.tensor([[0.26, 0.26, 0.1, 0.1]], dtype=torch.float64)
    assert torch.equal(update_maps(maps, tiny, torch.ones(1, 9), (3, 3), 0.5), maps)
    assert float(read_maps(maps, tiny, (3, 3))[0].abs().max()) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_leave_the_map_as_it_was(bad):
    maps, scores = torch.full((1, 2, 2), 3.0), torch.ones(1, 4)
    scores[0, 3] = bad
    for scored in (None, torch.ones(1, 4, dtype=torch.bool), torch.tensor([[False, False, True, True]])):
        after = update_maps(maps, WHOLE, scores, (2, 2), 0.5, scored)
        assert torch.equal(after, maps)


def test_the_given_map_is_left_as_it_is():
    maps = torch.ones(1, 3, 3)
    update_maps(maps, WHOLE, torch.zeros(1, 9) + 5, (3, 3), 0.5)
    assert torch.equal(maps, torch.ones(1, 3, 3))
