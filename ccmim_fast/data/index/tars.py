"""Members of a tar, as WebDataset writes them: where each image lies, told by the headers alone."""

import io
import os
import posixpath
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

_CLASS_SUFFIX = ".cls"  # WebDataset: the label, as text, beside the image of the same key
_MOST_CLASSES = 2**20  # each has a name in the index; ImageNet-21k has 21,841


class Member(NamedTuple):
    """name: any bytes survive. offset, size: of its data in the tar, bytes. key: of the sample, WebDataset's. reason:
    why it is no image; empty if it may be one. label: from a .cls member; -1 without one."""

    name: str
    offset: int
    size: int
    key: str
    reason: str = ""
    label: int = -1


def read_members(file: io.IOBase, suffixes: tuple[str, ...]) -> tuple[list[Member], str]:
    """The images of an uncompressed tar, in its order, and what is wrong with its end; empty if nothing is.

    Nothing is ever unpacked. Names that are absolute or lead out of the archive, links and devices are refused, and of
    several members of one name the first counts.

    Args:
        file: can seek.
        suffixes: lower-case endings of the names that count.
    """
    total = file.seek(0, os.SEEK_END)
    file.seek(0)
    found: dict[str, Member] = {}
    labels: dict[str, int] = {}
    members, problem = [], ""
    for info, error in _headers(file):
        if info is None:
            problem = error
            break
        key, suffix = split_key(info.name)
        if suffix == _CLASS_SUFFIX and info.isfile():
            labels[key] = _number(file, info)
        if info.isdir() or not info.name.lower().endswith(suffixes):
            continue
        reason = _refused(info, total) or ("a name that was there before" if info.name in found else "")
        member = Member(info.name, info.offset_data, info.size, key, reason)
        found.setdefault(info.name, member)
        members.append(member)
    return [member._replace(label=labels.get(member.key, -1)) for member in members], problem


def split_key(name: str) -> tuple[str, str]:
    """WebDataset's key of a member, up to the first dot of its file name, and the rest in lower case."""
    folder, base = posixpath.split(name)
    stem, dot, rest = base.partition(".")
    return posixpath.join(folder, stem), (dot + rest).lower()


def _headers(file: io.IOBase) -> Iterator[tuple[tarfile.TarInfo | None, str]]:
    """Each member's header; at last, where the end is damaged, None and the reason."""
    try:
        # Names that are not UTF-8 come back as os.fsdecode would give them.
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            for info in tar:
                if tar.offset <= info.offset:
                    raise ValueError("a member of negative size")  # tarfile would read it for ever
                yield info, ""
                tar.members.clear()  # else every header of a large tar is kept
            # A header that makes no sense is an end like any other to tarfile.
            file.seek(tar.offset)
            end = file.read(tarfile.BLOCKSIZE)
        if len(end) < tarfile.BLOCKSIZE or any(end):
            raise ValueError(f"no end mark at byte {tar.offset:,}" if not end else f"no header at byte {tar.offset:,}")
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        yield None, f"cut or damaged: {' '.join(str(error).split())}"


def _refused(info: tarfile.TarInfo, total: int) -> str:
    if not info.isfile():
        return "a link or device, not a file"
    if info.name.startswith("/") or ".." in info.name.split("/"):
        return "a name that leads out of the archive"
    if info.issparse():
        return "a sparse file"
    if info.offset_data + info.size > total:
        return "cut off by the end of the archive"
    return ""


def _number(file: io.IOBase, info: tarfile.TarInfo) -> int:
    """What a .cls member holds; -1 if it is no number of a class."""
    place = file.tell()
    file.seek(info.offset_data)
    text = file.read(min(info.size, 32))
    file.seek(place)
    return class_number(int(text)) if text.strip().isdigit() else -1


def class_number(value: int | None) -> int:
    """A label as it is indexed; -1 where it can be no class, as a user's number or a hash."""
    return value if value is not None and 0 <= value < _MOST_CLASSES else -1
