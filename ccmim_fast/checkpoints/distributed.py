"""Tensors that ranks have divided among them lie in files of torch.distributed.checkpoint: each rank writes its own.

The files lie in a checkpoint's folder and are named in its manifest (checkpoints/manifest.py). Reading them runs no
code: their index, a pickle, may use only the few classes that it is made of; tensors are read by `weights_only`.
"""

# A "piece" is a tensor of the state, by its path: "optimizer/state/3/exp_avg".

import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.tensor import DTensor, distribute_tensor

from ccmim_fast.checkpoints.manifest import Hashed, Sum
from ccmim_fast.errors import CheckpointError, one_line

_INDEX = ".metadata"  # torch's name for it
_DIVIDED = ("model", "optimizer", "ema")  # of the state; all else is whole on the first rank


def divide(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Take the tensors of model, optimizer and averages out of a state; returns the rest and the tensors by path."""
    pieces: dict[str, Tensor] = {}

    def take(path: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        pieces[path] = value
        return None

    return _mapped(state, take), pieces


def unite(state: dict[str, Any], pieces: Mapping[str, Tensor]) -> dict[str, Any]:
    """Invert `divide`."""
    return _mapped(state, pieces.get)


def _mapped(state: dict[str, Any], change: Callable[[str, Any], Any]) -> dict[str, Any]:
    """Change what lies, in dicts within dicts, in the parts of a state that ranks divide."""

    def mapped(value: Any, path: str) -> Any:
        if isinstance(value, dict):
            return {key: mapped(item, f"{path}/{key}") for key, item in value.items()}
        return change(path, value)

    return {key: mapped(value, key) if key in _DIVIDED else value for key, value in state.items()}


class _HashedFiles(FileSystem):
    """This file system of torch's writer takes the sum of each file on its way to the disk."""

    def __init__(self):
        super().__init__()
        self.sums: dict[str, Sum] = {}

    @contextmanager
    def create_stream(self, path: Path, mode: str) -> Iterator[BinaryIO]:
        with Hashed(path) as file:
            yield file
            self.sums[Path(path).name] = file.sum()

    def rename(self, path: Path, new_path: Path) -> None:
        super().rename(path, new_path)
        self.sums[Path(new_path).name] = self.sums.pop(Path(path).name)


def write(folder: Path, pieces: Mapping[str, Tensor], group: dist.ProcessGroup) -> dict[str, Sum]:
    """Write the pieces into `folder`; return the sums of all ranks' files, or raise a rank's OSError on all of them."""
    writer = dcp.FileSystemWriter(folder)
    writer.fs = files = _HashedFiles()
    try:
        dcp.save(dict(pieces), storage_writer=writer, process_group=group)
    except CheckpointException as error:
        causes = [failure[0] for failure in error.failures.values()]
        raise next((cause for cause in causes if isinstance(cause, OSError)), RuntimeError(repr(causes[0]))) from None
    sums: list[dict[str, Sum]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(sums, files.sums, group=group)
    return {name: found for of_rank in sums for name, found in sorted(of_rank.items())}


# What torch's index is made of, as (module, name); and the types of elements, which are looked up in torch.
_METADATA, _FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
_HARMLESS = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata")),
    *((_METADATA, name) for name in ("TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING")),
    *((_FILES, "_StorageInfo"), ("torch", "Size"), ("torch.serialization", "_get_layout")),
    *(("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")),
}


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _HARMLESS or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise CheckpointError(f"{_INDEX} refused: it asks for {module}.{name}"[:200])


class _Reader(dcp.FileSystemReader):
    """This reader checks the index, which torch's own would run."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        with open(Path(self.path) / _INDEX, "rb") as file:
            index = _Index(file).load()
        if not isinstance(index, Metadata):
            raise CheckpointError(f"{_INDEX} refused: it holds a {type(index).__name__}")
        for place in index.storage_data.values():
            if Path(place.relative_path).name != place.relative_path:
                raise CheckpointError(f"{_INDEX} refused: it names the file {place.relative_path!r:.80}")
        # All else that torch can store here is unpickled when it is read.
        if not all(isinstance(entry, TensorStorageMetadata) for entry in index.state_dict_metadata.values()):
            raise CheckpointError(f"{_INDEX} refused: it holds more than tensors")
        index.storage_meta = StorageMeta(load_id=self.load_id)
        return index


def read(folder: Path, like: Mapping[str, DTensor] | None = None) -> dict[str, Tensor]:
    """Read the pieces in `folder`, whose files have been checked; no rank waits for another.

    `like` says how tensors are to be divided, by the start of a path: only this rank's parts are read. Pieces of
    another shape, and all others, are read whole into the host's memory. Raises CheckpointError where the files are not
    what `write` leaves.
    """
    pieces = {}
    try:
        reader = _Reader(folder)
        for path, entry in reader.read_metadata().state_dict_metadata.items():
            pattern, dtype = _pattern(path, entry.size, like or {}), entry.properties.dtype
            if pattern is None:
                pieces[path] = torch.empty(entry.size, dtype=dtype)
            else:
                pieces[path] = torch.empty_like(pattern, dtype=dtype)
        with warnings.catch_warnings():  # it says that each process reads for itself
            warnings.simplefilter("ignore", UserWarning)
            dcp.load(pieces, storage_reader=reader, no_dist=True)
    except (CheckpointError, OSError):
        raise
    except (Exception, CheckpointException) as error:  # torch raises anything on what it did not write
        raise CheckpointError(f"{_INDEX} refused: {type(error).__name__}: {one_line(error)}") from None
    return pieces


def spread(state: dict[str, Any], like: Mapping[str, DTensor]) -> dict[str, Any]:
    """Divide the tensors of a whole state, equal on all ranks, that `like` names; `like` as for `read`."""

    def divided(path: str, value: Any) -> Any:
        pattern = _pattern(path, value.shape, like) if isinstance(value, Tensor) else None
        if pattern is None:
            return value
        # From the own copy, so that nobody sends.
        on_device = value.to(pattern.device)
        return distribute_tensor(on_device, pattern.device_mesh, pattern.placements, src_data_rank=None)

    return _mapped(state, divided)


def are_in(folder: Path) -> bool:
    """Return whether ranks that had divided the state wrote the checkpoint `folder`."""
    return (folder / _INDEX).exists()


def _pattern(path: str, shape: torch.Size, like: Mapping[str, DTensor]) -> DTensor | None:
    found = like.get(path, like.get(path.rpartition("/")[0]))
    return found if found is not None and found.shape == shape else None
