"""This module lists what a text file names: images, each with its class, or tars and tables."""

import codecs
import os

from ccmim_fast.data.index.endings import CONTAINERS, LISTS
from ccmim_fast.data.index.folders import row_of_file
from ccmim_fast.data.index.index_file import Listing, Row
from ccmim_fast.data.index.own import open_regular
from ccmim_fast.data.index.storage import is_remote
from ccmim_fast.errors import DataError

_WIDE = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # how Windows begins a text in UTF-16


def read_list(path: str) -> Listing:
    """List the files named in a text file, one a line, relative to its folder; a tab and a class may follow.

    Where every line is a tar, a table or a pattern of some, without a class, these are the `containers`, as absolute
    paths. Names are bytes; a file in UTF-16, or with a mark of UTF-8 before it, is read as such. Raises DataError if
    the file cannot be read.
    """
    try:
        with open(path, "rb", opener=open_regular) as file:
            mtime_ns, data = os.fstat(file.fileno()).st_mtime_ns, file.read()
    except OSError as error:
        raise DataError(f"cannot read the list {path!r}: {error.strerror}") from error
    if data[:2] in _WIDE:
        try:
            data = data.decode("utf-16").encode()
        except UnicodeError:
            raise DataError(f"cannot read the list {path!r}: begins as UTF-16, and is not; write it as UTF-8") from None
    if b"\0" in data:
        raise DataError(f"cannot read the list {path!r}: holds zero bytes, as UTF-16 does; write it as UTF-8")
    lines = [os.fsdecode(line) for line in data.removeprefix(codecs.BOM_UTF8).split(b"\n") if line.strip()]
    pairs = [line.rstrip("\r").partition("\t")[::2] for line in lines]
    folder = os.path.dirname(os.path.abspath(path))
    if pairs and all(_is_container(name) and not group for name, group in pairs):
        containers = [os.path.join(folder, name) for name, _ in pairs]
        return Listing(folder, [], (), {path: mtime_ns}, [], containers, all_parts=True)
    label_of = {name: label for label, name in enumerate(sorted({name for _, name in pairs if name}))}
    rows = [_row(name, folder, label_of.get(group, -1)) for name, group in pairs]
    return Listing(folder, rows, tuple(label_of), {path: mtime_ns}, [])


def _is_container(name: str) -> bool:
    return name.lower().endswith(CONTAINERS) and not is_remote(name)


def _row(name: str, folder: str, label: int) -> Row:
    row = row_of_file(os.path.join(folder, name), folder, label)
    if name.lower().endswith(LISTS):
        return row.bad("a list in a list; name images, or the list itself in data.root")
    if name.lower().endswith(CONTAINERS):
        return row.bad(
            "a tar or table among images, with a class, or behind a URL; name tars and tables in a list of their own"
        )
    return row
