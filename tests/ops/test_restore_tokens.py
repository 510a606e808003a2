"""`restore_tokens` against loops, and its gradient."""

import pytest
import torch

from ccmim_kernels import restore_tokens, sample_partition


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
    with pytest.raises(ValueError, match=r"positions \[6, 4\] must be \[7, D\]"):
        restore_tokens(torch.zeros(2, 3, 4), torch.zeros(4), ids, torch.zeros(6, 4))
