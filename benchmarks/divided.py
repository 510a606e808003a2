"""This module counts the bytes that FSDP2 sends of each parameter, for benchmarks/cluster.py."""

# D width, d width of the decoder, E contrastive width

import math

from arithmetic import DECODER_WIDTH, E, Vit

GRADIENT = 4  # bytes: float32
WEIGHT, EXACT = 2, 4  # bytes that FSDP gathers of each: bf16; float32 in the first block and outside blocks


def block_shapes(width: int) -> list[tuple[int, ...]]:
    """Return the shapes of a transformer block's parameters."""
    products = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    return products + [(rows,) for rows, _ in products] + 4 * [(width,)]


def other_shapes(vit: Vit, source: str) -> list[tuple[int, ...]]:
    """Return the shapes of the trained parameters in no block, in the order of `arithmetic.parameters`."""
    D, d, p = vit.width, DECODER_WIDTH, vit.patch
    encoder = [(D, 3, p, p), (D,), (1, 1, D), (D,), (D,)]
    decoder = [(d, D), (d,), (1, 1, d), (d,), (d,), (3 * p * p, d), (3 * p * p,)]
    return encoder + decoder + ([] if source == "none" else [(D, D), (D,), (D,), (E, D)])


def filled(shapes: list[tuple[int, ...]], gpus: int) -> int:
    """Return how many elements are sent of such parameters, see `ccmim_fast.ranks.fsdp`."""
    return sum(_filled(shape, gpus) for shape in shapes)


def _filled(shape: tuple[int, ...], gpus: int) -> int:
    if any(size % gpus == 0 for size in shape):
        return math.prod(shape)
    # torch fills the first axis up.
    return math.ceil(shape[0] / gpus) * gpus * math.prod(shape[1:])


def gathered_bytes(vit: Vit, gpus: int, source: str = "bank", decoder_blocks: int = 2) -> int:
    """Return the bytes of all weights as FSDP gathers them, once a step; ranks/fsdp.py keeps some in float32."""
    block = filled(block_shapes(vit.width), gpus)
    half = (vit.depth - 1) * block + decoder_blocks * filled(block_shapes(DECODER_WIDTH), gpus)
    return WEIGHT * half + EXACT * (block + filled(other_shapes(vit, source), gpus))


def summed_bytes(vit: Vit, gpus: int, source: str = "bank", decoder_blocks: int = 2) -> int:
    """Return the bytes of all gradients as FSDP scatters their sums."""
    blocks = vit.depth * block_shapes(vit.width) + decoder_blocks * block_shapes(DECODER_WIDTH)
    return GRADIENT * filled(blocks + other_shapes(vit, source), gpus)
