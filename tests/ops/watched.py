"""Triton's interpreter, watched: within `watched()` a launch that misuses memory raises `MisuseError`.

An access of any lane of any program is a fault where it
- is outside the view that its pointer was given, or in the gaps of a strided one;
- writes to what is not said to be an output, or reads of an output what nobody has written;
- reads or writes what another program wrote, or writes what another program read;
- reads or writes what its own program wrote, or writes what its own program read, with no barrier in between;
- writes what another lane of the same store writes.
An element of an output that nobody writes is a fault of the launch.

What is an output is said by the comment of the pointer's line in the kernel's signature: `out` (whatever it held before
the launch is not read), or `out where NAME`: an output where the argument NAME is not zero. Whether an input was ever
written is not known here: tests poison memory.
"""

import inspect
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import triton
from ops.accesses import Accesses, View
from torch import Tensor
from triton.runtime import interpreter

_OUTPUT = re.compile(r"^\s*(\w+),\s*#.*\bout\b(?: where (\w+))?", re.MULTILINE)
_TRITON = os.path.dirname(triton.__file__)
_Builder = interpreter.InterpreterBuilder
_load, _store, _implicit_cvt = _Builder.create_masked_load, _Builder.create_masked_store, interpreter._implicit_cvt
_set_grid_idx = _Builder.set_grid_idx
# A kernel sees addresses of our own: they begin with the number of the pointer from which they were computed, so that
# an access belongs to one pointer, however far it is from the pointer's memory.
_BITS = 48


class Launch:
    """This class knows the pointers of a launch by the addresses that its kernel sees."""

    def __init__(self, kernel: Any, arguments: dict[str, Any], remembers: bool):
        self.accesses = Accesses(kernel.__name__, remembers)
        said = dict(_OUTPUT.findall(inspect.getsource(kernel)))
        self._outputs = {name for name, where in said.items() if not where or arguments[where]}
        self._names = iter(name for name, value in arguments.items() if isinstance(value, Tensor))
        self._bases: list[int] = []
        self._shifts: list[int] = []  # from our address to the real one

    def address(self, tensor: Tensor) -> int:
        """Return the address at which the kernel shall see the next of its tensors."""
        name, number = next(self._names), len(self._bases)
        self.accesses.add(name, tensor, name in self._outputs)
        # Halfway between two numbers, and aligned as the real one is.
        base = (number << _BITS) + (1 << _BITS - 1) + tensor.data_ptr() % 4096
        self._bases.append(base)
        self._shifts.append((base - tensor.data_ptr()) % 2**64)
        return base

    def resolve(self, pointers: Any, mask: Any) -> tuple[Any, list[tuple[View, np.ndarray]]]:
        """Return the real pointers, and by view the offsets of the lanes that are not masked."""
        address = pointers.data
        number = np.minimum(address >> _BITS, len(self._bases) - 1)
        real = address - np.array(self._shifts, np.uint64)[number]
        active = np.broadcast_to(mask.data, address.shape)
        address, number = address[active], number[active]
        places = []
        for one in {number[0]} if len(number) and (number == number[0]).all() else np.unique(number):
            view = self.accesses.views[one]
            offset = (address[number == one] - np.uint64(self._bases[one])).view(np.int64)
            places.append((view, offset // view.memory.element_size))
        return type(pointers)(real, pointers.dtype), places


class Executor(interpreter.GridExecutor):
    """This class runs a launch, watched; of `programs` only these, if any are named (-1: the last)."""

    programs: Sequence[int] = ()
    running: Launch

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        parameters = inspect.signature(self.fn).parameters
        arguments = inspect.getcallargs(self.fn, *args, **{k: v for k, v in kwargs.items() if k in parameters})
        launch = Launch(self.fn, arguments, remembers=not self.programs)
        (count,) = self.grid
        chosen = sorted({program % count for program in self.programs}) or range(count)

        def begin(builder: Any, x: int, y: int, z: int) -> None:
            builder.grid_dim = (count, 1, 1)
            _set_grid_idx(builder, chosen[x], y, z)
            launch.accesses.begin(chosen[x])

        self.grid = (len(chosen),)
        with patch.object(Executor, "running", launch, create=True), patch.object(_Builder, "set_grid_idx", begin):
            try:
                super().__call__(*args, **kwargs)
            except interpreter.InterpreterError:
                if launch.accesses.misuse is None:
                    raise
                raise launch.accesses.misuse from None
            launch.accesses.end()

    def _restore_args_dev(self, *arguments: Any) -> None:
        # Tensors of a CPU are used in place; to copy them onto themselves would touch all of their memory.
        if not self.programs:
            super()._restore_args_dev(*arguments)


def line() -> str:
    """Return the line of the kernel, or of a function it calls, that is being run."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__ or frame.f_code.co_filename.startswith(_TRITON):
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


def load(builder: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
    real, places = Executor.running.resolve(pointers, mask)
    for view, elements in places:
        Executor.running.accesses.load(view, elements, line())
    return _load(builder, real, mask, *rest, **options)


def store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
    real, places = Executor.running.resolve(pointers, mask)
    for view, elements in places:
        Executor.running.accesses.store(view, elements, line())
    return _store(builder, real, value, mask, *rest, **options)


def barrier(builder: Any) -> None:
    Executor.running.accesses.barrier()


def atomic(builder: Any, *rest: Any) -> None:
    raise NotImplementedError("atomic operations are not watched, and not compiled for compute capability 6.1")


def argument(value: Any) -> Any:
    """Convert an argument of a kernel; a tensor becomes a pointer to an address of ours."""
    converted = _implicit_cvt(value)
    if isinstance(value, Tensor):
        converted.handle.data[...] = Executor.running.address(value)
    return converted


@contextmanager
def watched(programs: Sequence[int] = ()) -> Iterator[None]:
    """Watch the launches inside. If `programs` are named, only these run, and what they do is not compared."""
    hooks = {"create_masked_load": load, "create_masked_store": store, "create_barrier": barrier}
    hooks |= {name: atomic for name in vars(_Builder) if name.startswith("create_atomic")}
    with (
        patch.multiple(_Builder, **hooks),
        patch.multiple(interpreter, GridExecutor=Executor, _implicit_cvt=argument),
        patch.object(Executor, "programs", programs),
    ):
        yield
