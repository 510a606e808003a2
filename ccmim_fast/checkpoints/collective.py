"""All ranks write a collective checkpoint: the first one leads, and each hears how it ended."""

import contextlib
import datetime
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ccmim_fast.checkpoints import distributed, io
from ccmim_fast.checkpoints.manifest import Sum
from ccmim_fast.errors import CheckpointError


class CollectiveWriter:
    """Writes checkpoints with all ranks, in a process group of its own: a thread of each saves while another trains.

    One rank waits `timeout` for another. The copies of divided tensors lie in `mesh`, the ranks' host memories.
    """

    def __init__(self, timeout: datetime.timedelta):
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self.mesh = DeviceMesh.from_group(self._group, "cpu")

    def save(self, folder: Path, step: int, state: dict[str, Any], keep: int, for_good: bool = False) -> None:
        """Save as `io.save` does; every rank calls this, and a CheckpointError is raised on every rank."""
        rest, pieces = distributed.divide(state)
        if dist.get_rank() != 0:
            self._follow(pieces)
            return

        def beside(new: Path) -> dict[str, Sum]:
            self._broadcast("write", str(new))
            return distributed.write(new, pieces, self._group)

        try:
            io.save(folder, step, rest, keep, for_good, beside)
        except BaseException as error:
            self._broadcast("failed", str(error))
            raise
        self._broadcast("saved")

    def _follow(self, pieces: dict[str, Tensor]) -> None:
        while True:
            kind, text = self._broadcast()
            if kind == "saved":
                return
            if kind == "failed":
                raise CheckpointError(text)
            # An error is the first rank's, too, which tells of it.
            with contextlib.suppress(OSError):
                distributed.write(Path(text), pieces, self._group)

    def _broadcast(self, kind: str = "", text: str = "") -> list[str]:
        """Return the message of the first rank: `write` and a folder, `failed` and an error, or `saved`."""
        message = [kind, text]
        dist.broadcast_object_list(message, src=0, group=self._group)
        return message
