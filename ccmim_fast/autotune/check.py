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
        gold, eager = (call.passes(reference, _output_gradient, wide) for wide in (True, False))
        for candidate in candidates:
            if candidate == reference or candidate in found:
                continue
            if line := _difference(call, candidate, eager, gold, factor):
                found[candidate] = line
    return found


def failure_of(calls: list[StepCall], candidate: str, compiled: bool) -> str:
    """Return in one line why a candidate cannot make the calls, or be traced with them; "": it can do both."""
    try:
        for call in calls:
            call.passes(candidate, _output_gradient)
            if compiled:  # traced, without the kernels that torch.compile would write
                torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
                function = torch.compile(call.call.function, backend="aot_eager", fullgraph=True, dynamic=False)
                call._replace(call=call.call._replace(function=function)).passes(candidate, _output_gradient)
    except Exception as error:
        return failure(error)
    return ""


def _difference(call: StepCall, candidate: str, eager: list[Tensor], gold: list[Tensor], factor: float) -> str:
    try:
        ours = call.passes(candidate, _output_gradient)
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


def _output_gradient(x: Tensor) -> Tensor:
    """Return numbers between -1 and 1 that bfloat16 holds exactly, so that no dtype rounds them."""
    steps = torch.arange(x.numel(), device=x.device, dtype=torch.int64) * 37 % 129 - 64
    return (steps.to(x.dtype) / 64).view(x.shape)


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def failure(error: Exception) -> str:
    """Return an error in one line."""
    return f"{type(error).__name__}: {one_line(error)}"
