"""This module lists the images of a tar, as WebDataset writes it, from the headers alone."""

import io
import os
import posixpath
import tarfile
from collections.abc import Iterator

from ccmim_fast.data.index.index_file import Row
from ccmim_fast.errors import one_line

_CLASS_SUFFIX = ".cls"  # WebDataset: the label, as text, beside the image of the same key
_MOST_CLASSES = 2**20  # each has a name in the index; ImageNet-21k has 21,841


def list_tar(file: io.IOBase, suffixes: tuple[str, ...]) -> tuple[list[Row], str]:
    """Return the images of an uncompressed tar, in its order, and what is wrong with its end; empty if nothing is.

    Images are the members whose name ends in one of the lower-case `suffixes`; nothing is unpacked. Absolute names,
    names that lead out of the archive, links and devices give bad rows, and of several members of one name the first
    counts. Any bytes of a name survive.
    """
    total = file.seek(0, os.SEEK_END)
    file.seek(0)
    labels: dict[str, int] = {}
    found, names, problems = [], set(), []
    for info in _headers(file, problems):
        # WebDataset's key of a sample is the name up to the first dot behind the folders.
        folder, base = posixpath.split(info.name)
        stem, dot, suffix = base.partition(".")
        key = posixpath.join(folder, stem)
        if (dot + suffix).lower() == _CLASS_SUFFIX and info.isfile():
            file.seek(info.offset_data)  # tarfile finds its own place again
            text = file.read(min(info.size, 32)).strip()
            labels[key] = label_of(int(text) if text.isdigit() else None)
        if info.isdir() or not info.name.lower().endswith(suffixes):
            continue
        reason = _refusal(info, total) or ("a name that was there before" if info.name in names else "")
        names.add(info.name)
        row = Row(os.fsencode(info.name), offset=info.offset_data, bytes=info.size)
        found.append((key, row.bad(reason)))
    return [row._replace(label=labels.get(key, -1)) for key, row in found], "".join(problems)


def label_of(value: int | None) -> int:
    """Return a label as it is indexed; -1 for a number that can be no class, such as a user's number or a hash."""
    return value if value is not None and 0 <= value < _MOST_CLASSES else -1


def _headers(file: io.IOBase, problems: list[str]) -> Iterator[tarfile.TarInfo]:
    """Yield each member's header; at last, if the end is damaged, add the reason to `problems`."""
    try:
        # Names that are not UTF-8 come back as os.fsdecode would give them.
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            for info in tar:
                if tar.offset <= info.offset:
                    raise ValueError("a member of negative size")  # tarfile would read it for ever
                yield info
                tar.members.clear()  # otherwise tarfile keeps every header of a large tar
            # To tarfile a header that makes no sense is an end like any other.
            file.seek(tar.offset)
            end = file.read(tarfile.BLOCKSIZE)
        if len(end) < tarfile.BLOCKSIZE or any(end):
            raise ValueError(f"no end mark at byte {tar.offset:,}" if not end else f"no header at byte {tar.offset:,}")
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        problems.append(f"cut or damaged: {one_line(error, None)}")


def _refusal(info: tarfile.TarInfo, total: int) -> str:
    """Return why a member is no image; empty if it may be one."""
    if not info.isfile():
        return "a link or device, not a file"
    if info.name.startswith("/") or ".." in info.name.split("/"):
        return "a name that leads out of the archive"
    if info.issparse():
        return "a sparse file"
    if info.offset_data + info.size > total:
        return "cut off by the end of the archive"
    return ""
