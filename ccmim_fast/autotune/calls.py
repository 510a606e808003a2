"""The calls of one training step that a choice is about, each kept once with its inputs, to be made again."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ccmim_kernels.dispatch import Call, observed


class StepCall(NamedTuple):
    """This tuple is a call that a step makes.

    Attributes:
        call: its arguments are detached tensors; those that receive a gradient in the step require one.
        gradient: the step takes the gradient of its results.
        autocast: dtype of autocast around it, or None.
        count: calls of the step with such arguments.
    """

    call: Call
    gradient: bool
    autocast: torch.dtype | None
    count: int = 1

    def forward(self, candidate: str, wide: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        """Make the call by an implementation; `wide`: on float64.

        Returns:
            The tensors of its result, and of its arguments those that receive a gradient.
        """
        _, function, by, arguments, options = self.call
        if wide:
            arguments, options = tuple(map(_widened, arguments)), {key: _widened(v) for key, v in options.items()}
        given = [*arguments, *options.values()]
        leaves = [x for x in given if isinstance(x, Tensor) and x.requires_grad]
        kind = next((x.device.type for x in given if isinstance(x, Tensor)), "cpu")
        with (
            torch.set_grad_enabled(self.gradient),
            torch.autocast(kind, self.autocast, enabled=self.autocast is not None),
        ):
            return list(_tensors(function(*arguments, **options, **{by: candidate}))), leaves


def calls_of(step: Callable[[], Any], device: torch.device) -> dict[str, list[StepCall]]:
    """Return the calls that `step()` makes, by the choice that they depend on; equal shapes are one call."""
    found: dict[tuple, StepCall] = {}

    def keep(call: Call) -> None:
        gradient = torch.is_grad_enabled()
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        options = tuple((key, _kind(value)) for key, value in call.options.items())
        key = (call.name, call.function, tuple(map(_kind, call.arguments)), options, gradient, autocast)
        if key in found:
            found[key] = found[key]._replace(count=found[key].count + 1)
            return
        arguments = tuple(_kept(x, gradient) for x in call.arguments)
        options = {name: _kept(x, gradient) for name, x in call.options.items()}
        found[key] = StepCall(call._replace(arguments=arguments, options=options), gradient, autocast)

    with observed(keep):
        step()
    by_name: dict[str, list[StepCall]] = {}
    for one in found.values():
        by_name.setdefault(one.call.name, []).append(one)
    return by_name


def _kind(value: Any) -> Any:
    """Return what calls of one kind have in common: of a tensor its layout, of another argument its value."""
    if not isinstance(value, Tensor):
        return repr(value)
    return tuple(value.shape), value.stride(), value.dtype, value.requires_grad


def _kept(value: Any, gradient: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    # FSDP lets go of a weight's memory after the pass.
    is_weight = isinstance(value, nn.Parameter) or isinstance(value._base, nn.Parameter)
    own = value.detach().clone() if is_weight else value.detach()
    return own.requires_grad_(gradient and value.requires_grad)


def _widened(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple | list):
        for part in result:
            yield from _tensors(part)
