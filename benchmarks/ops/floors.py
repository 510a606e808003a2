"""What each op has to move at least: every byte it needs read once, every byte it gives written once; and its FLOPs.

A floor is a bound for any implementation, not a count of what ours moves. `backward` assumes that forward kept what is
smallest to keep; `both` that forward and backward share whatever can be shared, so it may be less than their sum.
"""

# B batch, N all ranks' rows, L patches, K visible, M masked, P prefix tokens, D width, E embedding dim, C channels

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

HALF, FULL, ID, BYTE = 2, 4, 8, 1  # bytes of bf16, float32, int64, and of uint8 or bool


@dataclass(frozen=True)
class Size:
    """The sizes of a measurement: ViT/16 at 224 x 224, a quarter visible (MAE).

    Attributes:
        batch: B.
        width: D of the encoder, 384, 768 or 1024 for ViT-S, B, L.
        keys: N of `info_nce`; 0: N = B, one rank.
        decoder_width: D of `restore_tokens`.
        image, patch: pixels per side.
        cell, bins: of `hog_target` (MaskFeat).
    """

    batch: int
    width: int = 768
    keys: int = 0
    patches: int = 196
    keep: int = 49
    prefix: int = 1
    decoder_width: int = 512
    head_dim: int = 64
    embedding: int = 256
    image: int = 224
    patch: int = 16
    channels: int = 3
    cell: int = 8
    bins: int = 9

    @property
    def masked(self) -> int:
        return self.patches - self.keep

    @property
    def pixels(self) -> int:
        """Values of one patch."""
        return self.patch**2 * self.channels


class Work(NamedTuple):
    """Of one pass: bytes read and written, and FLOPs of its matrix products."""

    bytes: int
    flops: int = 0

    def seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """The floor: whichever takes longer."""
        return max(self.bytes / bytes_per_second, self.flops / flops_per_second)


Passes = dict[str, Work]  # "forward", and where the op has a gradient "backward" and "both"


def _linear(forward: int, backward: int) -> Passes:
    """Passes of an op whose backward shares nothing with its forward."""
    return {"forward": Work(forward), "backward": Work(backward), "both": Work(forward + backward)}


def _partition(s: Size) -> int:
    """Three index tensors, of K, M and L = K + M columns, a mask and a flag per image."""
    return s.batch * (2 * s.patches * ID + s.patches * BYTE + BYTE)


def sample_partition(s: Size) -> Passes:
    return {"forward": Work(s.batch * (s.patches * FULL + ID) + _partition(s))}


def _gathered(s: Size, rows: int) -> int:
    """Bytes of `rows` gathered tokens an image with the prefix tokens in front."""
    return s.batch * (s.prefix + rows) * s.width * HALF


def _scattered(s: Size) -> int:
    """Backward of a gather of the visible set: its gradient and ids, to a dense gradient and the prefix's."""
    dense = s.batch * s.patches * s.width * HALF
    return _gathered(s, s.keep) + s.batch * s.keep * ID + dense + s.prefix * s.width * FULL


def divide_tokens(s: Size) -> Passes:
    """Scored by a direction, both sets gathered; the tokens are read once for both."""
    tokens = s.batch * s.patches * s.width * HALF
    parameters = (s.prefix + 1) * s.width * FULL
    sets = _gathered(s, s.keep) + _gathered(s, s.masked)
    logits = s.batch * s.patches * FULL
    return _linear(tokens + parameters + s.batch * ID + sets + logits + _partition(s), _scattered(s))


def cls_row(s: Size) -> Passes:
    """Reads K once; no gradient."""
    queries, keys = s.batch * s.width * HALF, s.batch * (s.prefix + s.patches) * s.width * HALF
    return {"forward": Work(queries + keys + s.batch * s.patches * FULL)}


def gather_tokens(s: Size) -> Passes:
    """Two calls, for the visible and the masked set, of which the visible one has a gradient."""
    tokens = s.batch * s.patches * s.width * HALF
    ids, prefix = s.batch * s.patches * ID, s.prefix * s.width * FULL
    return _linear(tokens + ids + prefix + _gathered(s, s.keep) + _gathered(s, s.masked), _scattered(s))


def restore_tokens(s: Size) -> Passes:
    D = s.decoder_width
    visible, grid = s.batch * (1 + s.keep) * D * HALF, s.batch * (1 + s.patches) * D * HALF
    ids, mask_token, positions = s.batch * s.patches * ID, D * FULL, (1 + s.patches) * D * FULL
    return _linear(visible + ids + mask_token + positions + grid, grid + ids + visible + mask_token)


def masked_patch_loss(s: Size) -> Passes:
    """Backward reads a residual and writes the gradient; one pass over prediction and pixels could do both."""
    prediction = s.batch * s.masked * s.pixels * HALF
    pixels = s.batch * s.masked * s.pixels * BYTE
    forward = prediction + pixels + s.batch * s.masked * ID + 2 * s.channels * FULL + FULL
    return {
        "forward": Work(forward),
        "backward": Work(FULL + 2 * prediction),
        "both": Work(forward + prediction),
    }


def info_nce(s: Size) -> Passes:
    """Students and teachers against N keys: two products forward; backward three, for students and for keys.

    A kernel that keeps no logits makes the two again in backward, seven in all: it can reach 5 / 7 of this floor.
    """
    N = s.keys or s.batch
    rows = 2 * s.batch if s.batch == N else 2 * s.batch + N
    gradients = s.batch if s.batch == N else s.batch + N
    read, written = rows * s.embedding * FULL, gradients * s.embedding * FULL
    product = 2 * s.batch * N * s.embedding
    return {
        "forward": Work(read + FULL, 2 * product),
        "backward": Work(FULL + read + written, 3 * product),
        "both": Work(read + FULL + written, 5 * product),
    }


def hog_target(s: Size) -> Passes:
    """Whole images: a masked patch needs its neighbours' borders too. No gradient."""
    images = s.batch * s.image**2 * s.channels * BYTE
    features = (s.patch // s.cell) ** 2 * s.channels * s.bins
    return {"forward": Work(images + s.batch * s.masked * (ID + features * FULL))}


FLOORS: dict[str, Callable[[Size], Passes]] = {
    "sample_partition": sample_partition,
    "divide_tokens": divide_tokens,
    "cls_row": cls_row,
    "gather_tokens": gather_tokens,
    "restore_tokens": restore_tokens,
    "masked_patch_loss": masked_patch_loss,
    "info_nce": info_nce,
    "hog_target": hog_target,
}

# Ops whose work depends on the encoder's width.
BY_WIDTH = ("divide_tokens", "cls_row", "gather_tokens")
