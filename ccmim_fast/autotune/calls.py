"""The calls of one training step that a choice is about, each kept once with its inputs, to be made again."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ccmim_kernels.dispatch import Call, observed


class StepCall(NamedTuple):
    """This tuple is a call that a step makes."""

    call: Call  # its arguments are detached tensors; those that receive a gradient in the step require one
    gradient: bool  # the step takes the gradient of its results
    autocast: torch.dtype | None  # around it
    count: int = 1  # calls of the step with such arguments

    def passes(self, candidate: str, gradient_of: Callable[[Tensor], Tensor], wide: bool = False) -> list[Tensor]:
        """Make the call by an implementation (`wide`: on float64), and go back from `gradient_of` each result.

        Returns the tensors of its result, then the gradients of arguments that receive one; all without gradient.
        """
        _, function, by, arguments, options = self.call
        if wide:
            arguments, options = tree_map(_widened, (arguments, options))
        given = _tensors((arguments, options))
        with (
            torch.set_grad_enabled(self.gradient),
            torch.autocast(given[0].device.type, self.autocast, enabled=self.autocast is not None),
        ):
            results = _tensors(function(*arguments, **options, **{by: candidate}))
        ends, leaves = ([x for x in tensors if x.requires_grad] for tensors in (results, given))
        gradients = ()
        if ends and leaves:
            gradients = torch.autograd.grad(ends, leaves, list(map(gradient_of, ends)), materialize_grads=True)
        return [*(x.detach() for x in results), *gradients]


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


def _tensors(nested: Any) -> list[Tensor]:
    return [x for x in tree_leaves(nested) if isinstance(x, Tensor)]
