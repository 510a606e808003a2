"""This script attends by xformers on the null device, in each dtype, and tells which operators both passes take."""

import torch
from nullgpu.counters import counted, tell, without_cudnn

from ccmim_fast.models.block import attention
from ccmim_fast.models.memory_efficient import operators


def outcome(dtype: torch.dtype) -> dict:
    """Take both passes; of what is refused tell the message."""
    inputs = [torch.ones(2, 50, 4, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3)]
    try:
        with counted() as counts:
            out = attention(*inputs, backend="xformers")
            gradients = torch.autograd.grad(out, inputs, out.detach())
        shapes = [list(x.shape) for x in (out, *gradients)]
        return {"operators": operators(*inputs), "shapes": shapes, "kernels": list(counts.names("kernel"))}
    except NotImplementedError as error:
        return {"refused": str(error)}


if __name__ == "__main__":
    without_cudnn()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        tell(str(dtype), outcome(dtype))
