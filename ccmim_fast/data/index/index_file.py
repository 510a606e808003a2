"""The index of a set of images is one Arrow file, mapped into memory, with a row for every sample.

The row's number is the sample's id. Files that are no usable image have a row too, with the reason: the samples that a
run uses and those that it excludes add up to what is indexed. The file never changes in place. Samples that fail later
are recorded beside it (`bad_samples`), and `ccmim data index` or `verify` moves these records into the index.
"""

# N samples, X excluded samples

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ccmim_fast.data.index.decode import Header
from ccmim_fast.data.index.left_out import LOST, Note, lost
from ccmim_fast.data.index.own import marked
from ccmim_fast.errors import DataError, one_line

FORMAT = 2  # of the file: raise it when columns or rules change; indexes are then built anew, but for those of shards
_OF_SHARDS = (1, FORMAT)
# Values of a row's `status`: only the header was read, all of it was decoded, it cannot be used, it could not be read
# (from UNUSABLE on it is no sample of a run). The next run looks again at what could not be read.
INDEXED, VERIFIED, BAD, UNSEEN = range(4)
UNUSABLE = BAD

SCHEMA = pa.schema(
    {
        "location": pa.large_binary(),  # path from the root; of a tar's member its name; of a table's row its number
        "container": pa.int32(),  # index into `containers`; -1: a file of its own
        "offset": pa.int64(),  # first byte in the container; of a table's row its number
        "bytes": pa.int64(),  # length; -1: not known without reading
        "mtime_ns": pa.int64(),  # last change of the file or container, nanoseconds; 0: not known
        "size": pa.list_(pa.int32(), 2),  # height and width in pixels after EXIF rotation; 0: unknown
        "orientation": pa.uint8(),  # EXIF, 1 .. 8
        "mode": pa.dictionary(pa.uint8(), pa.string()),  # Pillow's name of the pixels' mode
        "plain": pa.uint8(),  # 1: every decoder reads it as Pillow does
        "label": pa.int32(),  # index into `class_names`; -1: none
        "status": pa.uint8(),
        "reason": pa.large_string(),  # of BAD and UNSEEN
    }
)
# The columns that decide which samples come, in which order and from where; the fingerprint is of them.
_IDENTITY = ("location", "container", "offset", "bytes", "label")
_ROWS_AT_ONCE = 2**16  # a million rows as Python objects would take a gigabyte


class Row(NamedTuple):
    """A row describes one sample by the columns of `SCHEMA`."""

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

    def bad(self, reason: str | None, status: int = BAD) -> "Row":
        """Return the row marked as unusable; without a reason, the row itself."""
        return self._replace(status=status, reason=reason) if reason else self

    def with_header(self, header: Header, size: int) -> "Row":
        """Return the row with what the image's header says and its length in bytes."""
        return self._replace(bytes=size, status=INDEXED, reason=None, **header._asdict())


class Listing(NamedTuple):
    """A listing names the samples of a set."""

    root: str  # folder or URL that locations and `containers` are relative to; "": the folder of the index
    rows: Iterable[Row]  # in the order of the ids
    class_names: tuple[str, ...]  # empty without classes
    dependencies: dict[str, int]  # path -> mtime_ns of the folders and files that change when samples come or go
    notes: Sequence[Note]  # what gives no sample, such as an unreadable folder
    containers: Sequence[str] = ()  # tars or tables
    labelled: bool = False  # the containers say the labels themselves; else they are the names' first folders
    all_parts: bool = False  # the containers were named one by one: what is held out of a training part is used too


