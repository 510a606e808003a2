"""Noise here is a function of a key, not of a generator's state: Philox-4x32-10 (Salmon et al., SC 2011) in PyTorch.

The noise of a patch depends on (seed, epoch, sample id, patch) alone. The bits equal
`tl.philox(seed, patch, id_low, id_high, epoch)`.
"""

# B batch, L patches

import torch
from torch import Tensor

_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57  # the generator's multipliers
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85  # the key's increments (Weyl sequence)
_MASK32 = 0xFFFFFFFF

# The high word of the key separates the uses of one seed; the kernels draw from streams 0, 1 and 6.
STREAM_MASK, STREAM_BLOCK, STREAM_CROP, STREAM_ORDER, STREAM_SHAPES, STREAM_FALLBACK, STREAM_TEACHER = range(7)


def _multiply_32x32(x: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """Return the (high, low) 32 bits of x * constant, both unsigned 32-bit values held in int64.

    The factor is split into 16-bit halves, so that no partial product reaches the sign bit.
    """
    low_product = x * (constant & 0xFFFF)
    high_product = x * (constant >> 16)
    middle = high_product + (low_product >> 16)
    return middle >> 16, ((middle << 16) | (low_product & 0xFFFF)) & _MASK32


def philox_4x32(seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run ten rounds of Philox-4x32: four int64 tensors, each uniform on 0 .. 2**32 - 1, of the counter c0 .. c3.

    The 64-bit key is `seed`, its low word first; the counter's int64 words, in 0 .. 2**32 - 1, are broadcast.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(c0, c1, c2, c3)
    key_0, key_1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(10):
        high_0, low_0 = _multiply_32x32(c0, _ROUND_A)
        high_2, low_2 = _multiply_32x32(c2, _ROUND_B)
        c0, c1, c2, c3 = high_2 ^ c1 ^ key_0, low_2, high_0 ^ c3 ^ key_1, low_0
        key_0, key_1 = (key_0 + _KEY_A) & _MASK32, (key_1 + _KEY_B) & _MASK32
    return c0, c1, c2, c3


def stream_key(seed: int, stream: int) -> int:
    """Return the 64-bit Philox key of one use (`STREAM_*`) of a run's 32-bit seed."""
    return (seed & _MASK32) | (stream << 32)


def to_unit(bits: Tensor) -> Tensor:
    """Map 32 random bits (int64) to float64 in the open interval (0, 1): (bits + 0.5) / 2**32, exactly."""
    return (bits.double() + 0.5) * 2.0**-32


def per_sample(word: int | Tensor, ids_B: Tensor) -> Tensor:
    """Expand one number, or a [] or [B] tensor, to [B] int64 on the device of `ids_B`, without reading its value."""
    if not isinstance(word, Tensor):
        return torch.full(ids_B.shape, word, dtype=torch.int64, device=ids_B.device)
    return word.to(torch.int64).expand(ids_B.shape).contiguous()


def keyed_bits(seed: int, epoch: int | Tensor, ids_B: Tensor, count: int, stream: int) -> tuple[Tensor, ...]:
    """Draw four random words for each of `count` counters (patches, or blocks) of each sample: four int64 [B, count].

    Args:
        seed, epoch: in 0 .. 2**32 - 1; the epoch as a number, or as int64 on the device of `ids_B`, [] or [B].
        stream: which use of the seed, one of `STREAM_*`.
    """
    counter = torch.arange(count, device=ids_B.device)[None]
    id_B1 = ids_B.to(torch.int64)[:, None]
    epoch_B1 = per_sample(epoch, ids_B)[:, None]
    return philox_4x32(stream_key(seed, stream), counter, id_B1 & _MASK32, (id_B1 >> 32) & _MASK32, epoch_B1)


def keyed_uniform(seed: int, epoch: int | Tensor, ids_B: Tensor, patches: int, stream: int = STREAM_MASK) -> Tensor:
    """Draw uniform noise [B, patches], float64 in (0, 1), from the arguments of `keyed_bits` alone."""
    return to_unit(keyed_bits(seed, epoch, ids_B, patches, stream)[0])


def keyed_gumbel(seed: int, epoch: int | Tensor, ids_B: Tensor, patches: int) -> Tensor:
    """Draw standard Gumbel noise [B, patches], float32: -log(-log(u)).

    Both logarithms are taken in float64 and rounded once, so that every implementation, whatever its logarithm's last
    bit, gives the same float32 and hence the same mask.
    """
    return (-(-keyed_uniform(seed, epoch, ids_B, patches).log()).log()).float()
