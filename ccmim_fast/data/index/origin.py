"""What a path, a pattern or a URL names: a folder, a list, tars or tables."""

import glob
import itertools
import os
import posixpath
from collections.abc import Callable
from typing import NamedTuple

from ccmim_fast.data.index.annotations import is_flowers, read_flowers, read_inaturalist
from ccmim_fast.data.index.decode import file_suffixes
from ccmim_fast.data.index.folders import File, Found, read_list, walk_folder
from ccmim_fast.data.index.index_file import BESIDE
from ccmim_fast.data.index.storage import as_os_errors, file_system, is_remote, join
from ccmim_fast.data.index.tables import SUFFIXES as TABLE_SUFFIXES
from ccmim_fast.errors import DataError

_CONTAINERS = (".tar", *TABLE_SUFFIXES)
_LISTS = (".txt", ".lst", ".tsv")


class Origin(NamedTuple):
    """What is to be indexed.

    Attributes:
        root: folder or URL that paths are relative to.
        containers: tars or tables, paths from `root`; none where every image is a file.
        found: the files of a folder or list; None where there are containers.
    """

    root: str
    containers: list[str]
    found: Found | None


def find_origin(origin: str, channels: int) -> Origin:
    """Tell what kind of thing `origin` names, and what it consists of.

    Raises:
        DataError: it is not there.
    """
    if is_remote(origin):
        return _remote_origin(origin, channels)
    containers = _by_pattern(origin)
    if containers:
        root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in containers])
        return Origin(root, [os.path.relpath(path, root) for path in containers], None)
    if not os.path.isdir(origin):
        if read := _reader(origin):
            return Origin(os.path.dirname(os.path.abspath(origin)), [], read(origin))
        raise DataError(f"no folder {origin!r}; set data.root to a folder of images, to tars, tables or a list")
    root = os.path.abspath(origin)
    try:
        inside = sorted(name for name in os.listdir(root) if _is_container(name))
    except OSError as error:
        raise DataError(f"cannot look into {origin!r}: {error.strerror}") from error
    if inside:
        return Origin(root, inside, None)
    return Origin(root, [], walk_folder(root, file_suffixes(channels)))


def _reader(origin: str) -> Callable[[str], Found] | None:
    """What reads a file that names images, by how it is named."""
    if origin.endswith(_LISTS):
        return read_list
    if origin.endswith(".json"):
        return read_inaturalist
    return read_flowers if is_flowers(origin) else None


def _is_container(path: str) -> bool:
    """Whether what a folder holds is a tar or a table of images, by its name."""
    name = posixpath.basename(path)
    return name.endswith(_CONTAINERS) and name[0] != "." and name != BESIDE


def _by_pattern(origin: str) -> list[str]:
    """The containers that a path or a pattern names, in order."""
    if not origin.endswith(_CONTAINERS) or os.path.isdir(origin):
        return []
    paths = [path for one in _braces(origin) for path in (sorted(glob.glob(one)) or [one])]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise DataError(f"no file {missing[0]!r}" + (f", nor {len(missing) - 1} others" if missing[1:] else ""))
    return paths


def _braces(pattern: str) -> list[str]:
    """WebDataset's ranges: `a-{000..002}.tar` is three paths."""
    head, opened, rest = pattern.partition("{")
    span, closed, tail = rest.partition("}")
    first, dots, last = span.partition("..")
    if not (opened and closed and dots and first.isdigit() and last.isdigit()):
        return [pattern]
    numbers = range(int(first), int(last) + 1)
    return [f"{head}{number:0{len(first)}}{end}" for number in numbers for end in _braces(tail)]


def _remote_origin(origin: str, channels: int) -> Origin:
    """Of a URL: a container, some by braces, or all that lies below it."""
    if origin.endswith(_CONTAINERS):
        urls = [url for one in _braces(origin) for url in _matching(one)]
        root = _common_folder(urls)
        return Origin(root, [url.removeprefix(root + "/") for url in urls], None)
    fs = file_system(origin)
    try:
        with as_os_errors(origin):
            below = sorted(fs.unstrip_protocol(path) for path in fs.find(origin.rstrip("/") + "/"))
    except OSError as error:
        raise DataError(f"cannot list {origin!r}: {error}; name a tar or table by its URL") from error
    root = fs.unstrip_protocol(fs._strip_protocol(origin)).rstrip("/")
    relative = [url.removeprefix(root + "/") for url in below]
    containers = [path for path in relative if _is_container(path)]
    if containers:
        return Origin(root, containers, None)
    return Origin(root, [], _remote_files(root, [p for p in relative if p.lower().endswith(file_suffixes(channels))]))


def _matching(url: str) -> list[str]:
    """The URLs that a pattern stands for. A `?` begins a query and is none."""
    if "*" not in url:
        return [url]
    fs = file_system(url)
    try:
        with as_os_errors(url):
            found = sorted(fs.unstrip_protocol(path) for path in fs.glob(url))
    except OSError as error:
        raise DataError(f"cannot list {url!r}: {error}; name a tar or table by its URL") from error
    if not found:
        raise DataError(f"no file {url!r}")
    return found


def _common_folder(urls: list[str]) -> str:
    """The longest one above all; written out, since stores of objects know no `..`."""
    folders = [url.split("/")[:-1] for url in urls]
    same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False))
    return "/".join(parts[0] for parts in same)


def _remote_files(root: str, paths: list[str]) -> Found:
    names = tuple(sorted({path.split("/")[0] for path in paths if "/" in path}))
    label_of = {name: label for label, name in enumerate(names)}
    classed = [path for path in paths if "/" in path] if names else paths
    loose = [path for path in paths if names and "/" not in path]
    notes = [(join(root, path), "lies beside the class folders, in none of them") for path in loose]
    return Found([File(path, -1, 0, label_of.get(path.split("/")[0], -1)) for path in classed], names, {}, notes)
