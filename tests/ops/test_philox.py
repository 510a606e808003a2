"""Philox gives the published test vectors, and the noise made from it agrees with theory."""

import math

import pytest
import torch
import triton
import triton.language as tl

from ccmim_kernels.philox import STREAM_CROP, keyed_gumbel, keyed_uniform, philox_4x32, stream_key, to_unit
from ccmim_kernels.triton_impl.sample_partition import draw_bits, importance_keys

# Known answers of the generator's authors (Random123, kat_vectors, philox4x32 with 10 rounds): counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    seed = key[0] | key[1] << 32
    words = philox_4x32(seed, *(torch.tensor(c) for c in counter))
    assert tuple(int(w) for w in words) == expected


def test_unit_interval_is_open():
    ends = to_unit(torch.tensor([0, 0xFFFFFFFF]))
    assert ends.dtype == torch.float64
    assert ends.tolist() == [2.0**-33, 1 - 2.0**-33]


def test_noise_is_a_function_of_the_key_alone():
    ids = torch.tensor([7, 3, 2**40 + 3])
    whole = keyed_uniform(1, 2, ids, 9)
    assert torch.equal(keyed_uniform(1, 2, ids.flip(0), 9), whole.flip(0))
    assert torch.equal(keyed_uniform(1, 2, ids[1:2], 5), whole[1:2, :5])


def test_every_part_of_the_key_changes_the_noise():
    ids = torch.tensor([3])
    base = keyed_uniform(1, 2, ids, 4)
    others = [
        keyed_uniform(2, 2, ids, 4),
        keyed_uniform(1, 3, ids, 4),
        keyed_uniform(1, 2, ids + 2**40, 4),
        keyed_uniform(1, 2, ids, 4, STREAM_CROP),
    ]
    assert all((other != base).all() for other in others)


def test_gumbel_moments():
    """Mean is Euler's constant, variance pi^2 / 6; five standard errors over 200,000 draws."""
    noise = keyed_gumbel(0, 0, torch.arange(1000), 200)
    assert noise.dtype == torch.float32
    count, variance = noise.numel(), math.pi**2 / 6
    assert abs(noise.mean().item() - 0.5772156649) < 5 * math.sqrt(variance / count)
    # The fourth central moment of Gumbel is 3 pi^4 / 20, so Var[s^2] is about (3 pi^4 / 20 - variance^2) / n.
    spread = math.sqrt((3 * math.pi**4 / 20 - variance**2) / count)
    assert abs(noise.var().item() - variance) < 5 * spread


@triton.jit(do_not_specialize=["seed", "stream", "epoch"])
def noise_kernel(
    words_ptr,  # [4, L] int64, out
    gumbel_ptr,  # [L] fp32, out
    uniform_ptr,  # [L] fp32, out
    ids_ptr,  # [1] int64
    seed,
    stream,
    epoch,
    L: tl.constexpr,
):
    patch = tl.arange(0, L)
    sample = tl.load(ids_ptr)
    words = draw_bits(seed, stream, epoch, sample, patch)
    for index in tl.static_range(4):
        tl.store(words_ptr + index * L + patch, words[index].to(tl.int64))
    tl.store(gumbel_ptr + patch, importance_keys(patch * 0.0, patch, sample, seed, stream, epoch, 1.0, 1.0, 0.0))
    tl.store(uniform_ptr + patch, importance_keys(patch * 0.0, patch, sample, seed, stream, epoch, 1.0, 0.0, -1.0))


@pytest.mark.fault(
    "Gumbel noise: the inner logarithm rounded to float32",
    "gumbel = (-tl.log(-tl.log(uniform))).to(tl.float32)",
    "gumbel = -tl.log((-tl.log(uniform)).to(tl.float32))",
    file="triton_impl/sample_partition.py",
)
@pytest.mark.parametrize(
    ("seed", "stream", "epoch", "sample"), [(0, 0, 0, 0), (2**32 - 1, 4, 2**32 - 1, 2**63 - 1), (7, 1, 2**31, 2**31)]
)
def test_kernel_draws_the_same_bits_and_the_same_noise(seed, stream, epoch, sample, device):
    """The words are equal, and Gumbel and uniform noise as float32 bits: not merely in their order."""
    L = 4096
    words = torch.empty(4, L, dtype=torch.int64, device=device)
    gumbel, uniform = torch.empty(2, L, device=device)
    id_1 = torch.tensor([sample], device=device)
    noise_kernel[(1,)](
        words,
        gumbel,
        uniform,
        id_1,
        *(torch.tensor(w, dtype=torch.int64).to(torch.int32).item() for w in (seed, stream, epoch)),
        L=L,
        enable_fp_fusion=False,
    )
    counters = (torch.arange(L, device=device), id_1 & 0xFFFFFFFF, id_1 >> 32, torch.tensor([epoch], device=device))
    expected = torch.stack(philox_4x32(stream_key(seed, stream), *counters))
    assert torch.equal(words & 0xFFFFFFFF, expected)
    if stream == 0:
        assert torch.equal(gumbel, keyed_gumbel(seed, epoch, id_1, L)[0])
        assert torch.equal(uniform, keyed_uniform(seed, epoch, id_1, L)[0].float())
