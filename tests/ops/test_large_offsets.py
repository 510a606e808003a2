"""Offsets beyond 2**31 elements: the first and the last program run, on tensors that take addresses but no memory."""

# B batch, L patches, D width

import pytest
import torch
from ops.watched import watched

from ccmim_kernels import (
    cls_row,
    divide_tokens,
    embed_tokens,
    gather_tokens,
    hog_target,
    masked_patch_loss,
    restore_tokens,
)
from ccmim_kernels.triton_impl import info_nce, sample_partition
from ccmim_kernels.triton_impl.launch import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the kernels of a GPU would read and write all of it")
B, L, D = 20_000, 196, 768


def space(*shape, dtype=torch.bfloat16):
    """Make a tensor that nothing has been written to: the system gives it no memory before."""
    try:
        return torch.empty(shape, dtype=dtype)
    except RuntimeError as error:
        pytest.skip(f"no address space for {list(shape)} {dtype}: {error}")


def each(*numbers):
    return torch.tensor(numbers).expand(B, -1).contiguous()


def gathered():
    tokens = space(B, L, D).requires_grad_()
    return gather_tokens(tokens, each(*range(49, L)), torch.zeros(1, D), kernels="triton")


def divided(tokens):
    batch, patches, _ = tokens.shape
    options = {"keep": 16, "grid": (8, patches // 8), "seed": 0, "epoch": 0, "strategy": "random", "kernels": "triton"}
    return divide_tokens(tokens, torch.zeros(1, D), torch.arange(batch), **options).visible


def divided_by_images():
    return divided(space(60_000, 64, D).requires_grad_())


def divided_by_rows():
    return divided(space(64, 50_000, D).transpose(0, 1))


def embedded(projected):
    positions = torch.zeros(projected.shape[1], D, dtype=projected.dtype)
    return embed_tokens(projected, positions, torch.zeros(D), kernels="triton").tokens


def embedded_by_images():
    return embedded(space(60_000, 64, D))


def embedded_by_rows():
    return embedded(space(64, 50_000, D).transpose(0, 1))


def restored():
    visible, mask_token = space(B, 50, D).requires_grad_(), torch.zeros(D, requires_grad=True)
    return restore_tokens(visible, mask_token, each(*range(L)), torch.zeros(L + 1, D), kernels="triton")


def attended(qkv):
    return cls_row(qkv[:, 0, 0], qkv[:, :, 1], prefix=1, kind="softmax", scale=0.125, kernels="triton")


def attended_by_images():
    return attended(space(B, L + 1, 3, 3, 64))


def attended_by_rows():
    return attended(space(L + 1, B, 3, 3, 64).transpose(0, 1))


def images():
    return space(B, 224, 224, 3, dtype=torch.uint8)


def compared():
    options = {"patch": 16, "mean_C": torch.zeros(3), "std_C": torch.ones(3), "kernels": "triton"}
    return masked_patch_loss(space(B, 147, 768), images(), each(*range(147)), **options)


def described():
    return hog_target(images(), each(194, 195), patch=16, kernels="triton")


def sampled():
    space(2**20 + 1, 2048, dtype=torch.int64)
    ids, zeros = torch.arange(2**20 + 1), torch.zeros(2**20 + 1, dtype=torch.int64)
    ways = ([1.0, 1.0], [1, 1], [0, 0])
    sample_partition.sample_partition(None, ids, 32, 64, 2047, 0, zeros, "random", "gumbel", 1, 1, *ways, 1)


def contrasted():
    keys, rows = space(2**20 + 64, 2048, dtype=torch.float32), torch.zeros(2, 2048)
    losses = info_nce.info_nce(rows, None, keys, len(keys) - 2, 0.2)
    for of_keys in (True, False):
        info_nce.info_nce_gradient(rows, None, keys, *losses, torch.ones(2), len(keys) - 2, 0.2, of_keys)


MOVED = [gathered, divided_by_images, divided_by_rows, restored]
CASES = [
    *MOVED,
    embedded_by_images,
    embedded_by_rows,
    attended_by_images,
    attended_by_rows,
    compared,
    described,
    sampled,
    contrasted,
]


@pytest.mark.fault(
    "an image's offset in 32 bits",
    "image = tl.program_id(0).to(tl.int64)",
    "image = tl.program_id(0)",
    file="triton_impl/sample_partition.py",
)
@pytest.mark.fault(
    "keys' offset in 32 bits",
    "image = tl.program_id(0).to(tl.int64)",
    "image = tl.program_id(0)",
    file="triton_impl/cls_row.py",
)
@pytest.mark.fault(
    "a group of images' offset in 32 bits",
    "first = group.to(tl.int64) * IMAGES",
    "first = group * IMAGES",
    file="triton_impl/embed_tokens.py",
)
@pytest.mark.parametrize("case", CASES)
def test_the_last_program_stays_within_its_views(case, monkeypatch):
    # Poison would take memory.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    # So many programs that each sums over one block of keys: a few more would take seconds.
    monkeypatch.setattr(info_nce, "_PROGRAMS", 2**18)
    with watched(programs=(0, -1)):
        out = case()
        if case in MOVED and out.requires_grad:
            out.backward(torch.empty_like(out))
