"""This module reads tables with images in a column: parquet and Arrow files, as Hugging Face writes them."""

import errno
import io
import json
import threading
from bisect import bisect_right
from collections.abc import Callable, Hashable
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ccmim_fast.errors import DataError, one_line, printable

_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes")  # first choices, in this order
_LABEL_NAMES = ("label", "labels", "cls", "class", "fine_label", "target")
_READ_AT_ONCE = 2**28  # bytes of a column; Arrow's arrays of bytes hold 2**31
_Read = Callable[[int, int], pa.ChunkedArray]  # row group and number of a column -> the column's part


class Table:
    """A table has images in row groups of `sizes` rows; `class_names` is empty if the table names no labels.

    `read` takes a row group and a column's number. Raises DataError if the schema has no column of images.
    """

    def __init__(self, schema: pa.Schema, sizes: list[int], read: _Read):
        self._starts, self._read = [0, *accumulate(sizes)], read
        fields = [*enumerate(schema)]
        images = [(number, field.name) for number, field in fields if _holds_bytes(field.type)]
        images.sort(key=lambda one: not _is_bytes(schema.field(one[0]).type))  # a list of numbers only if nothing else
        if not images:
            columns = ", ".join(f"{printable(field.name)} ({field.type})" for _, field in fields)
            raise DataError(f"no column of images as bytes among {columns or 'none'}")
        self._image = _first(images, _IMAGE_NAMES, images[0][0])
        integers = [(number, field.name) for number, field in fields if pa.types.is_integer(field.type)]
        self._label = _first(integers, _LABEL_NAMES, None)
        label = None if self._label is None else schema.field(self._label).name
        self.class_names = () if label is None else _class_names(schema.metadata or {}, label)

    def find(self, row: int) -> tuple[int, int]:
        """Return the row group of a row and the row's number in it. Raises DataError if there is no such row."""
        if row >= self._starts[-1]:
            raise DataError(f"is beyond the {self._starts[-1]} rows of its table")
        group = bisect_right(self._starts, row) - 1
        return group, row - self._starts[group]

    def images(self, group: int) -> pa.ChunkedArray:
        """Return the column of images of a row group.

        Raises DataError if the group is damaged, OSError if it cannot be read now, for a server or for little memory.
        """
        return self._column(group, self._image)

    def labels(self) -> list[int | None]:
        """Return the labels of all rows, None without any. Raises DataError if a row group is damaged."""
        if self._label is None:
            return [None] * self._starts[-1]
        groups = range(len(self._starts) - 1)
        return [label for group in groups for label in self._column(group, self._label).to_pylist()]

    def _column(self, group: int, number: int) -> pa.ChunkedArray:
        try:
            return self._read(group, number)
        except MemoryError as error:
            raise OSError(errno.ENOMEM, f"too little memory for row group {group}") from error
        except (pa.ArrowException, OSError) as error:
            # Arrow's own errors of damaged data are OSErrors too, without a number; those of a server are no Arrow's.
            if isinstance(error, OSError) and (error.errno is not None or type(error) is not OSError):
                raise
            raise DataError(f"row group {group} cannot be read: {one_line(error, None)}") from error


def bytes_of(scalar: pa.Scalar) -> bytes:
    """Return the encoded image in a row: bytes, a struct with bytes, numbers of a byte each, or the first of a list.

    Raises DataError with the reason if there is none.
    """
    value = scalar.as_py()
    for _ in range(4):  # a list of structs of a list of numbers is as deep as it comes
        if isinstance(value, dict):
            if value.get("bytes") is None and value.get("path"):
                raise DataError(f"a row without bytes, only with a path: {value['path']!r:.100}")
            value = value.get("bytes")
        elif isinstance(value, list) and value and isinstance(value[0], int):
            if None in value:
                raise DataError("a row with a gap among the numbers of its image")
            value = bytes(value)
        elif isinstance(value, list):
            value = value[0] if value else None
    if value is None:
        raise DataError("a row without an image")
    return value


