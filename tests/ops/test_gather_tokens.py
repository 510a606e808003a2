"""`gather_tokens` against loops, and its gradient."""

import pytest
import torch

from ccmim_kernels import gather_tokens


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
    with pytest.raises(ValueError, match=r"prefix \[1, 6\] must be \[P, 5\]"):
        gather_tokens(torch.zeros(4, 9, 5), torch.zeros(4, 2, dtype=torch.int64), torch.zeros(1, 6))
