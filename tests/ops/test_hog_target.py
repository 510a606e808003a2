"""HOG on gradients whose answer is known, and against loops."""

import math

import pytest
import torch

from ccmim_kernels import hog_target


def hog_by_loops(image, patch, bins, cell):
    """[L][(patch / cell)^2 * C * bins] of one nested-list image [H][W][C]."""
    H, W, C = len(image), len(image[0]), len(image[0][0])

    def at(y, x, c):
        y, x = abs(y) if y < H else 2 * (H - 1) - y, abs(x) if x < W else 2 * (W - 1) - x
        return image[y][x][c]

    cells = {}
    for y in range(H):
        for x in range(W):
            for c in range(C):
                dx = sum(w * (at(y + o, x + 1, c) - at(y + o, x - 1, c)) for o, w in ((-1, 1), (0, 2), (1, 1)))
                dy = sum(w * (at(y + 1, x + o, c) - at(y - 1, x + o, c)) for o, w in ((-1, 1), (0, 2), (1, 1)))
                angle = math.atan2(dy, dx) % math.pi
                histogram = cells.setdefault((y // cell, x // cell, c), [0.0] * bins)
                histogram[min(int(angle / math.pi * bins), bins - 1)] += math.hypot(dx, dy)
    out = []
    per = patch // cell
    for row in range(H // patch):
        for column in range(W // patch):
            values = []
            for i in range(per):
                for j in range(per):
                    for c in range(C):
                        histogram = cells[row * per + i, column * per + j, c]
                        length = max(math.sqrt(sum(v * v for v in histogram)), 1e-12)
                        values += [v / length for v in histogram]
            out.append(values)
    return out


@pytest.mark.parametrize(
    ("size", "patch", "cell", "channels"), [((8, 12), 4, 2, 3), ((16, 16), 16, 8, 1), ((6, 6), 3, 3, 2)]
)
def test_against_loops(size, patch, cell, channels):
    images = torch.randint(0, 256, (2, *size, channels), dtype=torch.uint8)
    patches = size[0] // patch * (size[1] // patch)
    ids = torch.stack([torch.randperm(patches) for _ in range(2)])
    out = hog_target(images, ids, patch=patch, bins=9, cell=cell, dtype=torch.float64)
    for b in range(2):
        expected = torch.tensor(hog_by_loops(images[b].tolist(), patch, 9, cell), dtype=torch.float64)
        torch.testing.assert_close(out[b], expected[ids[b]])


@pytest.mark.parametrize(("step_y", "step_x"), [(0, 2), (2, 0), (2, 2), (2, -2), (1, 3)])
def test_a_plane_votes_for_one_orientation(step_y, step_x):
    """Away from the border a linear ramp has one gradient direction: that bin is 1, all others 0."""
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    image = (100 + step_y * y + step_x * x).clamp(0, 255).to(torch.uint8)[None, :, :, None]
    histogram = hog_target(image, torch.tensor([[5]]), patch=8, bins=9, cell=8)[0, 0]
    bin_index = int(math.atan2(step_y, step_x) % math.pi / math.pi * 9)
    expected = torch.zeros(9)
    expected[bin_index] = 1
    torch.testing.assert_close(histogram, expected)


def test_constant_image_gives_zeros():
    out = hog_target(torch.full((1, 16, 16, 3), 7, dtype=torch.uint8), torch.tensor([[0]]), patch=16)
    assert out.shape == (1, 1, 108)
    assert (out == 0).all()


def test_errors():
    with pytest.raises(ValueError, match="cell=8 must divide patch=4"):
        hog_target(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.tensor([[0]]), patch=4)
    with pytest.raises(ValueError, match=r"expected torch\.uint8"):
        hog_target(torch.zeros(1, 8, 8, 3), torch.tensor([[0]]), patch=8)
