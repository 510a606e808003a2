"""Which arithmetic a device gets; `auto` follows the compute capability."""

import contextlib
from typing import NamedTuple

import torch

from ccmim_fast.errors import ConfigError

_DTYPES = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}


class Precision(NamedTuple):
    """Autocast dtype (None: fp32 throughout) and whether gradients are scaled. Master weights are fp32 always."""

    name: str
    dtype: torch.dtype | None
    scaled: bool

    def autocast(self, device: torch.device, cache: bool = True):
        """Context of the forward pass; `cache`: a weight that is used twice is cast once."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.dtype, cache_enabled=cache)


def choose_precision(name: str, device: torch.device) -> Precision:
    """The precision `name` on `device`; sets the TF32 policy of fp32 matmuls.

    `auto`: CUDA 6.x fp32 (fp16 runs at 1/64 rate there), 7.x fp16 with gradient scaling, 8.0 and later bf16; CPU bf16
    where it has the instructions, else fp32.

    Raises:
        ConfigError: the device cannot do what was asked.
    """
    if name == "auto":
        name = _auto(device)
    if name == "fp16" and device.type == "cpu":
        raise ConfigError("train.precision=fp16: not on a CPU; nearest: bf16, fp32")
    if name == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        raise ConfigError(f"train.precision=bf16: needs compute capability 8.0, this GPU has {major}.{minor}; use auto")
    # TF32 only where half precision was accepted for the rest: `fp32` means fp32.
    torch.set_float32_matmul_precision("highest" if name == "fp32" else "high")
    return Precision(name, _DTYPES[name], scaled=name == "fp16")


def _auto(device: torch.device) -> str:
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return "fp32" if major < 7 else "fp16" if major < 8 else "bf16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
