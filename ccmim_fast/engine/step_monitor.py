"""All ranks learn of each step if it was skipped and if to stop, so many steps later that no host waits for a device.

That number is fixed, so the order of events is the same on every rank. (With DDP the host waits all the same in steps 2
to 11 of a process and in every hundredth after them: torch's logger reads the times of its events there.)
"""

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ccmim_fast.ranks.session import Session, max_over_ranks

_LAG = 2  # steps until a GPU is asked about one; it works a step or two behind its host


class StepStatus(NamedTuple):
    """This tuple describes a step of a while ago."""

    step: int  # its number, from 1
    bad: bool  # gradients were not finite, so no weight changed
    stop: bool  # some rank was asked to stop
    evidence: Any  # what this rank kept of it


class StepMonitor:
    """This class collects what ranks know of their steps."""

    def __init__(self, here: Session):
        self._device = here.device
        self._lag = _LAG if here.device.type == "cuda" else 0
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event | None, Any]] = deque()
        self.bad_in_a_row = 0  # at the end of those steps that `completed` gave

    def submit(self, step: int, bad: Tensor, stop: bool, evidence: Any = None) -> None:
        """Share a step's flags with all ranks, without waiting; every rank calls it after each step."""
        stop_flag = torch.full((), float(stop), device=self._device)
        flags_2 = max_over_ranks(torch.stack([bad.float(), stop_flag]))
        copied = None
        if flags_2.is_cuda:
            pinned_2 = torch.empty(2, pin_memory=True)
            flags_2 = pinned_2.copy_(flags_2, non_blocking=True)
            copied = torch.cuda.current_stream(self._device).record_event()
        self._pending.append((step, flags_2, copied, evidence))

    def completed(self, wait: bool = False) -> Iterator[StepStatus]:
        """Yield the steps that are known by now, each once, in order; `wait`: all that were submitted."""
        while len(self._pending) > (0 if wait else self._lag):
            step, flags_2, copied, evidence = self._pending.popleft()
            if copied is not None:
                copied.synchronize()
            bad, stop = (bool(flag) for flag in flags_2.tolist())
            self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0
            yield StepStatus(step, bad, stop, evidence)

    def reset(self) -> None:
        """Forget the steps that were submitted and not read yet."""
        self._pending.clear()
        self.bad_in_a_row = 0
