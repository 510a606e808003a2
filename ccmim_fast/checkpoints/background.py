"""Checkpoints written while training goes on: a copy of the state is made at once, a thread writes it.

On CUDA the copy is only enqueued: the order of the stream keeps it before the next step's changes, and the thread waits
for it. On a CPU it is made before `save` returns. Until it is written it takes as much memory on the host as the state.
No buffer is kept here: torch keeps pinned memory, and the C library that of a CPU run (engine/host_memory.py), so that
the next save finds it mapped already.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ccmim_fast.checkpoints import io
from ccmim_fast.checkpoints.collective import Layout, Together
from ccmim_fast.checkpoints.distributed import divide
from ccmim_fast.errors import CheckpointError
from ccmim_fast.optim.update import own_part

_FAILURES = 3  # saves in a row that may not fail; fewer are a warning


class BackgroundSaver:
    """Saves the checkpoints of a run, one at a time, in the order in which they were asked for.

    A save that fails, on a full disk or the like, is a warning; the third in a row, and the last of all, are an error.
    Nothing is told by the thread: failures come out of the next `save`, `poll`, `wait` or `close`. As a context manager
    it is closed at the end; where an error ends the run, a failed save only adds its line to it.

    Args:
        folder: of the checkpoints.
        keep: newest ones kept, see `io.save`.
        note: prints a line; called in the thread of the caller.
        together: ranks that have divided the state among them: each has a saver, and is called as the others are.
    """

    def __init__(self, folder: Path, keep: int, note: Callable[[str], None], together: Together | None = None):
        self._folder, self._keep, self._note, self._together = folder, keep, note, together
        self._writer = ThreadPoolExecutor(1, "checkpoints")
        self._running: Future | None = None
        # Since the last save that did not fail. Lines only: an exception would hold on to the state through its frames.
        self._failed: list[str] = []

    def save(self, step: int, state: dict[str, Any], for_good: bool = False) -> None:
        """Begin to save `state` as it is now; it may be changed in place afterwards. Waits for the save before.

        Args:
            step, state, for_good: as for `io.save`; the tensors are dense.

        Raises:
            CheckpointError: three saves in a row have failed.
            Exception: the save before raised it.
        """
        self.wait()
        if self._together is None:
            copied, copies = _on_host(state)
            write = functools.partial(io.save, self._folder, step, copied, self._keep, for_good)
        else:
            rest, pieces = divide(state)
            parts = {name: own_part(piece) for name, piece in pieces.items()}
            layouts = {name: Layout.of(piece) for name, piece in pieces.items()}
            copied, copies = _on_host({"rest": rest, "parts": parts})
            given = (self._folder, step, copied["rest"], copied["parts"], layouts, self._keep, for_good)
            write = functools.partial(self._together.save, *given)
        self._running = self._writer.submit(_write, write, copies)

    def poll(self) -> None:
        """As `wait`, if that would not wait."""
        if self._running is not None and self._running.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the running save, and tell if it failed; raises as `save` does."""
        told = len(self._failed)
        self._finish()
        if len(self._failed) > told:
            if len(self._failed) >= _FAILURES:
                raise CheckpointError(f"{self._take_last()}; the save failed {_FAILURES} times in a row")
            self._note(f"{self._failed[-1]}; training goes on")

    def close(self) -> None:
        """Wait for the running save.

        Raises:
            CheckpointError: the last save failed.
            Exception: it raised something else.
        """
        try:
            self._finish()
        finally:
            self._writer.shutdown()
        if self._failed:
            raise CheckpointError(self._take_last())

    def __enter__(self) -> "BackgroundSaver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            self._note(str(failure))

    def _finish(self) -> None:
        """Wait for the running save and count it; what is no CheckpointError is raised."""
        if self._running is None:
            return
        failure = self._running.exception()
        self._running = None
        if failure is None:
            self._failed.clear()
        elif isinstance(failure, CheckpointError):
            self._failed.append(str(failure))
        else:
            raise failure

    def _take_last(self) -> str:
        """The last failure, about to be raised: it is not to be told again."""
        line = self._failed[-1]
        self._failed.clear()
        return line


def _write(write: Callable[[], Any], copies: list["torch.cuda.Event"]) -> None:
    for done in copies:
        done.synchronize()
    write()


def _on_host(state: dict[str, Any]) -> tuple[dict[str, Any], list["torch.cuda.Event"]]:
    """A copy of `state` that shares no memory with it, on the host; what is in it is there once the events are over.

    Storages are copied whole, once each, and what shares one in `state` shares one in the copy: torch.save writes the
    same bytes of both.
    """
    storages: dict[int, torch.UntypedStorage] = {}
    copies: dict[int, Any] = {}
    devices = set()
    for tensor in _tensors(state):
        source = tensor.untyped_storage()
        # By which torch.save tells them apart, too; empty ones all have the address 0.
        key = source._cdata
        if key not in storages:
            storages[key] = _copy(source)
            devices.add(source.device)
        view = torch.empty(0, dtype=tensor.dtype)
        copies[id(tensor)] = view.set_(storages[key], tensor.storage_offset(), tensor.size(), tensor.stride())
    events = [torch.cuda.current_stream(device).record_event() for device in devices if device.type == "cuda"]
    # It copies containers with their attributes, and takes for each tensor the copy that is there already.
    return copy.deepcopy(state, copies), events


def _copy(source: torch.UntypedStorage) -> torch.UntypedStorage:
    """Its bytes in the host's memory; from CUDA on their way to pinned memory, in the order of the current stream."""
    on_cuda = source.device.type == "cuda"
    bytes_N = torch.empty(source.nbytes(), dtype=torch.uint8, pin_memory=on_cuda)
    bytes_N.copy_(torch.empty(0, dtype=torch.uint8, device=source.device).set_(source), non_blocking=on_cuda)
    return bytes_N.untyped_storage()


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
