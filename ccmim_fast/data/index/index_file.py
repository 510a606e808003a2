"""The index of a set of images: one Arrow file, mapped into memory, that knows every sample.

A row is a sample and its number the sample's id. Files that are no usable image have a row too, with the reason: what
a run sees and what it leaves out add up to what is indexed. The file never changes; what fails to decode later is put
down beside it (`marks`), and both are made one by `ccmim data index` or `verify`.
"""

# N samples, X excluded samples

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ccmim_fast.errors import DataError

BESIDE = "ccmim-index.arrow"  # its name in a folder of tars, as `ccmim data shard` puts it there
FORMAT = 1  # of the file: raise it when columns change, and indexes are built anew
# What a row's `status` says: only its header was read, all of it was decoded, or it cannot be used.
INDEXED, VERIFIED, BAD = range(3)

SCHEMA = pa.schema(
    {
        "location": pa.large_binary(),  # path from the root; of a tar's member its name; of a table's row nothing
        "container": pa.int32(),  # which of `containers` it lies in; -1: a file of its own
        "offset": pa.int64(),  # first byte in the container; of a table's row its number
        "bytes": pa.int64(),  # length; -1: not known without reading
        "mtime_ns": pa.int64(),  # last change of the file or container, nanoseconds; 0: not known
        "size": pa.list_(pa.int32(), 2),  # height and width in pixels after EXIF rotation; 0: unknown
        "orientation": pa.uint8(),  # EXIF, 1 .. 8
        "mode": pa.dictionary(pa.uint8(), pa.string()),  # Pillow's name of the pixels' mode
        "plain": pa.uint8(),  # 1: every decoder reads it as Pillow does
        "label": pa.int32(),  # index into `class_names`; -1: none
        "status": pa.uint8(),
        "reason": pa.large_string(),  # of BAD
    }
)
# What decides which samples come, in which order and from where.
_IDENTITY = ("location", "container", "offset", "bytes", "label")


class Row(NamedTuple):
    """One sample, by the columns of `SCHEMA`."""

    location: bytes
    container: int = -1
    offset: int = 0
    bytes: int = -1
    mtime_ns: int = 0
    size: tuple[int, int] = (0, 0)
    orientation: int = 1
    mode: str | None = None
    plain: int = 0
    label: int = -1
    status: int = INDEXED
    reason: str | None = None


class Index:
    """An index file, open.

    Args:
        path: the file.

    Attributes:
        root: folder or URL that locations are relative to; written as "", it is the folder the index is in.
        origin: what was indexed, as it was asked for.
        channels: C.
        containers: paths from `root` of tars or tables.
        relocatable: the root is wherever the index is.
        class_names: sorted; empty without labels.
        watched: path -> mtime_ns of what changes when samples come or go: folders, containers, a list.
        notes: (path, reason) of what was met and is no sample, as an unreadable folder.
        sizes_N2, labels_N, plain_N, status_N, offsets_N, bytes_N, containers_N, mtimes_N: the columns, in memory only
            as far as they are read.
        table: all columns.
        excluded_X: ids of the samples whose status is BAD.

    Raises:
        DataError: no such file, or not an index of this version.
    """

    def __init__(self, path: str):
        self.path = path
        try:
            self._file = pa.memory_map(path)
            self._reader = pa.ipc.open_file(self._file)
            said = json.loads(self._reader.schema.metadata[b"ccmim"])
            if said["format"] != FORMAT:
                raise DataError(
                    f"index {path!r} is of format {said['format']}, not {FORMAT}; ccmim data index makes it anew"
                )
            self._take(said, self._reader.get_batch(0))
        # Arrow has a type for every kind of damage, and some of Python's own come from bytes that it lets pass.
        except (OSError, pa.ArrowException, TypeError, LookupError, ValueError, AttributeError) as error:
            raise DataError(f"{path!r} is not a whole index: {' '.join(str(error).split())}") from error

    def _take(self, said: dict[str, Any], table: pa.RecordBatch) -> None:
        table.validate()
        self.said, self.table = said, table
        self.root, self.origin, self.channels = (
            os.fsdecode(bytes.fromhex(said["root"])),
            said["origin"],
            said["channels"],
        )
        self.relocatable = not self.root
        self.root = self.root or os.path.dirname(os.path.abspath(self.path))
        self.containers: list[str] = said["containers"]
        self.class_names: tuple[str, ...] = tuple(said["class_names"])
        self.watched: dict[str, int] = said["watched"]
        self.notes: list[tuple[str, str]] = [tuple(note) for note in said["notes"]]
        self.fingerprint: str = said["fingerprint"]
        self.offsets_N, self.bytes_N, self.containers_N, self.mtimes_N, self.status_N, self.plain_N = (
            self._numpy(name) for name in ("offset", "bytes", "container", "mtime_ns", "status", "plain")
        )
        self.sizes_N2 = self.table.column("size").values.to_numpy().reshape(-1, 2)[: len(self)]
        self.labels_N = self._numpy("label") if self.class_names else None
        self.excluded_X = np.flatnonzero(self.status_N == BAD)

    def __len__(self) -> int:
        return self.table.num_rows

    def location(self, index: int) -> str:
        """Path from the root, or a member's name; any bytes survive."""
        return os.fsdecode(self.table.column("location")[index].as_py())

    def reason(self, index: int) -> str:
        """Why the sample cannot be used; empty if it can."""
        return self.table.column("reason")[index].as_py() or ""

    def row(self, index: int) -> Row:
        """Everything about one sample."""
        return Row(*(self.table.column(name)[index].as_py() for name in SCHEMA.names))

    def rows(self) -> Iterator[Row]:
        """Of all samples, in order."""
        for start in range(0, len(self), 4096):
            part = self.table.slice(start, 4096).to_pydict()
            yield from map(Row, *(part[name] for name in SCHEMA.names))

    def modes(self) -> dict[str, int]:
        """How many samples there are of each mode."""
        names, counts = np.unique(
            self.table.column("mode").to_numpy(zero_copy_only=False).astype(str), return_counts=True
        )
        return dict(zip(names.tolist(), counts.tolist(), strict=True))

    def _numpy(self, name: str) -> np.ndarray:
        return self.table.column(name).to_numpy()


