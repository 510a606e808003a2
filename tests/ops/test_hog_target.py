"""HOG equals loops and known answers; the kernel equals the reference."""

import math

import pytest
import torch
from ops.gold import DTYPES, assert_close_to_gold

from ccmim_kernels import hog_target
from ccmim_kernels.hog_target import boundaries, orientation_bins
from ccmim_kernels.triton_impl.hog_target import cotangents


def hog_by_loops(image, patch, bins, cell):
    """Compute [L][(patch / cell)^2 * C * bins] of one nested-list image [H][W][C]."""
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
                angle = math.atan2(dx, dy) % math.pi
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
    bin_index = int(math.atan2(step_x, step_y) % math.pi / math.pi * 9)
    expected = torch.zeros(9)
    expected[bin_index] = 1
    torch.testing.assert_close(histogram, expected)


def test_constant_image_gives_zeros():
    out = hog_target(torch.full((1, 16, 16, 3), 7, dtype=torch.uint8), torch.tensor([[0]]), patch=16)
    assert out.shape == (1, 1, 108)
    assert (out == 0).all()


@pytest.mark.parametrize("bins", [1, 4, 9])
def test_bins_do_not_depend_on_the_dtype(bins):
    """Float32 and float64 agree on all gradients a uint8 image can have, and both with exact boundaries."""
    dy, dx = torch.meshgrid(torch.arange(0, 1021), torch.arange(-1020, 1021), indexing="ij")
    found = orientation_bins(dx.float(), dy.float(), bins)
    assert torch.equal(found, orientation_bins(dx.double(), dy.double(), bins))
    assert torch.equal(found, orientation_bins(-dx.float(), -dy.float(), bins))
    # atan2 itself is rounded: gradients it puts within 1e-12 of a boundary (45, 90, 135 degrees) go up.
    turns = torch.atan2(dy.double(), dx.double()) / math.pi * bins
    expected = (turns + 1e-12).floor().long() % bins
    some = (dx != 0) | (dy != 0)
    assert torch.equal(found[some], expected[some])


def test_boundaries_at_45_and_90_degrees_are_exact():
    for bins in range(4, 65, 4):
        (cos_45, sin_45), (cos_90, sin_90) = boundaries(bins)[bins // 4 - 1], boundaries(bins)[bins // 2 - 1]
        assert cos_45 == sin_45
        assert (cos_90, sin_90) == (0, 1)


def compare_hog(images, ids, dtype=torch.float32, **options):
    ours = hog_target(images, ids, dtype=dtype, kernels="triton", **options)
    eager = hog_target(images, ids, dtype=dtype, kernels="reference", **options)
    gold = hog_target(images, ids, dtype=torch.float64, **options)
    assert_close_to_gold(ours, eager, gold, f"{dtype} {options}")
    return ours


def some_ids(batch, size, patch, masked):
    patches = size[0] // patch * (size[1] // patch)
    return torch.stack([torch.randperm(patches)[:masked] for _ in range(batch)])


@pytest.mark.fault("HOG: border repeated, not reflected", "tl.where(y < 0, 1, y)", "tl.where(y < 0, 0, y)")
@pytest.mark.fault("HOG: words combined by the wrong byte", "BYTE % 4 * 8", "BYTE % 4 * 4")
@pytest.mark.fault("HOG: a vote for two bins", "voting & (reached == 0)", "voting")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "size", "patch", "cell", "channels", "bins", "masked"),
    [
        (1, (224, 224), 16, 8, 3, 9, 13),  # ViT-B/16, MaskFeat
        (2, (24, 40), 8, 8, 3, 4, 15),
        (1, (32, 64), 32, 8, 3, 9, 1),
        # Triton's interpreter adds a cell's votes one after the other: with many bins these sums are short.
        (1, (64, 32), 32, 32, 3, 40, 1),
        (1, (27, 54), 27, 27, 1, 60, 2),
        (2, (10, 15), 5, 5, 4, 12, 5),
        (2, (12, 20), 4, 2, 1, 17, 7),
        (1, (32, 16), 16, 16, 2, 64, 1),
        (1, (6, 4), 2, 1, 3, 1, 5),
        (2, (2, 2), 2, 2, 3, 9, 1),
        (2, (8, 12), 4, 4, 1, 4, 5),  # small, with rows of whole words
    ],
)
def test_kernel_against_gold(batch, size, patch, cell, channels, bins, masked, dtype, device):
    images = torch.randint(0, 256, (batch, *size, channels), dtype=torch.uint8, device=device)
    ids = some_ids(batch, size, patch, masked).to(device)
    compare_hog(images, ids, dtype, patch=patch, cell=cell, bins=bins)


@pytest.mark.parametrize("kernels", ["triton", "reference"])
def test_float32_images(kernels, device):
    """The reference computes them, whatever is asked for: bytes give the same, and so does any scale of them."""
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8, device=device)
    ids = some_ids(2, (16, 16), 8, 3).to(device)
    expected = hog_target(images, ids, patch=8, kernels="reference")
    assert torch.equal(hog_target(images.float(), ids, patch=8, kernels=kernels), expected)
    torch.testing.assert_close(hog_target(images.float() / 64 - 1, ids, patch=8, kernels=kernels), expected)


