"""This module decides which implementation of an op runs: by its argument `kernels`, never by what can be imported.

It also shows the calls of functions whose implementation can be chosen, so that a choice can be measured on them.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

KERNELS = ("auto", "triton", "reference")
Kernels = str | Mapping[str, str]  # one of `KERNELS` for all ops, or for each by its name; `auto` for one without

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_INSTALLED = importlib.util.find_spec("triton") is not None


def uses_triton(kernels: Kernels, op: str, device: torch.device, *tensors: Tensor | None) -> bool:
    """Return True where `op` runs as Triton kernels: for `triton` always, for `auto` on CUDA where Triton is installed.

    Args:
        kernels: one of `KERNELS`, or a choice for each op by its name.
        device: of the op's inputs.
        tensors: its floating-point inputs; float64 has no kernel, there `auto` takes the reference.

    Raises ValueError for an unknown choice, or `triton` where no kernel can run.
    """
    if not isinstance(kernels, str):
        kernels = kernels.get(op, "auto")
    if kernels not in KERNELS:
        raise ValueError(f"kernels={kernels!r} must be one of {', '.join(KERNELS)}")
    if kernels == "triton":
        check_triton(device)
        for x in tensors:
            if x is not None and x.dtype not in _DTYPES:
                raise ValueError(f"kernels=triton takes float32, float16 or bfloat16, got {x.dtype}; use reference")
        return True
    auto = kernels == "auto" and device.type == "cuda" and _INSTALLED
    return auto and all(x is None or x.dtype in _DTYPES for x in tensors)


def check_triton(device: torch.device) -> None:
    """Raise ValueError unless Triton kernels run on `device`: on CUDA, or anywhere in Triton's interpreter (tests)."""
    if not _INSTALLED:
        raise ValueError("kernels=triton needs Triton: pip install triton, or use kernels=reference")
    if device.type != "cuda" and not _interpreted():
        raise ValueError(f"kernels=triton needs CUDA, got {device.type}; use kernels=reference")


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    from ccmim_kernels.triton_impl.launch import INTERPRETED

    return INTERPRETED


def operator(
    name: str, save: Callable | None = None, backward: Callable | None = None
) -> Callable[[Callable], torch.library.CustomOpDef]:
    """Make the decorated function the operator `ccmim::<name>`, for torch.compile and autograd.

    The function's annotations are the operator's schema; its body is the fake, which returns empty tensors like the
    result. The work is done by the launcher `name`, in the file of `triton_impl/` with the name of the function's
    module: imported at the first call, because Triton need not be installed. `save` and `backward` make its gradient,
    as `register_autograd` takes them.
    """

    def registered(fake: Callable) -> torch.library.CustomOpDef:
        def run(*arguments):
            launchers = importlib.import_module(fake.__module__.replace(".", ".triton_impl."))
            return getattr(launchers, name)(*arguments)

        schema = torch.library.infer_schema(fake, mutates_args=())
        made = torch.library.custom_op(f"ccmim::{name}", run, mutates_args=(), schema=schema)
        made.register_fake(fake)
        if backward is not None:
            made.register_autograd(backward, setup_context=save)
        return made

    return registered


class Call(NamedTuple):
    """This tuple is one call of a `choosable` function."""

    name: str  # of the choice that the call depends on
    function: Callable[..., Any]  # called as `function(*arguments, **options, **{by: candidate})`
    by: str  # the keyword argument that chooses
    arguments: tuple[Any, ...]
    options: dict[str, Any]  # the other keyword arguments


_observers: list[Callable[[Call], None]] = []


def choosable(name: str | Callable[..., str], by: str = "kernels") -> Callable[[Callable], Callable]:
    """Show calls of the decorated function to `observed`; what it calls in turn is not shown.

    `name` is that of the choice, or a function of the call's positional arguments; the keyword argument `by` chooses.
    """

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def called(*arguments, **options):
            if not _observers:
                return function(*arguments, **options)
            observe = _observers.pop()
            try:
                others = {key: value for key, value in options.items() if key != by}
                observe(Call(name if isinstance(name, str) else name(*arguments), function, by, arguments, others))
                return function(*arguments, **options)
            finally:
                _observers.append(observe)

        return called

    return decorate


@contextmanager
def observed(observe: Callable[[Call], None]) -> Iterator[None]:
    """Call `observe` before each call of a `choosable` function that is made inside, by this thread or another."""
    _observers.append(observe)
    try:
        yield
    finally:
        _observers.remove(observe)


def check_pixels(images: Tensor) -> None:
    """Raise ValueError for images of neither uint8 nor a floating-point type."""
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}, expected torch.uint8 or torch.float32")


def widened(x: Tensor) -> Tensor:
    """Return `x` as float32, the dtype in which scores and losses are computed; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
