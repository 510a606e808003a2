"""`restore_tokens` equals loops, and so does its gradient."""

import pytest
import torch
from ops.gold import DTYPES, compare

from ccmim_kernels import restore_tokens, sample_partition
from ccmim_kernels.restore_tokens import _restore_tokens, _restore_tokens_gradients


def test_against_loops():
    part = sample_partition(None, torch.arange(3), keep=4, grid=(3, 4), seed=0, epoch=0, strategy="random")
    visible, mask_token, positions = torch.randn(3, 5, 6), torch.randn(6), torch.randn(13, 6)
    out = restore_tokens(visible, mask_token, part.ids_restore_BL, positions)
    assert out.shape == (3, 13, 6)
    for b in range(3):
        assert torch.equal(out[b, 0], visible[b, 0] + positions[0])
        seen = part.ids_visible_BK[b].tolist()
        for patch in range(12):
            token = visible[b, 1 + seen.index(patch)] if patch in seen else mask_token
            assert torch.equal(out[b, 1 + patch], token + positions[1 + patch])


def test_gradient():
    part = sample_partition(None, torch.arange(2), keep=2, grid=(2, 3), seed=0, epoch=0, strategy="random")
    visible = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    mask_token = torch.randn(4, dtype=torch.float64, requires_grad=True)
    positions = torch.randn(7, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda v, m: restore_tokens(v, m, part.ids_restore_BL, positions), (visible, mask_token)
    )


def test_errors():
    ids = torch.zeros(2, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"visible \[2, 9, 4\] must be \[2, 1 \+ K, D\] with K < 6"):
        restore_tokens(torch.zeros(2, 9, 4), torch.zeros(4), ids, torch.zeros(7, 4))
    with pytest.raises(ValueError, match=r"mask token \[3\] must be \[4\]"):
        restore_tokens(torch.zeros(2, 3, 4), torch.zeros(3), ids, torch.zeros(7, 4))
    with pytest.raises(ValueError, match=r"positions \[6, 4\] must be \[7, 4\]"):
        restore_tokens(torch.zeros(2, 3, 4), torch.zeros(4), ids, torch.zeros(6, 4))


# (B, grid, K, D): MAE's decoder, odd, the smallest, nothing masked but one, widths past a tile of columns, more images
# than a program takes.
SHAPES = [
    (2, (14, 14), 49, 512),
    (3, (3, 5), 7, 7),
    (1, (1, 2), 1, 1),
    (2, (5, 8), 39, 32),
    (1, (3, 30), 2, 2048),
    (9, (2, 3), 2, 16),
]


def restore_ids(batch, grid, keep, device):
    ids = torch.arange(batch, device=device)
    return sample_partition(None, ids, keep=keep, grid=grid, seed=0, epoch=0, strategy="random").ids_restore_BL


@pytest.mark.fault(
    "mask token's gradient takes a visible row",
    "total += tl.where(seen, 0.0,",
    "total += tl.where((place < K - 1)[:, None], 0.0,",
)
@pytest.mark.fault(
    "positions off by one row",
    "position = tl.load(positions_ptr + offset",
    "position = tl.load(positions_ptr + tl.maximum(offset - D, column)",
)
@pytest.mark.fault("the next image's rows of the last one", "restore_ptr += L\n", "restore_ptr += 0\n")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_and_its_gradients(shape, dtype, device):
    B, grid, K, D = shape
    S = grid[0] * grid[1] + 1
    inputs = {
        "visible_BTD": torch.randn(B, 1 + K, D, device=device, dtype=dtype),
        "mask_token_D": torch.randn(D, device=device),
        "ids_restore_BL": restore_ids(B, grid, K, device),
        "positions_SD": torch.randn(S, D, device=device),
    }
    compare(restore_tokens, inputs, ["visible_BTD", "mask_token_D"], str(shape))


def test_kernel_takes_strided_tokens(device):
    ids, mask_token, positions = restore_ids(4, (2, 4), 3, device), torch.ones(6), torch.randn(9, 6)
    visible = torch.randn(4, 4, 12, device=device).transpose(0, 1)
    for x in (visible[..., :6], visible[..., ::2]):
        arguments = (x, mask_token.to(device), ids, positions.to(device))
        assert torch.equal(restore_tokens(*arguments, kernels="triton"), restore_tokens(*arguments))


def test_mask_token_gradient_is_the_same_every_time(device):
    grad, ids = torch.randn(8, 197, 64, device=device), restore_ids(8, (14, 14), 49, device)
    _, first = _restore_tokens_gradients(grad, ids, 49)
    assert all(torch.equal(_restore_tokens_gradients(grad, ids, 49)[1], first) for _ in range(3))


def test_opcheck(device):
    ids, positions = restore_ids(2, (2, 4), 3, device), torch.randn(9, 6, device=device)
    visible = torch.randn(2, 4, 6, device=device, requires_grad=True)
    mask_token = torch.randn(6, device=device, requires_grad=True)
    torch.library.opcheck(_restore_tokens, (visible, mask_token, ids, positions))
    grad = torch.randn(2, 9, 6, device=device)
    torch.library.opcheck(_restore_tokens_gradients, (grad, ids, 3))
