"""This module finds out what a path, a pattern or a URL names: a folder, a list, tars or tables."""

import glob
import os
import posixpath
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote_to_bytes

from ccmim_fast.data.index.annotations import annotation_reader
from ccmim_fast.data.index.endings import CONTAINERS, LISTS
from ccmim_fast.data.index.folders import list_folder
from ccmim_fast.data.index.index_file import Listing, Row
from ccmim_fast.data.index.left_out import Notes
from ccmim_fast.data.index.lists import read_list
from ccmim_fast.data.index.selection import folder_labels, select, training_part
from ccmim_fast.data.index.storage import as_os_errors, file_system, is_remote, is_web, reason_of
from ccmim_fast.errors import DataError
from ccmim_fast.secrets import credentials, with_credentials, without_secrets

_MOST_PATHS = 500_000  # of a pattern; the largest set that we know of, LAION-5B, has 231,349 tars
_DEEPEST = 24  # folders within each other behind a URL: a server that follows links in a loop has no end
_TAKEN = "a URL names a folder that lists its files, or a tar or table, no image or list"


def find_origin(origin: str, channels: int, image_key: str = "") -> Listing:
    """List what an absolute path or a URL names: files, or containers without their samples. Raises DataError.

    The listing of a URL has no password and no query in it.
    """
    user, query = credentials(origin) if is_remote(origin) else ("", "")
    if origin.removesuffix(query).lower().endswith(CONTAINERS) and not os.path.isdir(origin):
        return _named_containers([without_secrets(origin.removesuffix(query))], user, query)
    if is_remote(origin):
        return _remote_folder(origin, channels, image_key)
    if os.path.isdir(origin):
        return list_folder(origin, channels, image_key)
    read = read_list if origin.lower().endswith(LISTS) else annotation_reader(origin)
    if os.path.exists(origin) and not os.path.isfile(origin):
        raise DataError(
            f"{origin!r} is not a regular file; set data.root to a folder of images, tars, tables or a list"
        )
    if read is None and os.path.isfile(origin):
        lists = ", ".join(LISTS)
        raise DataError(
            f"{origin!r} is no tar, table or list ({lists}); name a folder of images, even for a single one"
        )
    if read is None:
        raise DataError(f"no folder {origin!r}; set data.root to a folder of images, to tars, tables or a list")
    listing = read(origin)
    if listing.all_parts:
        found = _named_containers(listing.containers, all_parts=True)
        return found._replace(dependencies=listing.dependencies, all_parts=True)
    return listing


def _named_containers(origins: Sequence[str], user: str = "", query: str = "", all_parts: bool = False) -> Listing:
    """Return the containers that paths, clean URLs or patterns name, in order, each once.

    They are read with user and query. `all_parts`: a pattern takes what is held out of a training part, too.
    """
    expanded = [one for origin in origins for one in _expand_braces(origin)]
    paths = [path for one in expanded for path in _matching(one, user, query)]
    missing = [path for path in paths if not (is_remote(path) or os.path.isfile(path))]
    if missing:
        what = "no file" if not os.path.exists(missing[0]) else "not a regular file:"
        raise DataError(f"{what} {missing[0]!r}" + (f", nor {len(missing) - 1} others" if missing[1:] else ""))
    remote = is_remote(paths[0])
    start = paths[0].find("://") + 3 if remote else 0
    root = paths[0][:start] + posixpath.commonpath([posixpath.dirname(path[start:]) for path in paths])
    inside = (lambda path: path.removeprefix(root + "/")) if remote else (lambda p: os.path.relpath(p, root))
    notes = Notes(f"{root}/")
    containers = [*dict.fromkeys(map(inside, paths))]
    # A pattern that names both `train-*.tar` and `val-*.tar` is no choice of the training part; `*` may be meant.
    if not all_parts and any("*" in one or "?" in one for one in expanded):
        containers = training_part(containers, notes)
    return Listing(root, [], (), {}, list(notes), containers)


def _expand_braces(pattern: str) -> list[str]:
    """Expand WebDataset's ranges: `a-{000..002}.tar` is three paths. Raises DataError if there are too many."""
    spans = re.split(r"\{(\d+)\.\.(\d+)\}", pattern)
    count = 1
    for first, last in zip(spans[1::3], spans[2::3]):
        count *= max(0, int(last[:20]) - int(first[:20]) + 1)
    if not 1 <= count <= _MOST_PATHS:
        words = "no file" if not count else f"{count:,} files, more than {_MOST_PATHS:,}"
        raise DataError(f"{pattern!r} names {words}; narrow its ranges")
    paths = [spans[0]]
    for first, last, tail in zip(spans[1::3], spans[2::3], spans[3::3]):
        numbers = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
        paths = [f"{path}{number}{tail}" for path in paths for number in numbers]
    return paths


