"""What every op launches, in every configuration its launcher can choose: recorded from the launchers, not listed."""

# B batch, L patches, K visible, M masked, D width

import functools
from collections.abc import Callable

import torch

from ccmim_kernels.launch import ROW_SIZES, Launch, recorded

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTHS = (768, 100)  # a multiple of 16, for which Triton vectorises, and one that is not


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ids(*shape: int) -> torch.Tensor:
    return empty(*shape, dtype=torch.int64)


def sample_partition() -> None:
    from ccmim_kernels.sample_partition import triton_impl

    for size in ROW_SIZES:
        for strategy in ("importance_sampling", "block"):
            triton_impl.sample_partition(
                empty(2, size),
                ids(2),
                grid=(1, size),
                keep=size // 4,
                seed=0,
                epochs_B=ids(2),
                strategy=strategy,
                noise="gumbel",
                temperature=1.0,
                block_min=16,
            )


def info_nce() -> None:
    from ccmim_kernels.info_nce import triton_impl

    h_BE, rows_B = empty(4, 256), empty(4)
    for precision in ("tf32x3", "ieee"):
        options = {"offset": 0, "tau": 0.2, "precision": precision}
        triton_impl.losses(h_BE, h_BE, excluded=2, **options)
        for of_keys in (False, True):
            triton_impl.gradient(h_BE, h_BE, rows_B, rows_B, rows_B, of_keys=of_keys, excluded=0, **options)


def gather_tokens() -> None:
    from ccmim_kernels.gather_tokens import triton_impl

    for dtype in DTYPES:
        for width in WIDTHS:
            tokens = empty(2, 196, width, dtype=dtype)
            for prefix in (empty(1, width), empty(1, width, dtype=dtype)):
                triton_impl.gather_tokens(tokens, ids(2, 49), prefix)
            triton_impl.scatter_tokens(empty(2, 50, width, dtype=dtype), ids(2, 49), 196)


def divide_tokens() -> None:
    from ccmim_kernels.divide_tokens import triton_impl

    for size in ROW_SIZES:
        for dtype in DTYPES:
            for width in WIDTHS:
                for logits, direction in ((empty(2, size), None), (None, empty(width))):
                    triton_impl.divide_tokens(
                        empty(2, size, width, dtype=dtype),
                        empty(1, width),
                        ids(2),
                        logits,
                        direction,
                        eps=1e-6,
                        with_masked=True,
                        keep=size // 4,
                        seed=0,
                        epochs_B=ids(2),
                        strategy="importance_sampling",
                        noise="gumbel",
                        temperature=1.0,
                    )


def cls_row() -> None:
    from ccmim_kernels.cls_row import triton_impl

    for size in ROW_SIZES:
        for dtype in DTYPES:
            for width in (64, 25):
                for kind in ("logits", "softmax"):
                    q, k = empty(2, 3, width, dtype=dtype), empty(2, size, 3, width, dtype=dtype)
                    triton_impl.cls_row(q, k, 1, kind, 0.125)


def restore_tokens() -> None:
    from ccmim_kernels.restore_tokens import triton_impl

    for dtype in DTYPES:
        for width in WIDTHS:
            triton_impl.restore_tokens(empty(2, 50, width, dtype=dtype), empty(width), ids(2, 196), empty(197, width))
            grad = empty(2, 197, width, dtype=dtype)
            triton_impl.visible_gradient(grad, ids(2, 196), 49)
            triton_impl.mask_token_gradient(grad, ids(2, 196), 49)


def masked_patch_loss() -> None:
    from ccmim_kernels.masked_patch_loss import triton_impl

    # Rows of 48 bytes, of 42 (not a multiple of 16), and of a single one.
    for dtype in DTYPES:
        for patch, channels in ((16, 3), (14, 3), (1, 1)):
            for norm_pix in (True, False):
                triton_impl.masked_patch_loss(
                    empty(2, 3, patch**2 * channels, dtype=dtype),
                    empty(2, 2 * patch, 2 * patch, channels, dtype=torch.uint8),
                    ids(2, 3),
                    patch,
                    empty(channels),
                    empty(channels),
                    norm_pix,
                )


def hog_target() -> None:
    from ccmim_kernels.hog_target import triton_impl

    for dtype in DTYPES:
        for cell in (8, 16, 32):
            for bins in (9, 18):
                images = empty(2, cell, cell, 3, dtype=torch.uint8)
                triton_impl.hog_target(images, ids(2, 1), cell, bins, cell, dtype)


OPS: dict[str, Callable[[], None]] = {
    "sample_partition": sample_partition,
    "divide_tokens": divide_tokens,
    "cls_row": cls_row,
    "gather_tokens": gather_tokens,
    "restore_tokens": restore_tokens,
    "info_nce": info_nce,
    "masked_patch_loss": masked_patch_loss,
    "hog_target": hog_target,
}


@functools.cache
def launches(op: str) -> tuple[Launch, ...]:
    """Every distinct launch of an op, in a fixed order."""
    with recorded(run=False) as found:
        OPS[op]()
    return tuple(dict.fromkeys(found))
