"""This module finds out what a path, a pattern or a URL names: a folder, a list, tars or tables."""

import glob
import os
import posixpath

from ccmim_fast.data.index.annotations import annotation_reader
from ccmim_fast.data.index.endings import file_suffixes
from ccmim_fast.data.index.folders import BESIDE_CLASSES, list_folder, read_list
from ccmim_fast.data.index.index_file import BESIDE, Listing, Row
from ccmim_fast.data.index.storage import as_os_errors, file_system, is_remote, join
from ccmim_fast.data.index.tables import SUFFIXES as TABLE_SUFFIXES
from ccmim_fast.errors import DataError

_CONTAINERS = (".tar", *TABLE_SUFFIXES)
_LISTS = (".txt", ".lst", ".tsv")


def find_origin(origin: str, channels: int) -> Listing:
    """List what an absolute path or a URL names: files, or containers without their samples. Raises DataError."""
    if origin.endswith(_CONTAINERS) and not os.path.isdir(origin):
        return _named_containers(origin)
    if is_remote(origin):
        return _remote_folder(origin, channels)
    if not os.path.isdir(origin):
        read = read_list if origin.endswith(_LISTS) else annotation_reader(origin)
        if read is None:
            raise DataError(f"no folder {origin!r}; set data.root to a folder of images, to tars, tables or a list")
        return read(origin)
    try:
        containers = sorted(filter(_is_container, os.listdir(origin)))
    except OSError as error:
        raise DataError(f"cannot look into {origin!r}: {error.strerror}") from error
    return _of_containers(origin, containers) if containers else list_folder(origin, file_suffixes(channels))


def _of_containers(root: str, containers: list[str]) -> Listing:
    return Listing(root, [], (), {}, [], containers)


def _is_container(path: str) -> bool:
    """Tell whether a file in a folder is a tar or a table of images, by its name."""
    name = posixpath.basename(path)
    return name.endswith(_CONTAINERS) and name[0] != "." and name != BESIDE


def _named_containers(origin: str) -> Listing:
    """Return the containers that a path, a URL or a pattern names, in order."""
    paths = [path for one in _expand_braces(origin) for path in _matching(one)]
    missing = [path for path in paths if not (is_remote(path) or os.path.isfile(path))]
    if missing:
        raise DataError(f"no file {missing[0]!r}" + (f", nor {len(missing) - 1} others" if missing[1:] else ""))
    start = paths[0].find("://") + 3 if is_remote(origin) else 0
    root = paths[0][:start] + posixpath.commonpath([posixpath.dirname(path[start:]) for path in paths])
    inside = (lambda path: path.removeprefix(root + "/")) if is_remote(origin) else (lambda p: os.path.relpath(p, root))
    return _of_containers(root, [inside(path) for path in paths])


def _expand_braces(pattern: str) -> list[str]:
    """Expand WebDataset's ranges: `a-{000..002}.tar` is three paths."""
    head, opened, rest = pattern.partition("{")
    span, closed, tail = rest.partition("}")
    first, dots, last = span.partition("..")
    if not (opened and closed and dots and first.isdigit() and last.isdigit()):
        return [pattern]
    numbers = range(int(first), int(last) + 1)
    return [f"{head}{number:0{len(first)}}{end}" for number in numbers for end in _expand_braces(tail)]


def _matching(pattern: str) -> list[str]:
    """Return what matches a pattern, sorted; in a URL only `*` is one, since a `?` begins a query."""
    if not is_remote(pattern):
        return sorted(glob.glob(pattern)) or [pattern]
    found = _listed(pattern, "glob") if "*" in pattern else [pattern]
    if not found:
        raise DataError(f"no file {pattern!r}")
    return found


def _remote_folder(origin: str, channels: int) -> Listing:
    """List everything below a URL: containers, or else image files with their first folders as classes."""
    fs = file_system(origin)
    root = fs.unstrip_protocol(fs._strip_protocol(origin)).rstrip("/")
    paths = [url.removeprefix(root + "/") for url in _listed(origin.rstrip("/") + "/", "find")]
    containers = list(filter(_is_container, paths))
    if containers:
        return _of_containers(root, containers)
    images = [path for path in paths if path.lower().endswith(file_suffixes(channels))]
    names = sorted({path.split("/")[0] for path in images if "/" in path})
    label_of = {name: label for label, name in enumerate(names)}
    rows = [
        Row(os.fsencode(path), label=label_of.get(path.split("/")[0], -1))
        for path in images
        if "/" in path or not names
    ]
    notes = [(join(root, path), BESIDE_CLASSES) for path in images if names and "/" not in path]
    return Listing(root, rows, tuple(names), {}, notes)


def _listed(url: str, method: str) -> list[str]:
    """Return the URLs that fsspec's `glob` or `find` gives, sorted."""
    fs = file_system(url)
    try:
        with as_os_errors(url):
            return sorted(fs.unstrip_protocol(path) for path in getattr(fs, method)(url))
    except OSError as error:
        raise DataError(f"cannot list {url.rstrip('/')!r}: {error}; name a tar or table by its URL") from error
