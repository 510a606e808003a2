"""Public function of the op: argument checks, then the implementation."""

# B batch, L patches, K visible, M masked

import torch
from torch import Tensor

from ccmim_kernels.dispatch import uses_triton
from ccmim_kernels.partition import Partition
from ccmim_kernels.philox import per_sample
from ccmim_kernels.sample_partition import reference

STRATEGIES = ("random", "block", "importance", "importance_sampling")
NOISES = ("gumbel", "uniform")


def check_partition_arguments(
    strategy: str, noise: str, keep: int, patches: int, temperature: float, seed: int, epoch: int | Tensor
) -> None:
    """Raise ValueError unless the arguments shared by all dividing ops are possible."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} must be one of {', '.join(STRATEGIES)}")
    if noise not in NOISES:
        raise ValueError(f"noise={noise!r} must be one of {', '.join(NOISES)}")
    if not 1 <= keep < patches:
        raise ValueError(f"keep={keep} must be in 1..{patches - 1}")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be greater than 0")
    for name, word in (("seed", seed), ("epoch", epoch)):
        # A tensor's value is not looked at: that would wait for the device.
        if not isinstance(word, Tensor) and not 0 <= word < 2**32:
            raise ValueError(f"{name}={word} must be in 0..{2**32 - 1}")


def checked_ids(ids_B: Tensor, batch: int) -> Tensor:
    """[batch] sample ids as int64; ValueError for another shape."""
    if tuple(ids_B.shape) != (batch,):
        raise ValueError(f"ids are {list(ids_B.shape)}, expected [{batch}]")
    return ids_B.to(torch.int64)


def checked_epochs(epoch: int | Tensor, ids_B: Tensor) -> Tensor:
    """[B] epochs as int64; ValueError for another shape than [] or [B]."""
    if isinstance(epoch, Tensor) and epoch.shape not in ((), ids_B.shape):
        raise ValueError(f"epoch is {list(epoch.shape)}, expected [] or {list(ids_B.shape)}")
    return per_sample(epoch, ids_B)


def checked_logits(logits_BL: Tensor | None, batch: int, patches: int) -> Tensor | None:
    """[batch, patches] scores without gradient, float32 whatever they came in (float64 stays); ValueError likewise."""
    if logits_BL is None:
        return None
    if tuple(logits_BL.shape) != (batch, patches):
        raise ValueError(f"logits are {list(logits_BL.shape)}, expected [{batch}, {patches}]")
    return widened(logits_BL.detach())


def sample_partition(
    logits_BL: Tensor | None,
    ids_B: Tensor,
    *,
    keep: int,
    grid: tuple[int, int],
    seed: int,
    epoch: int | Tensor,
    strategy: str = "importance_sampling",
    noise: str = "gumbel",
    temperature: float = 1.0,
    block_min: int = 16,
    kernels: str = "auto",
) -> Partition:
    """Divide each image's patches into `keep` visible and L - keep masked ones (paper, section 3.2 and Table 5).

    Every strategy is one key per patch; the largest keys are masked, equal keys by patch index:

    - `random`: keys ~ U(0, 1) (MAE).
    - `block`: block-wise masking (BEiT), blocks of at least `block_min` patches.
    - `importance`: keys = log s, the largest scores are masked.
    - `importance_sampling`: keys = log s / T + Gumbel noise, that is, sampling without replacement in proportion to
      s^(1/T) (Gumbel top-k). With `noise="uniform"` keys = log s / T - U(0, 1), as in the authors' code.

    The noise is a function of (seed, epoch, sample id, patch): a mask does not depend on the batch it comes in.

    Args:
        logits_BL: [B, L] float, log s up to a constant per row (Eq. 4 before its softmax); None for `random`, `block`.
        ids_B: [B] int64 sample ids.
        keep: number of visible patches, 1 .. L - 1.
        grid: rows and columns of patches, rows * columns = L.
        seed, epoch: 0 .. 2**32 - 1; the epoch as a number, or as int64 on the device of `ids_B`, one for
            all or [B].
        kernels: `auto`, `triton` or `reference`, see `ccmim_kernels.dispatch`; the partition is the same, bit for bit.

    Returns:
        A `Partition`. Nothing of it has a gradient.

    Raises:
        ValueError: an argument out of its range; the message names it and its limit.
    """
    patches = grid[0] * grid[1]
    check_partition_arguments(strategy, noise, keep, patches, temperature, seed, epoch)
    ids_B = checked_ids(ids_B, ids_B.shape[0])
    if strategy.startswith("importance"):
        if logits_BL is None:
            raise ValueError(f"strategy={strategy} needs logits")
        logits_BL = checked_logits(logits_BL, ids_B.shape[0], patches)
    else:
        logits_BL = None
    sampling = {
        "keep": keep,
        "seed": seed,
        "epoch": checked_epochs(epoch, ids_B),
        "strategy": strategy,
        "noise": noise,
        "temperature": temperature,
        "block_min": block_min,
    }
    if uses_triton(kernels, "sample_partition", ids_B.device, logits_BL):
        return Partition(*_sample_partition(logits_BL, ids_B, rows=grid[0], columns=grid[1], **sampling))
    return reference.sample_partition(logits_BL, ids_B, patches=patches, grid=grid, **sampling)


def widened(logits_BL: Tensor) -> Tensor:
    """Scores are float32 whatever they come in; float64 stays."""
    return logits_BL if logits_BL.dtype == torch.float64 else logits_BL.float()


@torch.library.custom_op("ccmim::sample_partition", mutates_args=())
def _sample_partition(
    logits: Tensor | None,
    ids: Tensor,
    rows: int,
    columns: int,
    keep: int,
    seed: int,
    epoch: Tensor,
    strategy: str,
    noise: str,
    temperature: float,
    block_min: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from ccmim_kernels.sample_partition import triton_impl

    return triton_impl.sample_partition(
        logits,
        ids,
        grid=(rows, columns),
        keep=keep,
        seed=seed,
        epochs_B=epoch,
        strategy=strategy,
        noise=noise,
        temperature=temperature,
        block_min=block_min,
    )


@_sample_partition.register_fake
def _(logits, ids, rows, columns, keep, *_sampling):
    B, L = ids.shape[0], rows * columns
    index, flag = {"dtype": torch.int64}, {"dtype": torch.bool}
    return (
        ids.new_empty((B, keep), **index),
        ids.new_empty((B, L - keep), **index),
        ids.new_empty((B, L), **index),
        ids.new_empty((B, L), **flag),
        ids.new_empty((B,), **flag),
    )
