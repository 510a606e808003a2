"""This module reads tables with images in a column: parquet and Arrow files, as Hugging Face writes them."""

import io
import json
import threading
from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ccmim_fast.errors import DataError, one_line

SUFFIXES = (".parquet", ".arrow", ".feather")
_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes")  # first choices, in this order
_LABEL_NAMES = ("label", "labels", "cls", "class", "fine_label", "target")


class Table:
    """A table has images in row groups of `sizes` rows; `class_names` is empty if the table names no labels.

    `read` takes a row group and a column's name. Raises DataError if the schema has no column of images.
    """

    def __init__(self, schema: pa.Schema, sizes: list[int], read: Callable[[int, str], pa.Array]):
        self._starts, self._read = [0, *accumulate(sizes)], read
        images = [field.name for field in schema if _holds_bytes(field.type)]
        if not images:
            raise DataError(f"no column of bytes among {', '.join(schema.names)}")
        self._image = next((name for name in _IMAGE_NAMES if name in images), images[0])
        integers = [field.name for field in schema if pa.types.is_integer(field.type)]
        self._label = next((name for name in _LABEL_NAMES if name in integers), None)
        self.class_names: tuple[str, ...] = ()
        if self._label is not None and b"huggingface" in (schema.metadata or {}):
            features = json.loads(schema.metadata[b"huggingface"]).get("info", {}).get("features", {})
            self.class_names = tuple(features.get(self._label, {}).get("names") or ())

    def find(self, row: int) -> tuple[int, int]:
        """Return the row group of a row and the row's number in it. Raises DataError if there is no such row."""
        if row >= self._starts[-1]:
            raise DataError(f"is beyond the {self._starts[-1]} rows of its table")
        group = bisect_right(self._starts, row) - 1
        return group, row - self._starts[group]

    def images(self, group: int) -> pa.Array:
        """Return the encoded images of a row group: binary. Raises DataError if the group is damaged."""
        column = self._column(group, self._image)
        # `column.field` would not see where the struct itself is null.
        return pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column

    def labels(self) -> list[int | None]:
        """Return the labels of all rows, None without any. Raises DataError if a row group is damaged."""
        if self._label is None:
            return [None] * self._starts[-1]
        groups = range(len(self._starts) - 1)
        return [label for group in groups for label in self._column(group, self._label).to_pylist()]

    def _column(self, group: int, name: str) -> pa.Array:
        try:
            return self._read(group, name)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"row group {group} cannot be read: {one_line(error, None)}") from error


def open_table(path: str, file: io.IOBase | None) -> Table:
    """Open a table, of the kind that the path's suffix tells; `file` is open already if the path is a URL.

    Raises DataError if the table is damaged or has no column of images, FileNotFoundError if the file is gone.
    """
    try:
        if path.endswith(".parquet"):
            # A file opened by Python would share its position with forked copies of this process.
            return _parquet_table(pa.OSFile(path) if file is None else pa.PythonFile(file))
        # A mapped file is read only as far as it is used.
        return _arrow_table(pa.memory_map(path) if file is None else pa.PythonFile(file))
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError, AttributeError, DataError) as error:
        raise DataError(f"{path!r} is no table of images: {one_line(error, None)}") from error


def _parquet_table(file: pa.NativeFile) -> Table:
    parquet, lock = pq.ParquetFile(file), threading.Lock()  # the reader serves one thread at a time

    def read(group: int, name: str) -> pa.Array:
        with lock:
            column = parquet.read_row_group(group, columns=[name]).column(name)
        return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)

    sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    return Table(parquet.schema_arrow, sizes, read)


def _arrow_table(file: pa.NativeFile) -> Table:
    """Open an Arrow file or stream (`datasets.save_to_disk`); its batches are the row groups."""
    try:
        table = pa.ipc.open_file(file).read_all()
    except pa.ArrowInvalid:
        file.seek(0)
        table = pa.ipc.open_stream(file).read_all()
    batches = table.to_batches()
    return Table(table.schema, [len(batch) for batch in batches], lambda group, name: batches[group].column(name))


def _holds_bytes(kind: pa.DataType) -> bool:
    """Tell whether a column's type is bytes, or Hugging Face's struct of bytes and path."""
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