class Index:
    """This class opens an index file. Raises DataError if the file is missing, damaged, or of another version.

    Its attributes are the columns, mapped into memory (`table`; `sizes_N2` and others as arrays), the metadata, and
    `excluded_X`: the ids of the samples that cannot be used; `lost` counts what gives no sample although it may have
    been meant as some. If the root is stored as "", it is the folder of the index, wherever that is moved
    (`relocatable`). Two indexes with the same samples, from the same places in the same order, have the same
    `fingerprint`.
    """

    def __init__(self, path: str):
        self.path = path
        try:
            if os.path.exists(path) and not os.path.isfile(path):
                raise OSError("not a regular file")
            self._file = pa.memory_map(path)
            self._reader = pa.ipc.open_file(self._file)
            self.metadata = metadata = json.loads(self._reader.schema.metadata[b"ccmim"])
            number = metadata["format"]
            if number not in (_OF_SHARDS if metadata.get("root") == "" else (FORMAT,)):
                raise DataError(f"index {path!r} is of format {number}, not {FORMAT}; ccmim data index makes it anew")
            self.table = table = self._reader.get_batch(0)
            table.validate()
            root = os.fsdecode(bytes.fromhex(metadata["root"]))
            self.root, self.relocatable = root or os.path.dirname(os.path.abspath(path)), not root
            self.origin, self.channels = metadata["origin"], metadata["channels"]
            self.fingerprint: str = metadata["fingerprint"]
            self.containers: list[str] = metadata["containers"]  # tars or tables, paths from the root
            self.class_names: tuple[str, ...] = tuple(metadata["class_names"])
            self.dependencies: dict[str, int] = metadata["watched"]
            self.notes = [_note(note) for note in metadata["notes"]]
            self.lost = lost(self.notes)
            self.image_key, self.labelled = metadata.get("image_key", ""), metadata.get("labelled", False)
            self.offsets_N, self.bytes_N, self.containers_N, self.status_N, self.plain_N, labels_N = (
                table.column(name).to_numpy() for name in ("offset", "bytes", "container", "status", "plain", "label")
            )
            self.labels_N = labels_N if self.class_names else None
            self.sizes_N2 = table.column("size").values.to_numpy().reshape(-1, 2)[: len(self)]
            self.excluded_X = np.flatnonzero(self.status_N >= UNUSABLE)
        # Arrow has a type for every kind of damage, and bytes that it lets pass cause some of Python's own.
        except (OSError, pa.ArrowException, TypeError, LookupError, ValueError, AttributeError) as error:
            raise DataError(f"{path!r} is not a whole index: {one_line(error, None)}") from error

    def __len__(self) -> int:
        return self.table.num_rows

    def location(self, index: int) -> str:
        """Return the path from the root, or a member's name; any bytes of a name survive."""
        return os.fsdecode(self.table.column("location")[index].as_py())

    def reason(self, index: int) -> str:
        """Return why the sample cannot be used; empty if it can."""
        return self.table.column("reason")[index].as_py() or ""

    def row(self, index: int) -> Row:
        """Return all columns of one sample."""
        return Row(*(self.table.column(name)[index].as_py() for name in SCHEMA.names))

    def rows(self) -> Iterator[Row]:
        """Yield the rows of all samples, in order."""
        for start in range(0, len(self), 4096):
            part = self.table.slice(start, 4096).to_pydict()
            yield from map(Row, *(part[name] for name in SCHEMA.names))

    def modes(self, of_N: np.ndarray | None = None) -> Counter[str]:
        """Count the samples of each mode, in the order of their names; with `of_N` [N] bool, of those alone."""
        column = self.table.column("mode")
        counts = (column if of_N is None else column.filter(pa.array(of_N))).value_counts().to_pylist()
        return Counter(dict(sorted((str(count["values"]), count["counts"]) for count in counts)))


def table_of(rows: Iterable[Row]) -> pa.Table:
    """Return rows as a table of `SCHEMA`, made some at a time."""
    left, batches = iter(rows), []
    while part := list(islice(left, _ROWS_AT_ONCE)):
        arrays = [pa.array(column, field.type) for column, field in zip(zip(*part), SCHEMA)]
        batches.append(pa.RecordBatch.from_arrays(arrays, schema=SCHEMA))
    return pa.Table.from_batches(batches, SCHEMA)


def write_index(path: str, listing: Listing, origin: str, channels: int, image_key: str = "") -> Index:
    """Write the index of what the user named `origin`, whole or not at all, and open it."""
    return write_table(path, table_of(listing.rows), metadata_of(listing, origin, channels, image_key))


def metadata_of(listing: Listing, origin: str, channels: int, image_key: str = "") -> dict[str, Any]:
    """Return what an index says besides its columns."""
    return {
        "root": os.fsencode(listing.root).hex(),
        "origin": origin,
        "channels": channels,
        "image_key": image_key,
        "containers": list(listing.containers),
        "class_names": list(listing.class_names),
        "labelled": listing.labelled,
        "watched": listing.dependencies,
        "notes": list(listing.notes),
    }


def rewrite_index(index: Index, columns: dict[str, pa.Array]) -> Index:
    """Write the same index with some columns replaced."""
    table = pa.Table.from_batches([index.table])
    for name, column in columns.items():
        table = table.set_column(SCHEMA.get_field_index(name), SCHEMA.field(name), column)
    return write_table(index.path, table, index.metadata)


def write_table(path: str, table: pa.Table, metadata: dict[str, Any]) -> Index:
    """Write an index of columns that exist already; format and fingerprint are added to `metadata`."""
    # One batch, whatever the size: each column is then one array, indexed by the sample's id.
    whole = table.unify_dictionaries().combine_chunks()
    (rows,) = whole.to_batches() or [pa.RecordBatch.from_pylist([], SCHEMA)]
    digest = hashlib.sha256()
    for name in _IDENTITY:
        for buffer in rows.column(name).buffers():
            digest.update(buffer or b"")
    digest.update((rows.column("status").to_numpy() >= UNUSABLE).tobytes())
    metadata = {**metadata, "format": FORMAT, "fingerprint": digest.hexdigest()[:16]}
    schema = marked(SCHEMA, metadata)
    place = os.path.realpath(path)  # behind a link, which stays
    folder = os.path.dirname(place)
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as scratch:
            unfinished = os.path.join(scratch, "index.arrow")
            with pa.OSFile(unfinished, "wb") as file, pa.ipc.new_file(file, schema) as writer:
                writer.write_batch(rows.cast(schema))
            os.replace(unfinished, place)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"cannot write the index {path!r}: {reason}; set data.index to another place") from error
    return Index(path)


def _note(stored: list) -> Note:
    """Return a note as it is stored; of the first format, (path, reason)."""
    return (
        Note(*stored[:3], tuple(stored[3]), *stored[4:]) if len(stored) > 2 else Note(stored[1], LOST, 1, (stored[0],))
    )
