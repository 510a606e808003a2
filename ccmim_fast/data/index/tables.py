"""Tables with images in a column: parquet and Arrow files, as Hugging Face writes them."""

# R rows, G row groups

import io
import json
import threading
from bisect import bisect_right
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ccmim_fast.errors import DataError

SUFFIXES = (".parquet", ".arrow", ".feather")
_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes")  # first choices, in this order
_LABEL_NAMES = ("label", "labels", "cls", "class", "fine_label", "target")


class Table:
    """One file of rows.

    Attributes:
        rows: R.
        class_names: of its labels; empty where it names none.
    """

    def __init__(self, schema: pa.Schema, rows_of_groups: list[int]):
        self._rows_of_groups, self._ends = rows_of_groups, list(accumulate(rows_of_groups))
        self.rows = self._ends[-1] if self._ends else 0
        self._image, self._label = image_column(schema), label_column(schema)
        self.class_names = class_names(schema, self._label)

    def find(self, row: int) -> tuple[int, int]:
        """The row group of a row, and its number in it. Raises DataError where there is no such row."""
        if row >= self.rows:
            raise DataError(f"is beyond the {self.rows} rows of its table")
        group = bisect_right(self._ends, row)
        return group, row - (self._ends[group - 1] if group else 0)

    def images(self, group: int) -> pa.Array:
        """Encoded images of a row group: binary. Raises DataError where it is damaged."""
        column = self._read(group, self._image)
        # Not `field`, which does not know where the struct itself is null.
        return pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column

    def labels(self, group: int) -> list[int | None]:
        """Labels of a row group; None without any. Raises DataError where it is damaged."""
        if self._label is None:
            return [None] * self._rows_of_groups[group]
        return self._read(group, self._label).to_pylist()

    @property
    def groups(self) -> int:
        """G."""
        return len(self._ends)

    def _read(self, group: int, name: str) -> pa.Array:
        try:
            return self._column(group, name)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"row group {group} cannot be read: {' '.join(str(error).split())}") from error

    def _column(self, group: int, name: str) -> pa.Array:
        raise NotImplementedError


class ParquetTable(Table):
    """A parquet file; a row group is read whole."""

    def __init__(self, file: pa.NativeFile):
        self._file, self._lock = pq.ParquetFile(file), threading.Lock()  # its reader is for one thread
        counts = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        super().__init__(self._file.schema_arrow, counts)

    def _column(self, group: int, name: str) -> pa.Array:
        with self._lock:
            column = self._file.read_row_group(group, columns=[name]).column(name)
        return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


class ArrowTable(Table):
    """An Arrow file or stream (`datasets.save_to_disk`)."""

    def __init__(self, file: pa.NativeFile):
        try:
            self._table = pa.ipc.open_file(file).read_all()
        except pa.ArrowInvalid:
            file.seek(0)
            self._table = pa.ipc.open_stream(file).read_all()
        self._batches = self._table.to_batches()
        super().__init__(self._table.schema, [batch.num_rows for batch in self._batches])

    def _column(self, group: int, name: str) -> pa.Array:
        return self._batches[group].column(name)


def open_table(path: str, file: io.IOBase | None) -> Table:
    """A table of a kind told by its path's ending.

    Args:
        file: open, where the path is none of a disk.

    Raises:
        DataError: not a whole table, or no column of images in it.
        FileNotFoundError: it is gone.
    """
    try:
        if path.endswith(".parquet"):
            # Not a file of Python's, whose place in it copies of this process would share.
            return ParquetTable(pa.OSFile(path) if file is None else pa.PythonFile(file))
        # A file of a disk is mapped: nothing is read before it is asked for.
        return ArrowTable(pa.memory_map(path) if file is None else pa.PythonFile(file))
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError, AttributeError, DataError) as error:
        raise DataError(f"{path!r} is no table of images: {' '.join(str(error).split())}") from error


def image_column(schema: pa.Schema) -> str:
    """The column of encoded images: bytes, or Hugging Face's struct of bytes and path.

    Raises DataError where there is none.
    """
    found = [field.name for field in schema if _holds_bytes(field.type)]
    if not found:
        raise DataError(f"no column of bytes among {', '.join(schema.names)}")
    return next((name for name in _IMAGE_NAMES if name in found), found[0])


def label_column(schema: pa.Schema) -> str | None:
    """The column of integer labels, by its name."""
    return next((n for n in _LABEL_NAMES if n in schema.names and pa.types.is_integer(schema.field(n).type)), None)


def class_names(schema: pa.Schema, column: str | None) -> tuple[str, ...]:
    """The names that Hugging Face's metadata give the labels."""
    if column is None or b"huggingface" not in (schema.metadata or {}):
        return ()
    features: dict[str, Any] = json.loads(schema.metadata[b"huggingface"]).get("info", {}).get("features", {})
    return tuple(features.get(column, {}).get("names") or ())


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
