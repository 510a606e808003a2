"""All ranks write a collective checkpoint: the first one leads, and each hears how it ended."""

import contextlib
import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ccmim_fast.checkpoints import distributed, io
from ccmim_fast.checkpoints.manifest import Sum
from ccmim_fast.errors import CheckpointError


class Layout(NamedTuple):
    """This tuple says how a tensor is divided among ranks."""

    shape: torch.Size
    stride: tuple[int, ...]
    placements: tuple[Any, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "Layout | None":
        """Return the layout of a tensor; None where it is not divided."""
        return cls(tensor.shape, tensor.stride(), tensor.placements) if isinstance(tensor, DTensor) else None


class CollectiveWriter:
    """Writes checkpoints with all ranks, in a process group of its own: a thread of each saves while another trains.

    Args:
        timeout: how long one rank waits for another.
    """

    def __init__(self, timeout: datetime.timedelta):
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._mesh = DeviceMesh.from_group(self._group, "cpu")

    def save(
        self,
        folder: Path,
        step: int,
        rest: dict[str, Any],
        parts: dict[str, Tensor],
        layouts: dict[str, Layout | None],
        keep: int,
        for_good: bool = False,
    ) -> None:
        """Save as `io.save` does; every rank calls this.

        Args:
            rest: the state without its pieces (`distributed.divide`); the first rank's is written.
            parts: this rank's parts of the pieces, on the host.
            layouts: of the pieces.

        Raises:
            CheckpointError: the checkpoint could not be written; raised on every rank.
        """
        pieces = {name: self._piece(part, layouts[name]) for name, part in parts.items()}
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

    def _piece(self, part: Tensor, layout: Layout | None) -> Tensor:
        if layout is None:
            return part
        shape, stride, placements = layout
        return DTensor.from_local(part, self._mesh, placements, run_check=False, shape=shape, stride=stride)

    def _broadcast(self, kind: str = "", text: str = "") -> list[str]:
        """Return the message of the first rank: `write` and a folder, `failed` and an error, or `saved`."""
        message = [kind, text]
        dist.broadcast_object_list(message, src=0, group=self._group)
        return message
