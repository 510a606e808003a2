"""This module finds out what a path, a pattern or a URL names: a folder, a list, tars or tables."""

import glob
import os
import posixpath
from typing import NamedTuple

from ccmim_fast.data.index.annotations import annotation_reader
from ccmim_fast.data.index.decode import file_suffixes
from ccmim_fast.data.index.folders import list_folder, read_list
from ccmim_fast.data.index.index_file import BESIDE, Listing, Row
from ccmim_fast.data.index.storage import as_os_errors, file_system, is_remote, join
from ccmim_fast.data.index.tables import SUFFIXES as TABLE_SUFFIXES
from ccmim_fast.errors import DataError

_CONTAINERS = (".tar", *TABLE_SUFFIXES)
_LISTS = (".txt", ".lst", ".tsv")


class Origin(NamedTuple):
    """An origin consists of the parts to be indexed."""

    root: str  # folder or URL
    containers: list[str]  # tars or tables, paths from `root`
    files: Listing | None = None  # image files of a folder or list; None if there are containers


def find_origin(origin: str, channels: int) -> Origin:
    """List the parts of the place that `origin` names. Raises DataError if it does not exist or cannot be listed."""
    if is_remote(origin):
        return _remote_origin(origin, channels)
    containers = _containers_of(origin)
    if containers:
        root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in containers])
        return Origin(root, [os.path.relpath(path, root) for path in containers])
    if not os.path.isdir(origin):
        read = read_list if origin.endswith(_LISTS) else annotation_reader(origin)
        if read is None:
            raise DataError(f"no folder {origin!r}; set data.root to a folder of images, to tars, tables or a list")
        return Origin(os.path.dirname(os.path.abspath(origin)), [], read(origin))
    root = os.path.abspath(origin)
    try:
        containers = sorted(name for name in os.listdir(root) if _is_container(name))
    except OSError as error:
        raise DataError(f"cannot look into {origin!r}: {error.strerror}") from error
    return Origin(root, containers, None if containers else list_folder(root, file_suffixes(channels)))


def _is_container(path: str) -> bool:
    """Tell whether a file in a folder is a tar or a table of images, by its name."""
    name = posixpath.basename(path)
    return name.endswith(_CONTAINERS) and name[0] != "." and name != BESIDE


def _containers_of(origin: str) -> list[str]:
    """Return the containers that a path or a pattern names, in order."""
    if not origin.endswith(_CONTAINERS) or os.path.isdir(origin):
        return []
    paths = [path for one in _expand_braces(origin) for path in (sorted(glob.glob(one)) or [one])]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise DataError(f"no file {missing[0]!r}" + (f", nor {len(missing) - 1} others" if missing[1:] else ""))
    return paths


def _expand_braces(pattern: str) -> list[str]:
    """Expand WebDataset's ranges: `a-{000..002}.tar` is three paths."""
    head, opened, rest = pattern.partition("{")
    span, closed, tail = rest.partition("}")
    first, dots, last = span.partition("..")
    if not (opened and closed and dots and first.isdigit() and last.isdigit()):
        return [pattern]
    numbers = range(int(first), int(last) + 1)
    return [f"{head}{number:0{len(first)}}{end}" for number in numbers for end in _expand_braces(tail)]


def _remote_origin(origin: str, channels: int) -> Origin:
    """List a URL: one container, several by a pattern, or everything below it."""
    if origin.endswith(_CONTAINERS):
        urls = [url for one in _expand_braces(origin) for url in _matching(one)]
        protocol = urls[0].partition("://")[0] + "://"
        root = protocol + posixpath.commonpath([posixpath.dirname(url.removeprefix(protocol)) for url in urls])
        return Origin(root, [url.removeprefix(root + "/") for url in urls])
    fs = file_system(origin)
    below = _listed(origin.rstrip("/") + "/", "find")
    root = fs.unstrip_protocol(fs._strip_protocol(origin)).rstrip("/")
    paths = [url.removeprefix(root + "/") for url in below]
    containers = [path for path in paths if _is_container(path)]
    if containers:
        return Origin(root, containers)
    return Origin(root, [], _remote_files(root, [p for p in paths if p.lower().endswith(file_suffixes(channels))]))


def _matching(url: str) -> list[str]:
    """Return the URLs that match a pattern with `*`; a `?` begins a query of the URL and is no pattern."""
    found = _listed(url, "glob") if "*" in url else [url]
    if not found:
        raise DataError(f"no file {url!r}")
    return found


def _listed(url: str, method: str) -> list[str]:
    """Return the URLs that fsspec's `glob` or `find` gives, sorted."""
    fs = file_system(url)
    try:
        with as_os_errors(url):
            return sorted(fs.unstrip_protocol(path) for path in getattr(fs, method)(url))
    except OSError as error:
        raise DataError(f"cannot list {url.rstrip('/')!r}: {error}; name a tar or table by its URL") from error


def _remote_files(root: str, paths: list[str]) -> Listing:
    """List image files below a URL, with their first folders as classes."""
    names = tuple(sorted({path.split("/")[0] for path in paths if "/" in path}))
    label_of = {name: label for label, name in enumerate(names)}
    classed = [path for path in paths if "/" in path] if names else paths
    loose = [path for path in paths if names and "/" not in path]
    notes = [(join(root, path), "lies beside the class folders, in none of them") for path in loose]
    rows = [Row(os.fsencode(path), label=label_of.get(path.split("/")[0], -1)) for path in classed]
    return Listing(rows, names, {}, notes)