def write_index(
    path: str,
    rows: Iterable[Row],
    *,
    root: str,
    origin: str,
    channels: int,
    containers: list[str] = (),
    class_names: Iterable[str] = (),
    watched: dict[str, int] | None = None,
    notes: Iterable[tuple[str, str]] = (),
) -> Index:
    """Write an index and open it; the file is there whole or not at all. Arguments as the attributes of `Index`."""
    table = pa.Table.from_batches(list(_batches(rows)), schema=SCHEMA)
    return write_table(
        path,
        table,
        {
            "root": os.fsencode(root).hex(),
            "origin": origin,
            "channels": channels,
            "containers": list(containers),
            "class_names": list(class_names),
            "watched": watched or {},
            "notes": list(notes),
        },
    )


def rewrite_index(index: Index, columns: dict[str, pa.Array]) -> Index:
    """The same index with some columns replaced."""
    table = pa.Table.from_batches([index.table])
    for name, column in columns.items():
        table = table.set_column(SCHEMA.get_field_index(name), SCHEMA.field(name), column)
    return write_table(index.path, table, index.said)


def write_table(path: str, table: pa.Table, said: dict[str, Any]) -> Index:
    """`write_index` of columns that exist already; `said` is all but format and fingerprint."""
    # One batch, whatever the size: a column is then one array, and a sample a number in it.
    whole = table.unify_dictionaries().combine_chunks()
    (rows,) = whole.to_batches() or [pa.RecordBatch.from_pylist([], SCHEMA)]
    said = {**said, "format": FORMAT, "fingerprint": _fingerprint(rows)}
    schema = SCHEMA.with_metadata({"ccmim": json.dumps(said)})
    folder = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as scratch:
            unfinished = os.path.join(scratch, "index.arrow")
            with pa.OSFile(unfinished, "wb") as file, pa.ipc.new_file(file, schema) as writer:
                writer.write_batch(rows.cast(schema))
            os.replace(unfinished, path)
    except OSError as error:
        raise DataError(
            f"cannot write the index {path!r}: {error.strerror or error}; set data.index to another place"
        ) from error
    return Index(path)


def _batches(rows: Iterable[Row]) -> Iterator[pa.RecordBatch]:
    """Columns of 65,536 rows at a time: a million rows as Python objects would take a gigabyte."""
    columns: list[list] = [[] for _ in SCHEMA]
    for row in rows:
        for column, value in zip(columns, row, strict=True):
            column.append(value)
        if len(columns[0]) == 2**16:
            yield _batch(columns)
            columns = [[] for _ in SCHEMA]
    yield _batch(columns)


def _batch(columns: list[list]) -> pa.RecordBatch:
    arrays = []
    for column, field in zip(columns, SCHEMA, strict=True):
        if pa.types.is_dictionary(field.type):
            arrays.append(pa.array(column, pa.string()).dictionary_encode().cast(field.type))
        else:
            arrays.append(pa.array(column, field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def _fingerprint(rows: pa.RecordBatch) -> str:
    """Equal for two indexes if the same samples come from the same places in the same order."""
    digest = hashlib.sha256()
    for name in _IDENTITY:
        for buffer in rows.column(name).buffers():
            digest.update(buffer or b"")
    digest.update((rows.column("status").to_numpy() == BAD).tobytes())
    return digest.hexdigest()[:16]
