"""Calls of functions whose implementation can be chosen are seen here, so that it can be measured on them."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple


class Call(NamedTuple):
    """This tuple is one call of a `choosable` function.

    Attributes:
        name: of the choice that the call depends on.
        function: called as `function(*arguments, **options, **{by: candidate})`.
        by: the keyword argument that chooses.
        options: the other keyword arguments.
    """

    name: str
    function: Callable[..., Any]
    by: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]


_observers: list[Callable[[Call], None]] = []


def choosable(name: str | Callable[..., str], by: str = "kernels") -> Callable[[Callable], Callable]:
    """Show calls of the decorated function to `observed`; what it calls in turn is not shown.

    Args:
        name: of the choice; or a function of the call's positional arguments, where the choice depends on them.
        by: the keyword argument that chooses the implementation.
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
