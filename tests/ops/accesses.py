"""A launch's accesses to memory, held against the tensors it was given and against one another.

A GPU promises no order of programs, and Triton does not say which thread holds which lane: any other lane of a program
counts as another thread, which is waited for at a barrier only.
"""

from bisect import bisect_left
from typing import NamedTuple, NoReturn

import numpy as np
from torch import Tensor


class MisuseError(AssertionError):
    """This error says which kernel misused which memory."""


class Memory:
    """This class holds, of each element of a storage, the number of the last access that wrote or read it; 0: none."""

    def __init__(self, elements: int, element_size: int):
        self.element_size = element_size
        # Zeros take no memory until they are written to.
        self.written, self.read = np.zeros(elements, np.int64), np.zeros(elements, np.int64)
        self.has_output = False


class View:
    """This class describes the tensor that a kernel's pointer was given."""

    def __init__(self, name: str, tensor: Tensor, is_output: bool, memory: Memory):
        if memory.element_size != tensor.element_size():
            raise NotImplementedError(f"{name}: views of one storage with elements of different size are not watched")
        self.name, self.is_output, self.memory = name, is_output, memory
        self.shape, self.strides, self.offset = tuple(tensor.shape), tensor.stride(), tensor.storage_offset()
        self.count, self.is_contiguous = tensor.numel(), tensor.is_contiguous()
        memory.has_output |= is_output

    def contains(self, elements: np.ndarray) -> np.ndarray:
        """Say which offsets from the first element are elements of the view. No two of them may share memory."""
        if self.is_contiguous or self.count == 0:
            return (elements >= 0) & (elements < self.count)
        return (elements >= 0) & (self._divided(elements)[-1] == 0)

    def say(self, element: int) -> str:
        """Name the element at an offset by its index, or by the offset where it has none."""
        *index, rest = self._divided(element)
        is_inside = element >= 0 and rest == 0
        return f"{self.name}[{', '.join(map(str, index)) if is_inside else element}] of shape {list(self.shape)}"

    def missing(self) -> tuple[int, str]:
        """Count the elements that nobody has written, and name the first."""
        strides = [stride * self.memory.written.itemsize for stride in self.strides]
        written = np.lib.stride_tricks.as_strided(self.memory.written[self.offset :], self.shape, strides)
        index = np.argwhere(written == 0)
        return len(index), f"{self.name}{index[0].tolist() if len(index) else ''} of shape {list(self.shape)}"

    def _divided(self, elements):
        """Divide offsets into an index for each dimension, and a rest, which is 0 for elements of the view."""
        index = [elements * 0] * len(self.shape)
        for dim in sorted(range(len(self.shape)), key=lambda dim: -self.strides[dim]):
            if self.strides[dim] > 0:
                index[dim] = np.minimum(elements // self.strides[dim], self.shape[dim] - 1)
                elements = elements - index[dim] * self.strides[dim]
        return [*index, elements]


class _Done(NamedTuple):
    """This class says where the accesses from one number on were made."""

    number: int
    program: int
    line: str


class Accesses:
    """This class checks the accesses of a launch in the order in which they are made.

    Each access of a lane has a number. Those up to `start` are of other programs; those after `barrier` have no barrier
    between themselves and now.
    """

    def __init__(self, kernel: str, remembers: bool = True):
        """`remembers=False`: accesses are held against the views, not against one another."""
        self.kernel, self.remembers = kernel, remembers
        self.views: list[View] = []
        self.misuse: MisuseError | None = None
        self._memories: dict[int | str, Memory] = {}
        self._done: list[_Done] = []
        self._clock = self._start = self._barrier = self._program = 0
        self._line = ""

    def add(self, name: str, tensor: Tensor, is_output: bool) -> None:
        storage, size = tensor.untyped_storage(), tensor.element_size()
        # Storages without elements all have the same address.
        key = storage.data_ptr() or name
        if key not in self._memories:
            self._memories[key] = Memory(storage.nbytes() // size if self.remembers else 0, size)
        self.views.append(View(name, tensor, is_output, self._memories[key]))

    def begin(self, program: int) -> None:
        self._program = program
        self._start = self._barrier = self._clock

    def barrier(self) -> None:
        self._barrier = self._clock

    def load(self, view: View, elements: np.ndarray, line: str) -> None:
        """Check that one load may read the elements at these offsets."""
        self._line = line
        self._check("reads", view, elements, ~view.contains(elements), "which is outside the view")
        if not (self.remembers and view.memory.has_output):
            return
        number, place, memory = self._numbers(1), elements + view.offset, view.memory
        written, read = memory.written[place], memory.read[place]
        self._check("reads", view, elements, (written == 0) & view.is_output, "which nobody has written")
        self._check_order("reads", view, elements, written, "wrote")
        # What another program read stays so.
        memory.read[place] = np.where(self._is_of_another(read), read, number)

    def store(self, view: View, elements: np.ndarray, line: str) -> None:
        """Check that one store may write the elements at these offsets."""
        self._line = line
        self._check("writes", view, elements, ~view.contains(elements), "which is outside the view")
        undeclared = np.full(len(elements), not view.is_output)
        self._check("writes", view, elements, undeclared, "which is not declared an output")
        if not self.remembers:
            return
        numbers, place, memory = self._numbers(len(elements)), elements + view.offset, view.memory
        self._check_order("writes", view, elements, memory.written[place], "wrote")
        self._check_order("writes", view, elements, memory.read[place], "read")
        memory.written[place] = numbers
        self._check("writes", view, elements, memory.written[place] != numbers, "twice, from two lanes of one store")

    def end(self) -> None:
        """Check that every element of every output was written."""
        for view in self.views:
            missing, first = view.missing() if view.is_output and self.remembers else (0, "")
            if missing:
                self._fail(f"leaves {missing} of {view.count} elements unwritten, first {first}")

    def _numbers(self, lanes: int) -> np.ndarray:
        self._done.append(_Done(self._clock + 1, self._program, self._line))
        numbers = np.arange(self._clock + 1, self._clock + 1 + lanes)
        self._clock += lanes
        return numbers

    def _is_of_another(self, numbers: np.ndarray) -> np.ndarray:
        return (numbers > 0) & (numbers <= self._start)

    def _check_order(self, does: str, view: View, elements: np.ndarray, earlier: np.ndarray, did: str) -> None:
        """Check that every earlier access to these elements was this program's, before a barrier."""
        for is_wrong in (self._is_of_another(earlier), earlier > self._barrier):
            if is_wrong.any():
                done = self._done[bisect_left(self._done, earlier[is_wrong][0] + 1, key=lambda done: done.number) - 1]
                ours = done.program == self._program
                why = f"which {'it' if ours else f'program {done.program}'} {did} at {done.line}"
                self._check(does, view, elements, is_wrong, f"{why}, with no barrier in between" if ours else why)

    def _check(self, does: str, view: View, elements: np.ndarray, is_wrong: np.ndarray, why: str) -> None:
        if is_wrong.any():
            element = int(elements[is_wrong][0])
            self._fail(f"program {self._program} {does} {view.say(element)}, {why} (at {self._line})")

    def _fail(self, what: str) -> NoReturn:
        # Triton makes an error of its own of what a kernel raises: this one is kept.
        self.misuse = MisuseError(f"{self.kernel}: {what}")
        raise self.misuse
