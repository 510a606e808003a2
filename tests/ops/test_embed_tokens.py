"""`embed_tokens` is a sum, and a LayerNorm and a product written as loops."""

import pytest
import torch
from ops.gold import DTYPES, assert_close_to_gold, compare

from ccmim_kernels import embed_tokens
from ccmim_kernels.embed_tokens import _embed_tokens


def test_direction_equals_layer_norm_written_as_loops():
    projected, positions = torch.randn(3, 20, 8, dtype=torch.float64), torch.randn(20, 8, dtype=torch.float64)
    direction = torch.randn(8, dtype=torch.float64)
    out = embed_tokens(projected, positions, direction, eps=1e-6)
    for b in range(3):
        for i in range(20):
            x = [a + p for a, p in zip(projected[b, i].tolist(), positions[i].tolist())]
            assert out.tokens[b, i].tolist() == x
            mean = sum(x) / 8
            var = sum((v - mean) ** 2 for v in x) / 8
            expected = sum((v - mean) / (var + 1e-6) ** 0.5 * d for v, d in zip(x, direction.tolist()))
            assert out.logits[b, i].item() == pytest.approx(expected, rel=1e-12)


def test_gradient():
    projected = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    positions = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, p: embed_tokens(x, p, direction).tokens, (projected, positions))
    assert not embed_tokens(projected, positions, direction).logits.requires_grad


def test_errors():
    with pytest.raises(ValueError, match=r"positions are \[4, 8\], expected \[3, 8\]"):
        embed_tokens(torch.zeros(2, 3, 8), torch.zeros(4, 8), torch.zeros(8))
    with pytest.raises(ValueError, match=r"direction is \[5\], expected \[8\]"):
        embed_tokens(torch.zeros(2, 3, 8), torch.zeros(3, 8), torch.zeros(5))


# (B, L, D): ViT-B, odd, one of each, a multiple of 16 that fills no piece, more images than a program has, the widest.
SHAPES = [(2, 196, 768), (3, 15, 7), (1, 1, 1), (2, 6, 48), (9, 5, 100), (1, 5, 2048)]


def given(shape, dtype, device):
    B, L, D = shape
    projected, positions = torch.randn(B, L, D, device=device) * 2 + 0.5, torch.randn(L, D, device=device)
    return projected.to(dtype), positions, torch.randn(D, device=device)


@pytest.mark.fault(
    "columns past the end counted", "x = tl.where(column < D, x - mean[:, None], 0.0)", "x -= mean[:, None]"
)
@pytest.mark.fault(
    "variance times the width", "sum_of_token(x * x, PIECES, TOKENS) / D", "sum_of_token(x * x, PIECES, TOKENS)"
)
@pytest.mark.fault("the next image's tokens over the last one's", "tokens_ptr += L * D\n", "tokens_ptr += 0\n")
@pytest.mark.fault(
    "position of the row before", "positions_ptr + offset", "positions_ptr + tl.maximum(offset - D, column)"
)
@pytest.mark.parametrize("positions_are_half", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_equals_gold(shape, dtype, positions_are_half, device):
    projected, positions, direction = given(shape, dtype, device)
    positions = positions.to(dtype) if positions_are_half else positions
    inputs = (projected, positions, direction)
    ours, eager = (embed_tokens(*inputs, kernels=kernels) for kernels in ("triton", "reference"))
    gold = embed_tokens(*(x.double() for x in inputs))
    assert_close_to_gold(ours.tokens, eager.tokens, gold.tokens, "tokens")
    # Scores are of the tokens as they were stored.
    stored = embed_tokens(ours.tokens.double(), torch.zeros_like(positions, dtype=torch.float64), direction.double())
    assert_close_to_gold(ours.logits, eager.logits, stored.logits, "logits")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_gradients(shape, dtype, device):
    projected, positions, direction = given(shape, dtype, device)

    def tokens(projected, positions, kernels):
        return embed_tokens(projected, positions, direction, kernels=kernels).tokens

    compare(tokens, {"projected": projected, "positions": positions}, ["projected", "positions"], str(shape))


def test_kernel_on_tokens_far_from_zero(device):
    """Rows have mean 1000 and deviation 1: E[x^2] - E[x]^2 would lose all digits."""
    projected, positions, direction = given((2, 16, 700), torch.float32, device)
    inputs = (projected + 1000, positions, direction)
    results = [
        embed_tokens(*(x.to(dtype) for x in inputs), kernels=kernels).logits
        for dtype, kernels in ((torch.float32, "triton"), (torch.float32, "reference"), (torch.float64, "reference"))
    ]
    assert_close_to_gold(*results, "logits")


def test_kernel_on_constant_tokens(device):
    """Without variance LN gives zeros: all scores are equal."""
    projected, positions, direction = given((2, 16, 24), torch.float32, device)
    ones, twos = torch.ones_like(projected), torch.full_like(positions, 2.0)
    out = embed_tokens(ones, twos, direction, kernels="triton")
    assert torch.equal(out.logits, torch.zeros_like(out.logits))


@pytest.mark.fault("wrong stride between tokens", "row.to(tl.int64) * stride_l", "row.to(tl.int64) * D")
def test_kernel_takes_strided_tokens(device):
    projected, positions, direction = given((4, 15, 32), torch.float32, device)
    expected = embed_tokens(projected, positions, direction, kernels="triton")
    outer = torch.zeros(4, 16, 40, device=device)
    outer[:, 1:, :32] = projected
    for strided in (outer[:, 1:, :32], projected.transpose(0, 1).contiguous().transpose(0, 1)):
        out = embed_tokens(strided, positions, direction, kernels="triton")
        assert all(torch.equal(a, b) for a, b in zip(out, expected))


def test_too_wide_a_token_is_refused_by_name(device):
    wide = torch.zeros(1, 1, 2049, device=device)
    with pytest.raises(ValueError, match="width=2049 must be at most 2048 for kernels=triton; use kernels=reference"):
        embed_tokens(wide, wide[0], wide[0, 0], kernels="triton")


def test_half_precision_direction_still_scores_in_float32(device):
    projected, positions, direction = given((2, 16, 24), torch.bfloat16, device)
    ours, expected = (
        embed_tokens(projected, positions, direction.bfloat16(), kernels=kernels) for kernels in ("triton", "reference")
    )
    assert ours.logits.dtype == expected.logits.dtype == torch.float32
    torch.testing.assert_close(ours.logits, expected.logits)


def test_opcheck(device):
    projected, positions, direction = given((2, 8, 6), torch.float32, device)
    torch.library.opcheck(_embed_tokens, (projected.requires_grad_(), positions.requires_grad_(), direction, 1e-6))
