"""Memory on a GPU that batches are written to by turns, on a stream of its own, while a step reads the ones before."""

from collections.abc import Callable

import torch
from torch import Tensor


class Buffers:
    """Where a loader puts its images.

    On CUDA they are `2 * held` tensors, written by turns: a batch is there until `2 * held - 1` others were asked for.
    A copy waits for the work that was given to the device before the batch `held` places behind it was asked for, and
    no other work waits but the one that reads it. On a CPU each batch has memory of its own.

    Args:
        shape: of a batch; uint8.
        held: batches that are asked for before the first of them is used: the micro-batches of a step.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device, held: int):
        self._shape, self._device, self._held, self._asked = shape, device, held, 0
        if device.type == "cuda":
            self._slots = [torch.empty(shape, dtype=torch.uint8, device=device) for _ in range(2 * held)]
            self._asked_at: list[torch.cuda.Event | None] = [None] * (2 * held)
            self._stream = torch.cuda.Stream(device)

    def fill(self, copy: Callable[[Tensor, "torch.cuda.Stream | None"], object]) -> Tensor:
        """The next batch, which `copy(tensor, stream)` writes; on CUDA in the order of that stream."""
        if self._device.type != "cuda":
            images_BHWC = torch.empty(self._shape, dtype=torch.uint8)
            copy(images_BHWC, None)
            return images_BHWC
        current = torch.cuda.current_stream(self._device)
        place = self._asked % len(self._slots)
        self._asked_at[place] = current.record_event()
        # Batch k was last used before batch k + held was asked for; its memory is for batch k + 2 held.
        used = self._asked_at[(self._asked - self._held) % len(self._slots)]
        if used is not None:
            self._stream.wait_event(used)
        self._asked += 1
        with torch.cuda.stream(self._stream):
            copy(self._slots[place], self._stream)
        current.wait_event(self._stream.record_event())
        return self._slots[place]