@pytest.mark.parametrize("bins", [2, 3, 4, 8, 9, 11, 18, 25, 38, 64])
def test_cotangents_part_gradients_as_boundaries_do(bins):
    """All gradients of uint8 images, with the kernel's float32 arithmetic."""
    dy, dx = torch.meshgrid(torch.arange(0, 1021), torch.arange(-1020, 1021), indexing="ij")
    some = (dy > 0) | (dx > 0)
    dx, dy = dx[some].float(), dy[some].float()
    reached = sum((dx <= cot * dy).long() for cot in cotangents(torch.device("cpu"), bins)[:-1])
    assert torch.equal(reached, orientation_bins(dx.double(), dy.double(), bins))


def test_kernel_takes_images_at_any_address(device):
    """Of an image that begins between two words, bytes are loaded."""
    images = torch.randint(0, 256, (1 + 2 * 16 * 16 * 3,), dtype=torch.uint8, device=device)[1:].view(2, 16, 16, 3)
    ids = some_ids(2, (16, 16), 8, 3).to(device)
    out = compare_hog(images, ids, patch=8, cell=8)
    assert torch.equal(out, hog_target(images.clone(), ids, patch=8, cell=8, kernels="triton"))


@pytest.mark.parametrize("bins", [2, 4, 8, 12])
def test_kernel_on_gradients_on_a_boundary(bins, device):
    """Ramps run along 0, 45, 90 and 135 degrees: where rounding decided, reference and kernel would part."""
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    ramps = [3 * x, 3 * y, 3 * (x + y), 3 * (x - y) + 96]
    images = torch.stack(ramps).to(torch.uint8)[..., None].to(device)
    ids = torch.arange(16).expand(4, 16).to(device)
    out = compare_hog(images, ids, patch=8, cell=8, bins=bins)
    # Patch 5 touches no border: all its votes are for one bin.
    for histogram, quarters in zip(out[:, 5], (2, 0, 1, 3)):
        assert histogram.argmax() == quarters * bins // 4
        torch.testing.assert_close(histogram.max(), torch.ones((), device=device))


@pytest.mark.fault("HOG: the last column of a cell left out", "// CHANNELS < CELL", "// CHANNELS < CELL - 1")
def test_kernel_sums_every_pixel_of_a_cell(device):
    """One bright pixel stands at every place in turn, the corners of the image among them."""
    images = torch.zeros(32, 8, 4, 1, dtype=torch.uint8, device=device)
    images.view(32, 32).fill_diagonal_(200)
    ids = torch.arange(2, device=device).expand(32, 2)
    compare_hog(images, ids, patch=4, cell=4, bins=9)


def test_kernel_on_a_constant_image(device):
    images = torch.full((1, 16, 16, 3), 255, dtype=torch.uint8, device=device)
    out = hog_target(images, torch.tensor([[0]], device=device), patch=16, kernels="triton")
    assert (out == 0).all()


def test_kernel_takes_any_strides_and_is_deterministic(device):
    images = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8, device=device).permute(0, 2, 3, 1)
    ids = torch.arange(6, device=device).repeat(2).view(6, 2).t()
    assert not images.is_contiguous()
    assert not ids.is_contiguous()
    out = compare_hog(images, ids, patch=8, cell=4)
    again = hog_target(images.contiguous(), ids.contiguous(), patch=8, cell=4, kernels="triton")
    assert torch.equal(out, again)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_is_a_proper_custom_op(dtype, device):
    images = torch.randint(0, 256, (2, 8, 16, 1), dtype=torch.uint8, device=device)
    ids = some_ids(2, (8, 16), 8, 1).to(device)
    torch.library.opcheck(torch.ops.ccmim.hog_target.default, (images, ids, 8, 9, 4, dtype))

    def target(images):
        return hog_target(images, ids, patch=8, cell=4, dtype=dtype, kernels="triton") + 1

    compiled = torch.compile(target, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images), target(images))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float64}, r"kernels=triton takes float32, float16 or bfloat16, got torch\.float64"),
        ({"bins": 65}, r"channels \* bins=195 must be at most 128 for kernels=triton; use kernels=reference"),
        ({"patch": 129, "cell": 129}, "cell=129 must be at most 128 for kernels=triton"),
    ],
)
def test_kernel_errors(options, message, device):
    images = torch.zeros(1, 129, 129, 3, dtype=torch.uint8, device=device)
    ids = torch.tensor([[0]], device=device)
    with pytest.raises(ValueError, match=message):
        hog_target(images, ids, **{"patch": 43, "cell": 43, "kernels": "triton", **options})


def test_errors():
    with pytest.raises(ValueError, match="cell=8 must divide patch=4"):
        hog_target(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.tensor([[0]]), patch=4)
    with pytest.raises(ValueError, match=r"images are torch\.int16, expected torch\.uint8 or torch\.float32"):
        hog_target(torch.zeros(1, 8, 8, 3, dtype=torch.int16), torch.tensor([[0]]), patch=8)
    images = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    for options, message in (
        ({"bins": 0}, "bins=0 must be at least 1"),
        ({"dtype": torch.int32}, r"dtype=torch\.int32 must be one of torch\.float32, "),
        ({"patch": 16}, "image 8x8 must be at least 2x2 and a multiple of patch=16"),
    ):
        with pytest.raises(ValueError, match=message):
            hog_target(images, torch.tensor([[0]]), **{"patch": 8, **options})
    with pytest.raises(ValueError, match="images are 1, ids are of 2"):
        hog_target(images, torch.zeros(2, 1, dtype=torch.int64), patch=8)
