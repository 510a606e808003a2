"""Attention by the backend asked for, or by the one measured best. The only file that imports xformers."""

# B batch, Q query tokens, T tokens, N heads, H head dim

import contextlib
import importlib.util
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ccmim_fast.errors import ConfigError, MachineError

# `sdpa` leaves the choice to torch; the three behind it are its CUDA kernels, one by one.
_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
CUDA_ONLY = ("xformers", *_KERNELS)
BACKENDS = ("sdpa", "plain", *CUDA_ONLY)

# What `auto` takes: by device (compute capability, or None for a CPU) and dtype, up to how many tokens which backend;
# beyond, and for all that is not listed, `sdpa`. From benchmarks/results/attention-*; no GPU has been measured yet.
MEASURED_BEST: dict[tuple[tuple[int, int] | None, torch.dtype], tuple[tuple[int, str], ...]] = {
    # AMD EPYC with AVX-512 and bf16, two threads: of the CPU's fused kernel it is the backward pass that is slow.
    (None, torch.bfloat16): ((401, "plain"),),
}


def check_attention(name: str, device: torch.device) -> None:
    """Return if `train.attention=name` can run on `device`.

    Raises:
        ConfigError: it needs CUDA, and `device` is a CPU.
        MachineError: xformers is not installed.
    """
    if name in CUDA_ONLY and device.type != "cuda":
        raise ConfigError(f"train.attention={name} needs CUDA, got {device.type}; use attention=sdpa")
    if name == "xformers" and importlib.util.find_spec("xformers") is None:
        raise MachineError("train.attention=xformers: not installed; pip install xformers, or use attention=sdpa")


def attention(q_BQNH: Tensor, k_BTNH: Tensor, v_BTNH: Tensor, backend: str = "auto", dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(H)) v, [B, Q, N, H], in the dtype of the inputs.

    Equivalent PyTorch: `F.scaled_dot_product_attention` with tokens and heads swapped before and after.

    Args:
        q_BQNH, k_BTNH, v_BTNH: float of one dtype; all receive gradients.
        backend: `auto`, `sdpa` (torch's choice), `plain` (two products and a softmax, weights in memory), or, on
            CUDA, `flash`, `cudnn`, `efficient` or `xformers`.
        dropout: of the attention weights.

    Raises:
        RuntimeError: from torch or xformers, where the backend has no kernel for the device, dtype or shape.
    """
    if backend == "auto":
        backend = _measured_best(q_BQNH.device, k_BTNH.shape[1], q_BQNH.dtype)
    if backend == "plain":
        return _plain(q_BQNH, k_BTNH, v_BTNH, dropout)
    if backend == "xformers":
        return _memory_efficient()(q_BQNH, k_BTNH, v_BTNH, p=dropout)
    chosen = sdpa_kernel(_KERNELS[backend]) if backend in _KERNELS else contextlib.nullcontext()
    with chosen:
        mixed_BNQH = F.scaled_dot_product_attention(
            q_BQNH.transpose(1, 2), k_BTNH.transpose(1, 2), v_BTNH.transpose(1, 2), dropout_p=dropout
        )
    return mixed_BNQH.transpose(1, 2)


def _plain(q_BQNH: Tensor, k_BTNH: Tensor, v_BTNH: Tensor, dropout: float) -> Tensor:
    q_BNQH, k_BNTH, v_BNTH = (x.transpose(1, 2) for x in (q_BQNH, k_BTNH, v_BTNH))
    # Autocast would let the softmax return float32, and round for the second product.
    with torch.autocast(q_BQNH.device.type, enabled=False):
        weights_BNQT = ((q_BNQH * q_BNQH.shape[-1] ** -0.5) @ k_BNTH.transpose(2, 3)).softmax(-1)
        return (F.dropout(weights_BNQT, dropout) @ v_BNTH).transpose(1, 2)


def _measured_best(device: torch.device, tokens: int, dtype: torch.dtype) -> str:
    architecture = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    for most, backend in MEASURED_BEST.get((architecture, dtype), ()):
        if tokens <= most:
            return backend
    return "sdpa"


@cache
def _memory_efficient():
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention
