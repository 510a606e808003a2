"""xformers' attention. Only this file imports xformers."""

# B batch, Q query tokens, T tokens, N heads, H head dim

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

_attention: Callable[..., Tensor] | None = None


def memory_efficient(q_BQNH: Tensor, k_BTNH: Tensor, v_BTNH: Tensor, dropout: float) -> Tensor:
    """Compute attention [B, Q, N, H] by xformers' `memory_efficient_attention`; in code to be compiled after `load`."""
    if _attention is None:
        load()
    return _attention(q_BQNH, k_BTNH, v_BTNH, p=dropout)


def load() -> None:
    """Import xformers, which torch.compile could not trace."""
    global _attention
    _load_cuda_12_runtime()
    from xformers.ops import memory_efficient_attention

    _attention = memory_efficient_attention


def operators(q_BQNH: Tensor, k_BTNH: Tensor, v_BTNH: Tensor) -> tuple[str, str]:
    """Return xformers' names of the operators of forward and backward pass, such as `cutlassF-pt` and `cutlassB-pt`.

    Raises NotImplementedError where xformers has none for these inputs; the message has a line and a reason for each.
    """
    load()
    from xformers.ops import fmha
    from xformers.ops.fmha.dispatch import _dispatch_bw, _dispatch_fw

    inputs = fmha.Inputs(q_BQNH, k_BTNH, v_BTNH)
    return _dispatch_fw(inputs, True).NAME, _dispatch_bw(inputs, None).NAME


def _load_cuda_12_runtime() -> None:
    """Load libcudart.so.12 of the package nvidia-cuda-runtime-cu12, unless this torch is of CUDA 12.

    xformers' wheel is built for CUDA 12. Under a torch for CUDA 13 its extension needs that library; without the
    extension xformers refuses all its operators, torch's own among them (seen with 0.0.35 and torch 2.15).
    """
    if (torch.version.cuda or "12").startswith("12."):
        return
    found = importlib.util.find_spec("nvidia")
    for folder in found.submodule_search_locations if found else ():
        if (library := Path(folder, "cuda_runtime", "lib", "libcudart.so.12")).is_file():
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            return