def _matching(pattern: str, user: str, query: str) -> list[str]:
    """Return what matches a pattern, sorted; in a URL only `*` is one, since a `?` begins a query."""
    if not is_remote(pattern):
        return sorted(glob.glob(pattern)) or [pattern]
    found = [pattern]
    if "*" in pattern and is_web(pattern):
        folder = pattern[: pattern.index("*")].rpartition("/")[0] + "/"
        deepest = _DEEPEST if "**" in pattern else pattern.count("/", len(folder)) + 1
        wanted = re.compile(re.escape(pattern).replace(r"\*\*", ".*").replace(r"\*", "[^/]*"))
        found = [*filter(wanted.fullmatch, _files_below(with_credentials(folder, user, ""), query, deepest))]
    elif "*" in pattern:
        found = _listed(with_credentials(pattern, user, query), "glob")
    if not found:
        raise DataError(f"no file {pattern!r}")
    return found


def _remote_folder(origin: str, channels: int, image_key: str) -> Listing:
    """List everything below a URL, by the rule of a folder; contents are not looked at."""
    query = credentials(origin)[1] if is_web(origin) else ""
    place = origin.partition("?")[0] if query else origin
    fs = file_system(place)
    root = without_secrets(fs.unstrip_protocol(fs._strip_protocol(place)).partition("?")[0].rstrip("/"))
    paths = [url.removeprefix(root + "/") for url in _files_below(place.rstrip("/") + "/", query)]
    place_of = {_plain(path) if is_web(origin) else path: path for path in paths}
    notes = Notes(f"{root}/")
    images, containers = select([*place_of], channels, image_key, notes, is_image=lambda name: False)
    names, labels = folder_labels(images)
    last = len(names)
    order = sorted(zip(images, labels), key=lambda one: (one[1] % (last + 1), os.fsencode(one[0])))  # -1 comes last
    rows = [Row(os.fsencode(place_of[name]), label=label) for name, label in order]
    return Listing(root, rows, names, {}, list(notes), [place_of[name] for name in containers])


def _plain(path: str) -> str:
    """Return a name of the web as it is on a disk; a slash within a name stays encoded."""
    return os.fsdecode(unquote_to_bytes(re.sub("%2f", "%252F", path, flags=re.IGNORECASE)))


def _files_below(url: str, query: str, deepest: int = _DEEPEST) -> list[str]:
    """Return the clean URLs of the files in `deepest` levels of a folder, sorted.

    Raises DataError if any folder cannot be listed, over which fsspec's own walk passes in silence. A file system that
    lists all of a folder at once is asked for that.
    """
    fs, web = file_system(url, query), is_web(url)
    if _finds_by_itself(fs) and (found := _listed(url, "find")):
        return found
    found, seen, waiting = set(), {url}, [(url, 1)]
    while waiting:
        folder, depth = waiting.pop()
        for entry in _entries(fs, folder):
            # Of a page, `?C=N;O=D` is a link that sorts it.
            name = entry["name"].partition("?")[0] if web else entry["name"].rstrip("/")
            if name.rstrip("/") == fs._strip_protocol(folder).rstrip("/"):
                continue
            inside = fs.unstrip_protocol(name)
            if not (name.endswith("/") if web else entry["type"] == "directory"):
                found.add(without_secrets(inside))
            elif inside not in seen and depth < deepest:
                seen.add(inside)
                waiting.append((inside, depth + 1))
    if not found:
        raise DataError(f"{without_secrets(url).rstrip('/')!r} lists no file; {_TAKEN}")
    return sorted(found)


def _finds_by_itself(fs: Any) -> bool:
    """Tell whether a file system has a `find` of its own, as those of object stores do."""
    from fsspec import AbstractFileSystem
    from fsspec.asyn import AsyncFileSystem

    inner = getattr(type(fs), "_find", AsyncFileSystem._find)
    return type(fs).find is not AbstractFileSystem.find or inner is not AsyncFileSystem._find


def _entries(fs: Any, folder: str) -> list[dict[str, Any]]:
    try:
        with as_os_errors(folder):
            return fs.ls(folder, detail=True)
    except OSError as error:
        raise _unlisted(folder, error) from error


def _listed(url: str, method: str) -> list[str]:
    """Return the clean URLs that fsspec's `glob` or `find` gives, sorted."""
    fs = file_system(url)
    try:
        with as_os_errors(url):
            return sorted(without_secrets(fs.unstrip_protocol(path)) for path in getattr(fs, method)(url))
    except OSError as error:
        raise _unlisted(url, error) from error


def _unlisted(url: str, error: OSError) -> DataError:
    what = f"cannot list {without_secrets(url).rstrip('/')!r}"
    return DataError(f"{what}: {reason_of(error)}; {_TAKEN}")
