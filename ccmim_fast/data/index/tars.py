"""This module lists the images of a tar, as WebDataset writes it, from the headers alone."""

import io
import os
import posixpath
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from ccmim_fast.data.index.endings import SNIFFED, begins_like_an_image
from ccmim_fast.data.index.index_file import Row
from ccmim_fast.data.index.left_out import LOST, UNREAD, Notes
from ccmim_fast.data.index.selection import by_ending, key_of, samples, training_part, visible
from ccmim_fast.errors import one_line

_CLASS_SUFFIX = "cls"  # WebDataset: the label, as text, beside the image of the same key
_MOST_CLASSES = 2**20  # each has a name in the index; ImageNet-21k has 21,841
_MOST_LINKS = 40  # in a row, as Linux follows


class _Member(NamedTuple):
    """A member that is no folder: where its bytes are, or where it leads, or why it is refused."""

    offset: int
    size: int
    target: str  # of a link: the name that it leads to
    refusal: str


def list_tar(file: io.IOBase, channels: int, notes: Notes, image_key: str = "", local: bool = True) -> list[Row]:
    """Return the images of an uncompressed tar, in its order; what is left out, or wrong with its end, is noted.

    Which members are images, and of several of one sample which one, says `selection`; nothing is unpacked. A link
    stands for the member that it leads to, if that is no sample itself. Absolute names, names that lead out of the
    archive, links to nowhere and devices give bad rows, and of several members of one name the first counts. Any bytes
    of a name survive. Raises OSError if the tar is not `local` and its server fails: what is not sent is not missing.
    """
    total = file.seek(0, os.SEEK_END)
    file.seek(0)
    tar, labels, again = _Members(file if local else None), {}, []
    for info in _headers(file, notes, local):
        key, suffix = key_of(info.name)
        if suffix == _CLASS_SUFFIX and info.isfile():
            file.seek(info.offset_data)  # tarfile finds its own place again
            text = file.read(min(info.size, 32)).strip()
            labels[key] = label_of(int(text) if text.isdigit() else None)
        if info.name in tar.members:
            again.append(info.name)
        elif not info.isdir():
            tar.members[info.name] = _Member(info.offset_data, info.size, _target(info), _refusal(info, total))
    images, containers = by_ending(visible(tar.members, channels, notes), channels, image_key, notes, tar.is_image)
    for name in containers:
        notes.add(name, "a tar or table in a tar; unpack it")
    chosen = samples(training_part(images, notes), image_key, notes, one_per_key=True)
    for name in {*chosen}.intersection(again):
        notes.add(name, "a name that was there before")
    return [tar.row(name, labels.get(key_of(name)[0], -1)) for name in tar.once(chosen)]


def label_of(value: int | None) -> int:
    """Return a label as it is indexed; -1 for a number that can be no class, such as a user's number or a hash."""
    return value if value is not None and 0 <= value < _MOST_CLASSES else -1


def _headers(file: io.IOBase, notes: Notes, local: bool) -> Iterator[tarfile.TarInfo]:
    """Yield each member's header; at last, if the end is damaged, note the reason."""
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
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        notes.add("", f"cut or damaged: {one_line(error, None)}", LOST)
    except OSError as error:
        if not local:
            raise
        notes.add("", f"could be read in part alone: {error.strerror or one_line(error, None)}", UNREAD)


def _target(info: tarfile.TarInfo) -> str:
    """Return the name of the member that a link leads to; "" of what is no link."""
    if info.islnk():
        return info.linkname
    return posixpath.normpath(posixpath.join(posixpath.dirname(info.name), info.linkname)) if info.issym() else ""


def _refusal(info: tarfile.TarInfo, total: int) -> str:
    """Return why a member is no image; empty if it may be one."""
    if info.name.startswith("/") or ".." in info.name.split("/"):
        return "a name that leads out of the archive"
    if not (info.isfile() or info.islnk() or info.issym()):
        return "a device or pipe, not a file"
    if info.issparse():
        return "a sparse file"
    if info.isfile() and info.offset_data + info.size > total:
        return "cut off by the end of the archive"
    return ""


class _Members:
    """This class holds the members of a tar by name, and follows the links among them."""

    def __init__(self, file: io.IOBase | None):
        self.members: dict[str, _Member] = {}
        self._file, self._plain = file, None

    def is_image(self, name: str) -> bool:
        """Tell whether the content of a member is an image's by its first bytes, if the tar is on a disk."""
        member = self.members[name]
        if self._file is None or member.target or member.refusal:
            return False
        return begins_like_an_image(os.pread(self._file.fileno(), min(member.size, SNIFFED), member.offset))

    def once(self, names: list[str]) -> list[str]:
        """Return the names without links to what is a sample already: a folder counts each file once, too."""
        taken = {self.members[name].offset for name in names if not self.members[name].target}
        kept = []
        for name in names:
            found = self._behind(name) if self.members[name].target else ""
            if isinstance(found, str) or found.offset not in taken:
                kept.append(name)
                taken |= {found.offset} if isinstance(found, _Member) else set()
        return kept

    def row(self, name: str, label: int) -> Row:
        found, row = self.members[name].refusal or self._behind(name), Row(os.fsencode(name), label=label)
        return row.bad(found) if isinstance(found, str) else row._replace(offset=found.offset, bytes=found.size)

    def _behind(self, name: str) -> _Member | str:
        """Return the member that a name leads to over links, or why it leads to none."""
        for _ in range(_MOST_LINKS):
            member = self.members.get(name) or self._normal().get(posixpath.normpath(name))
            if member is None:
                return "a link that leads to no member of the archive"
            if member.refusal or not member.target:
                return member.refusal or member
            name = member.target
        return "links in a loop"

    def _normal(self) -> dict[str, _Member]:
        """Return the members by normal names, without `./` for example."""
        if self._plain is None:
            self._plain = {posixpath.normpath(name): member for name, member in self.members.items()}
        return self._plain
