"""The check of an implementation: its results and gradients are held against those of the reference.

This file has the one criterion of accuracy; the tests of the kernels take it from here.
"""

import torch
from torch import Tensor

from ccmim_fast.autotune.calls import StepCall
from ccmim_fast.errors import one_line


def allowed_error(eager: Tensor, gold: Tensor, dtype: torch.dtype, factor: float = 2.0) -> float:
    """Return the largest error that is allowed: max(factor max|eager - gold|, eps max|gold|).

    eps is of `dtype`, and at least four of float32: eager may round hardly at all, as some processors add the products
    of a row without rounding in between.
    """
    rounding = max(torch.finfo(dtype).eps, 4 * torch.finfo(torch.float32).eps)
    return max(factor * _largest(eager.double() - gold), rounding * _largest(gold))


def differences(
    calls: list[StepCall], candidates: tuple[str, ...], reference: str, factor: float = 2.0
) -> dict[str, str]:
    """Return in one line for each candidate that fails or differs from the reference how it does; others are left out.

    Integers, such as a partition, must be equal bit for bit, numbers within `allowed_error`.
    """
    found: dict[str, str] = {}
    for call in calls:
        gold, eager = _results(call, reference, wide=True), _results(call, reference)
        for candidate in candidates:
            if candidate == reference or candidate in found:
                continue
            if line := _difference(call, candidate, eager, gold, factor):
                found[candidate] = line
    return found


def failure_of(calls: list[StepCall], candidate: str, compiled: bool) -> str:
    """Return in one line why a candidate cannot make the calls, or be traced by torch.compile with them; "" if it can.

    The results are not looked at.
    """
    try:
        for call in calls:
            _results(call, candidate)
            if compiled:
                _results(_traced(call), candidate)
    except Exception as error:
        return failure(error)
    return ""


def _traced(call: StepCall) -> StepCall:
    """Return the call as torch.compile makes it, without the kernels that it would write."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    function = torch.compile(call.call.function, backend="aot_eager", fullgraph=True, dynamic=False)
    return call._replace(call=call.call._replace(function=function))


def _difference(call: StepCall, candidate: str, eager: list[Tensor], gold: list[Tensor], factor: float) -> str:
    try:
        ours = _results(call, candidate)
    except Exception as error:  # a library's own; another candidate takes its place
        return failure(error)
    if [(x.shape, x.dtype) for x in ours] != [(x.shape, x.dtype) for x in eager]:
        return "its results have other shapes or dtypes than the reference's"
    for number, (x, expected, wide) in enumerate(zip(ours, eager, gold, strict=True)):
        if not x.is_floating_point():
            if not torch.equal(x, expected):
                return f"result {number} differs from the reference's"
            continue
        error, allowed = _largest(x.double() - wide), allowed_error(expected, wide, x.dtype, factor)
        # Written so that NaN fails.
        if not error <= allowed:
            return f"result {number} is wrong by {error:.3g}, allowed are {allowed:.3g}"
    return ""


def _results(call: StepCall, candidate: str, wide: bool = False) -> list[Tensor]:
    """Return the results of a call, then its gradients, for an output gradient that is the same in all dtypes."""
    out, leaves = call.forward(candidate, wide)
    results = [x.detach() for x in out]
    ends = [x for x in out if x.requires_grad]
    if ends and leaves:
        gradients = torch.autograd.grad(ends, leaves, [_output_gradient(x) for x in ends], allow_unused=True)
        results += [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients)]
    return results


def _output_gradient(x: Tensor) -> Tensor:
    """Return numbers between -1 and 1 that bfloat16 holds exactly, so that no dtype rounds them."""
    steps = torch.arange(x.numel(), device=x.device, dtype=torch.int64) * 37 % 129 - 64
    return (steps.to(x.dtype) / 64).view(x.shape)


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def failure(error: Exception) -> str:
    """Return an error in one line."""
    return f"{type(error).__name__}: {one_line(error)}"
