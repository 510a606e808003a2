"""`gather_tokens` equals loops, and so does its gradient."""

import pytest
import torch
from ops.gold import DTYPES, compare

from ccmim_kernels import gather_tokens
from ccmim_kernels.gather_tokens import _gather_tokens, _scatter_tokens


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_against_loops(prefix):
    tokens, ids = torch.randn(4, 9, 5), torch.stack([torch.randperm(9)[:4] for _ in range(4)])
    front = torch.randn(prefix, 5) if prefix else None
    out = gather_tokens(tokens, ids, front)
    assert out.shape == (4, prefix + 4, 5)
    for b in range(4):
        for p in range(prefix):
            assert torch.equal(out[b, p], front[p])
        for k in range(4):
            assert torch.equal(out[b, prefix + k], tokens[b, ids[b, k]])


def test_gradient():
    tokens = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    front = torch.randn(1, 3, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 4, 5], [1, 2, 3]])
    assert torch.autograd.gradcheck(lambda t, p: gather_tokens(t, ids, p), (tokens, front))


def test_non_contiguous_tokens():
    tokens = torch.randn(9, 4, 5).transpose(0, 1)
    ids = torch.tensor([[2, 0]] * 4)
    assert torch.equal(gather_tokens(tokens, ids), gather_tokens(tokens.contiguous(), ids))


def test_errors():
    with pytest.raises(ValueError, match=r"tokens \[4, 9, 5\] and ids \[3, 2\]"):
        gather_tokens(torch.zeros(4, 9, 5), torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"prefix \[1, 3, 5\] must be \[P, 5\]"):
        gather_tokens(torch.zeros(4, 9, 5), torch.zeros(4, 2, dtype=torch.int64), torch.zeros(1, 3, 5))
    with pytest.raises(ValueError, match=r"prefix \[1, 6\] must be \[P, 5\]"):
        gather_tokens(torch.zeros(4, 9, 5), torch.zeros(4, 2, dtype=torch.int64), torch.zeros(1, 6))


# (B, L, K, P, D): ViT-B, odd, one of each, more patches than a tile, widths past a tile of columns.
SHAPES = [(2, 196, 49, 1, 768), (3, 15, 7, 2, 7), (1, 2, 1, 1, 1), (2, 300, 70, 5, 32), (1, 40, 39, 0, 2048)]


def distinct(batch, patches, kept):
    return torch.stack([torch.randperm(patches)[:kept] for _ in range(batch)])


@pytest.mark.fault(
    "the prefix is its first row", "prefix_ptr + row * D, target_ptr", "prefix_ptr + row * 0, target_ptr"
)
@pytest.mark.fault(
    "places of the first ids alone", "for start in range(0, length, CHUNK)", "for start in range(0, 1, CHUNK)"
)
@pytest.mark.fault(
    "a scatter leaves the last row out",
    "written = (row < L)[:, None]",
    "written = (row < L - 1)[:, None]",
)
@pytest.mark.fault(
    "gradient of the prefix 1 % off",
    "sum(0, dtype=torch.float32).to(ctx.dtype)",
    "sum(0, dtype=torch.float32).mul(1.01).to(ctx.dtype)",
    file="gather_tokens.py",
)
@pytest.mark.fault(
    "a race: every tile of an image writes the prefix, the same values",
    "    if tile == 0:\n        copy_prefix(",
    "    if tiles > 0:\n        copy_prefix(",
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_and_its_gradients(shape, dtype, device):
    B, L, K, P, D = shape
    inputs = {"tokens_BLD": torch.randn(B, L, D, device=device, dtype=dtype), "ids_BK": distinct(B, L, K).to(device)}
    if P:
        # The prefix is a parameter: float32 whatever autocast makes of the tokens.
        inputs["prefix_PD"] = torch.randn(P, D, device=device)
    compare(gather_tokens, inputs, [name for name in inputs if name != "ids_BK"], str(shape))


def test_kernel_takes_strided_tokens(device):
    wide = torch.randn(9, 4, 10, device=device)
    ids = distinct(4, 9, 3).to(device)
    for tokens in (wide.transpose(0, 1), wide.transpose(0, 1)[..., ::2], wide.transpose(0, 1)[1:2].expand(4, -1, -1)):
        assert torch.equal(gather_tokens(tokens, ids, kernels="triton"), gather_tokens(tokens, ids))


def test_kernel_without_rows_writes_the_prefix(device):
    out = gather_tokens(
        torch.zeros(2, 9, 4, device=device),
        torch.empty(2, 0, dtype=torch.int64, device=device),
        torch.ones(1, 4, device=device),
        kernels="triton",
    )
    assert torch.equal(out, torch.ones(2, 1, 4, device=device))


def test_kernel_on_an_empty_batch(device):
    out = gather_tokens(torch.zeros(0, 9, 4, device=device), distinct(1, 9, 3)[:0].to(device), kernels="triton")
    assert out.shape == (0, 3, 4)


def test_opcheck(device):
    tokens = torch.randn(2, 9, 4, device=device, requires_grad=True)
    prefix, ids = torch.randn(1, 4, device=device, requires_grad=True), distinct(2, 9, 3).to(device)
    torch.library.opcheck(_gather_tokens, (tokens, ids, prefix))
    torch.library.opcheck(_gather_tokens, (tokens, ids, None))
    torch.library.opcheck(_scatter_tokens, (torch.randn(2, 4, 4, device=device), ids, 9))


@pytest.mark.gpu
def test_addresses_past_two_to_the_31():
    """The first element of a row lies past 2**31: an int32 offset would wrap."""
    B, L, D = 11_000, 196, 1024
    tokens = torch.zeros(B, L, D, device="cuda", dtype=torch.float16)
    assert tokens.numel() > 2**31
    tokens[-1] = torch.arange(L, device="cuda", dtype=torch.float16)[:, None]
    ids = torch.arange(0, 98, 2, device="cuda").expand(B, -1)
    out = gather_tokens(tokens, ids, kernels="triton")
    assert torch.equal(out[-1, :, 0], ids[-1].half())
    assert not out[:-1].any()
    grad = _scatter_tokens(out, ids, L)
    assert torch.equal(grad[-1, ::2, 0][:49], ids[-1].half())
    assert not grad[:-1].any()
