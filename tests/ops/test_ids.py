"""Indices that point outside end an op with an error; in the interpreter the process would end by a signal."""

import pytest
import torch

from ccmim_kernels import gather_tokens, hog_target, masked_patch_loss, restore_tokens
from ccmim_kernels.gather_tokens import _scatter_tokens
from ccmim_kernels.restore_tokens import _restore_tokens_gradients
from ccmim_kernels.triton_impl.launch import INTERPRETED, checked_ids

L, K, D = 6, 3, 16
IMAGES = torch.zeros(2, 16, 24, 3, dtype=torch.uint8)


def gather(ids, kernels):
    return gather_tokens(torch.randn(2, L, D), ids[:, :K], kernels=kernels)


def restore(ids, kernels):
    return restore_tokens(torch.randn(2, 1 + K, D), torch.randn(D), ids, torch.randn(1 + L, D), kernels=kernels)


def loss(ids, kernels):
    scale = {"mean_C": torch.zeros(3), "std_C": torch.ones(3)}
    return masked_patch_loss(torch.randn(2, L, 192), IMAGES, ids, patch=8, **scale, kernels=kernels)


def hog(ids, kernels):
    return hog_target(IMAGES, ids, patch=8, bins=9, cell=8, dtype=torch.float32, kernels=kernels)


OPS = [gather, restore, loss, hog]


def ids_of(first):
    ids = torch.arange(L).repeat(2, 1)
    ids[1, 0] = first
    return ids


@pytest.mark.parametrize("kernels", ["triton", "reference"])
@pytest.mark.parametrize("first", [-1, L, 2**31, -(2**40)])
@pytest.mark.parametrize("op", OPS)
def test_ids_that_point_outside_are_an_error(op, first, kernels):
    if kernels == "triton" and not INTERPRETED:
        pytest.skip("on CUDA they are the caller's contract")
    with pytest.raises((IndexError, RuntimeError), match=r"must be in 0\.\.5|out of bounds|invalid|range"):
        op(ids_of(first), kernels)


@pytest.mark.skipif(not INTERPRETED, reason="on CUDA they are the caller's contract")
@pytest.mark.parametrize("first", [-5, L])
def test_gradients_write_nowhere_else(first):
    ids = ids_of(first)
    with pytest.raises(IndexError, match=rf"ids are in .*, must be in 0\.\.{L - 1}"):
        _restore_tokens_gradients(torch.randn(2, 1 + L, D), ids, K)
    # Rows are looked for in the list: an index outside is nobody's.
    assert _scatter_tokens(torch.ones(2, K, D), ids[:, :K], L)[1, 0].eq(0).all()


def test_none_at_all_is_fine():
    none = torch.zeros(2, 0, dtype=torch.int64)
    assert checked_ids(none, 0).shape == (2, 0)


def test_on_other_devices_nobody_looks():
    """It would be a launch or a wait of the host."""
    ids = torch.full((2, 3), 99, device="meta", dtype=torch.int64)
    assert checked_ids(ids, 1).shape == (2, 3)