def open_table(path: str, file: io.IOBase | None) -> Table:
    """Open a table, of the kind that the path's suffix tells; `file` is open already if the path is a URL.

    Raises DataError if the table is damaged or has no column of images, OSError if it cannot be read now.
    """
    try:
        if path.lower().endswith(".parquet"):
            # A file opened by Python would share its position with forked copies of this process.
            return _parquet_table(pa.OSFile(path) if file is None else pa.PythonFile(file))
        # A mapped file is read only as far as it is used.
        return _arrow_table(pa.memory_map(path) if file is None else pa.PythonFile(file))
    except (pa.ArrowException, OSError, ValueError, AttributeError, DataError) as error:
        if isinstance(error, OSError) and (error.errno is not None or type(error) is not OSError):
            raise
        raise DataError(f"{path!r} is no table of images: {one_line(error, None)}") from error


def _parquet_table(file: pa.NativeFile) -> Table:
    parquet, lock = pq.ParquetFile(file), threading.Lock()  # the reader serves one thread at a time
    schema, paths = parquet.schema_arrow, [parquet.schema.column(n).path for n in range(len(parquet.schema))]

    def read(group: int, number: int) -> pa.ChunkedArray:
        name = schema.field(number).name
        before = sum(schema.field(n).name == name for n in range(number))  # of columns with one name
        inside = [path for path in paths if path == name or path.startswith(f"{name}.")]
        column_bytes = sum(
            chunk.total_uncompressed_size
            for chunk in map(parquet.metadata.row_group(group).column, range(len(paths)))
            if chunk.path_in_schema in inside
        )
        rows = max(1, sizes[group] * _READ_AT_ONCE // max(1, column_bytes))
        with lock:  # parts, because a struct of more than 2 GiB cannot be read at once
            parts = list(parquet.iter_batches(rows, [group], inside, use_threads=False))
        if not parts:
            return pa.chunked_array([], schema.field(number).type)
        part = pa.Table.from_batches(parts, parts[0].schema)
        return [column for field, column in zip(part.schema, part.columns) if field.name == name][before]

    sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    return Table(schema, sizes, read)


def _arrow_table(file: pa.NativeFile) -> Table:
    """Open an Arrow file or stream (`datasets.save_to_disk`); its batches are the row groups."""
    if file.read(4) == b"FEA1":
        raise DataError("Feather V1, which is no Arrow file; write it anew, as Feather V2 or Parquet")
    file.seek(0)
    try:
        table = pa.ipc.open_file(file).read_all()
    except pa.ArrowInvalid:
        file.seek(0)
        table = pa.ipc.open_stream(file).read_all()
    batches = table.to_batches()
    return Table(
        table.schema,
        [len(batch) for batch in batches],
        lambda group, number: pa.chunked_array([batches[group].column(number)]),
    )


def _first(columns: list[tuple[int, str]], names: tuple[str, ...], default: int | None) -> int | None:
    """Return the number of the first column, in the order of `names`."""
    return next((number for wanted in names for number, name in columns if name == wanted), default)


def _class_names(metadata: dict[bytes, bytes], label: str) -> tuple[str, ...]:
    """Return the names that Hugging Face's metadata give to the labels; () if they are no list of different names."""
    try:
        value: Any = json.loads(metadata.get(b"huggingface", b"{}"))
        for key in ("info", "features", label, "names"):
            value = value[key]
    except (ValueError, LookupError, TypeError, RecursionError):
        return ()
    different = isinstance(value, list) and all(isinstance(name, Hashable) for name in value)
    return tuple(map(str, value)) if different and len({*map(str, value)}) == len(value) else ()


def _holds_bytes(kind: pa.DataType) -> bool:
    """Tell whether a column's type is bytes in one of Arrow's forms, or holds them as Hugging Face's struct does."""
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return _holds_bytes(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return _holds_bytes(kind.storage_type)
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.types.is_uint8(kind.value_type) or _holds_bytes(kind.value_type)
    return _is_bytes(kind) or pa.types.is_fixed_size_binary(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
