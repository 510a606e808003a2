"""A checkpoint written by all ranks together: the first one leads, and each hears how it ended."""

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
    """How a tensor is divided."""

    shape: torch.Size
    stride: tuple[int, ...]
    placements: tuple[Any, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "Layout | None":
        """None of a tensor that is not divided."""
        return cls(tensor.shape, tensor.stride(), tensor.placements) if isinstance(tensor, DTensor) else None


class Together:
    """All ranks of the run, in a group of their own: a thread of each may save while its main thread trains.

    Args:
        timeout: that one waits for another.
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
        """As `io.save`; every rank calls it.

        Args:
            rest: the state without its pieces (`distributed.divide`); the first rank's is written.
            parts: this rank's parts of the pieces, on the host.
            layouts: of the pieces.

        Raises:
            CheckpointError: it could not be written; raised on every rank.
        """
        pieces = {name: self._piece(part, layouts[name]) for name, part in parts.items()}
        if dist.get_rank() != 0:
            self._follow(pieces)
            return

        def beside(new: Path) -> dict[str, Sum]:
            self._tell("write", str(new))
            return distributed.write(new, pieces, self._group)

        try:
            io.save(folder, step, rest, keep, for_good, beside)
        except BaseException as error:
            self._tell("failed", str(error))
            raise
        self._tell("saved", "")

    def _follow(self, pieces: dict[str, Tensor]) -> None:
        while True:
            what, told = self._hear()
            if what == "saved":
                return
            if what == "failed":
                raise CheckpointError(told)
            try:
                distributed.write(Path(told), pieces, self._group)
            except OSError:
                continue  # the first rank has it, too, and tells

    def _piece(self, part: Tensor, layout: Layout | None) -> Tensor:
        if layout is None:
            return part
        shape, stride, placements = layout
        return DTensor.from_local(part, self._mesh, placements, run_check=False, shape=shape, stride=stride)

    def _tell(self, what: str, told: str) -> None:
        dist.broadcast_object_list([what, told], src=0, group=self._group)

    def _hear(self) -> tuple[str, str]:
        message = [None, None]
        dist.broadcast_object_list(message, src=0, group=self._group)
        return message[0], message[1]
