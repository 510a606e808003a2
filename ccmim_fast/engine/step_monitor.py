"""What all ranks know of a step, a little later, so that no host waits for its device: was it skipped, shall we stop.

The order of events is the same on every rank: each asks the others about every step, and hears the answer a fixed
number of steps later.
"""

# B batch, L patches

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ccmim_fast.data.stream.batch import Batch
from ccmim_fast.engine.step import StepResult
from ccmim_fast.ranks.session import Session, max_over_ranks

_LAG = 2  # steps until a GPU is asked about one; it works a step or two behind its host


class Past(NamedTuple):
    """A step of a while ago.

    Attributes:
        step: its number, from 1.
        bad: gradients were not finite, so no weight changed.
        stop: some rank was asked to stop.
        ids, epochs, masks: of this rank's micro-batches: int64 [B] on the host, int64 [B] and bool [B, L] on the
            device.
    """

    step: int
    bad: bool
    stop: bool
    ids: list[np.ndarray]
    epochs: list[Tensor]
    masks: list[Tensor]


class _Asked(NamedTuple):
    step: int
    flags_2: Tensor  # on the host, once `there`
    there: "torch.cuda.Event | None"
    ids: list[np.ndarray]
    epochs: list[Tensor]
    masks: list[Tensor]


class StepMonitor:
    """Collects what ranks know of their steps.

    Args:
        here: this process's place.

    Attributes:
        bad_in_a_row: of the steps that `past` gave last.
    """

    def __init__(self, here: Session):
        self._device = here.device
        self._lag = _LAG if here.device.type == "cuda" else 0
        self._asked: deque[_Asked] = deque()
        self.bad_in_a_row = 0

    def saw(self, step: int, result: StepResult, batches: Sequence[Batch], stop: bool) -> None:
        """After a step, on every rank; `stop`: this one was asked to."""
        stop_flag = torch.full((), float(stop), device=self._device)
        flags_2 = max_over_ranks(torch.stack([result.gradients.bad.float(), stop_flag]))
        there = None
        if flags_2.is_cuda:
            pinned_2 = torch.empty(2, pin_memory=True)
            flags_2 = pinned_2.copy_(flags_2, non_blocking=True)
            there = torch.cuda.current_stream(self._device).record_event()
        # A captured step writes its masks into the same memory again.
        masks = [seen.mask_BL.clone() for seen in result.seen]
        ids, epochs = [batch.host_ids_B for batch in batches], [batch.epochs_B for batch in batches]
        self._asked.append(_Asked(step, flags_2, there, ids, epochs, masks))

    def past(self, everything: bool = False) -> Iterator[Past]:
        """The steps that are known by now, each once, in order; `everything`: wait for all."""
        while len(self._asked) > (0 if everything else self._lag):
            asked = self._asked.popleft()
            if asked.there is not None:
                asked.there.synchronize()
            bad, stop = (bool(flag) for flag in asked.flags_2.tolist())
            self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0
            yield Past(asked.step, bad, stop, asked.ids, asked.epochs, asked.masks)

    def forget(self) -> None:
        """What was asked and not heard yet is of no interest any more."""
        self._asked.clear()
        self.bad_in_a_row = 0
