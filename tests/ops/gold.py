"""This module holds the one criterion of accuracy: a kernel may err twice as much as eager PyTorch; float64 is gold."""

from collections.abc import Callable

import torch
from torch import Tensor

from ccmim_fast.autotune.check import allowed_error

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def assert_close_to_gold(ours: Tensor, eager: Tensor, gold: Tensor, what: str) -> None:
    """Assert max|ours - gold| <= max(2 max|eager - gold|, eps max|gold|), see `allowed_error`; NaN fails.

    Args:
        ours: of the kernel.
        eager: of the reference in the same dtype.
        gold: of the reference in float64.
        what: named in the message.
    """
    assert ours.shape == gold.shape, f"{what}: shape {list(ours.shape)}, expected {list(gold.shape)}"
    assert ours.dtype == eager.dtype, f"{what}: {ours.dtype}, eager gives {eager.dtype}"
    ours_64, eager_64, gold = ours.detach().double().cpu(), eager.detach().double().cpu(), gold.detach().cpu()
    error, error_eager = ((x - gold).abs().max().item() for x in (ours_64, eager_64))
    allowed, largest = allowed_error(eager_64, gold, ours.dtype), gold.abs().max().item()
    # Written so that NaN fails.
    assert error <= allowed, f"{what}: error {error:.3e}, eager's {error_eager:.3e}, max|gold| {largest:.3e}"


def compare(
    op: Callable[..., Tensor], inputs: dict[str, Tensor], gradients_of: list[str], what: str = "", **options
) -> None:
    """Run `op(**inputs, **options, kernels=...)` as kernel, eager and gold; compare the output and every gradient.

    Args:
        op: gives one tensor.
        inputs: in the dtype under test; gold sees its floating-point ones in float64.
        gradients_of: names of the inputs that receive a gradient, from the same random output gradient.
    """
    results = {}
    for run, kernels in (("ours", "triton"), ("eager", "reference"), ("gold", "reference")):
        values = {name: _leaf(x, run == "gold", name in gradients_of) for name, x in inputs.items()}
        out = op(**values, **options, kernels=kernels)
        results[run] = {"output": out}
        if gradients_of:
            torch.manual_seed(1)
            # The same rounded numbers in all three runs.
            weight = torch.randn(out.shape, dtype=torch.float64).to(_half(inputs, gradients_of)).to(out)
            grads = torch.autograd.grad(out, [values[n] for n in gradients_of], weight)
            results[run] |= dict(zip(gradients_of, grads))
    for name, gold in results["gold"].items():
        assert_close_to_gold(results["ours"][name], results["eager"][name], gold, f"{what} {name}")


def _leaf(x: Tensor, wide: bool, needs_grad: bool) -> Tensor:
    if wide and x.is_floating_point():
        x = x.double()
    return x.detach().clone(memory_format=torch.preserve_format).requires_grad_(needs_grad)


def _half(inputs: dict[str, Tensor], names: list[str]) -> torch.dtype:
    return inputs[names[0]].dtype
