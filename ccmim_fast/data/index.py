"""Which images a folder holds: scanned once, by their headers only, before any model is built."""

# N images, H height, W width, C channels

import os
import stat
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from ccmim_fast.data.decode import Header, decode, file_suffixes, read_header
from ccmim_fast.data.source import encode_pnm
from ccmim_fast.errors import DataError

_SCAN_THREADS = 8  # hides the latency of a cold or remote disk; parsing itself holds the interpreter lock
_CHUNK = 1000  # files per task: a task each would cost a million futures

Skipped = tuple[str, str]  # path, reason


@dataclass(frozen=True, eq=False)
class FolderSource:
    """Image files of one folder; a `Source`.

    Attributes:
        root: the folder.
        paths: N paths in byte order, class by class; any bytes of a name survive (`os.fsencode` gives them back).
        plain_N: bool, files that every decoder reads as Pillow does; the others are handed out decoded.
        skipped: (path, reason) of what is no usable image.
        channels, sizes_N2, labels_N, class_names: see `Source`.
    """

    root: str
    channels: int
    paths: list[str] = field(repr=False)
    sizes_N2: np.ndarray = field(repr=False)
    plain_N: np.ndarray = field(repr=False)
    labels_N: np.ndarray | None = field(repr=False)
    class_names: tuple[str, ...]
    skipped: list[Skipped] = field(repr=False)

    def __len__(self) -> int:
        return len(self.paths)

    def decode(self, index: int) -> np.ndarray:
        """See `Source`. A file that is damaged, gone, or of another size than indexed raises DataError naming it."""
        image_HWC = decode(self.paths[index], self.channels)
        expected = (*self.sizes_N2[index].tolist(), self.channels)
        if image_HWC.shape != expected:
            raise DataError(f"{self.paths[index]!r} was {expected} when indexed and is {image_HWC.shape} now")
        return image_HWC

    def read(self, index: int) -> bytes:
        """See `Source`: the file itself where it is `plain_N`, else its pixels as PGM or PPM."""
        if not self.plain_N[index]:
            return encode_pnm(self.decode(index))
        try:
            with open(self.paths[index], "rb") as file:
                return file.read()
        except OSError as error:
            raise DataError(f"cannot read {self.paths[index]!r}: {error.strerror}") from error


def scan_folder(root: str, channels: int = 3) -> FolderSource:
    """Index an ImageFolder tree (sub-folders are classes, images may lie deeper) or a flat folder without labels.

    Links are followed, and each file and folder counts once, at its first place in the order of the walk. Names that
    begin with a dot are not looked at. Sub-folders without images are classes too, so that two splits of one data set
    agree on the labels.

    Args:
        root: the folder.
        channels: 1 (gray), 3 (RGB), or the C of uint8 [H, W, C] .npy files.

    Raises:
        DataError: no such folder, or no readable image in it.
    """
    if not os.path.isdir(root):
        raise DataError(f"no folder {root!r}; set data.root to a folder of images")
    skipped: list[Skipped] = []
    class_names, groups = _list_images(root, file_suffixes(channels), skipped)
    candidates = [(path, label) for label, paths in enumerate(groups) for path in paths]
    headers = _read_headers([path for path, _ in candidates], channels)
    usable = [(*candidate, header) for candidate, header in zip(candidates, headers) if isinstance(header, Header)]
    skipped += [(path, header) for (path, _), header in zip(candidates, headers) if not isinstance(header, Header)]
    if not usable:
        raise DataError(_nothing_found(root, channels, skipped))
    return FolderSource(
        root=root,
        channels=channels,
        paths=[path for path, _, _ in usable],
        sizes_N2=np.array([header[:2] for _, _, header in usable], dtype=np.int32),
        plain_N=np.array([header.plain for _, _, header in usable]),
        labels_N=np.array([label for _, label, _ in usable], dtype=np.int64) if class_names else None,
        class_names=class_names,
        skipped=skipped,
    )


def _list_images(
    root: str, suffixes: tuple[str, ...], skipped: list[Skipped]
) -> tuple[tuple[str, ...], list[list[str]]]:
    """(class names, paths per class); no names and one group of paths for a flat folder."""
    folders, loose = [], []
    seen = {_identity(os.stat(root))}
    for path, status in _entries(root, skipped):
        if not stat.S_ISDIR(status.st_mode):
            loose.append((path, status))
        elif _identity(status) not in seen:
            # All class folders are known before any is entered: a link from one to another adds nothing.
            seen.add(_identity(status))
            folders.append(path)
    groups = [_walk(folder, suffixes, seen, skipped) for folder in folders]
    loose = _select_images(loose, suffixes, seen, skipped)
    if not any(groups):
        return (), [loose]
    skipped += [(path, "lies beside the class folders, in none of them") for path in loose]
    return tuple(os.path.basename(folder) for folder in folders), groups


def _walk(folder: str, suffixes: tuple[str, ...], seen: set, skipped: list[Skipped]) -> list[str]:
    """Paths of the images in a folder and below, in byte order; adds what it meets to `seen`."""
    images, waiting = [], [folder]
    while waiting:
        files = []
        for path, status in _entries(waiting.pop(), skipped):
            if not stat.S_ISDIR(status.st_mode):
                files.append((path, status))
            elif _identity(status) not in seen:
                seen.add(_identity(status))
                waiting.append(path)
        images += _select_images(files, suffixes, seen, skipped)
    return sorted(images, key=os.fsencode)


def _select_images(
    entries: Iterable[tuple[str, os.stat_result]], suffixes: tuple[str, ...], seen: set, skipped: list[Skipped]
) -> list[str]:
    """Paths with an image's suffix whose file was not seen yet; adds them to `seen`."""
    images = []
    for path, status in entries:
        if not path.lower().endswith(suffixes) or _identity(status) in seen:
            continue
        if stat.S_ISREG(status.st_mode):
            seen.add(_identity(status))
            images.append(path)
        else:
            skipped.append((path, "not a regular file"))
    return images


def _entries(folder: str, skipped: list[Skipped]) -> list[tuple[str, os.stat_result]]:
    """(path, status behind any link) of what lies in a folder, in byte order of the names."""
    entries = []
    try:
        names = sorted(os.listdir(folder), key=os.fsencode)
    except OSError as error:
        skipped.append((folder, error.strerror))
        return entries
    for path in (os.path.join(folder, name) for name in names if not name.startswith(".")):
        try:
            entries.append((path, os.stat(path)))
        except OSError as error:
            skipped.append((path, "broken link" if os.path.islink(path) else error.strerror))
    return entries


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _read_headers(paths: list[str], channels: int) -> list[Header | str]:
    """The header of each file, or the reason why it has none."""

    def read_chunk(start: int) -> list[Header | str]:
        results: list[Header | str] = []
        for path in paths[start : start + _CHUNK]:
            try:
                results.append(read_header(path, channels))
            except DataError as error:
                results.append(str(error))
        return results

    with warnings.catch_warnings(), ThreadPoolExecutor(_SCAN_THREADS) as pool:
        # Our own limit on pixels excludes what Pillow warns about.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        chunks = pool.map(read_chunk, range(0, len(paths), _CHUNK))
        return [header for chunk in chunks for header in chunk]


def _nothing_found(root: str, channels: int, skipped: list[Skipped]) -> str:
    if not skipped:
        return f"no image in {root!r}: none of its files ends in {', '.join(file_suffixes(channels))}"
    path, reason = skipped[0]
    return f"no readable image in {root!r}: {len(skipped)} skipped, the first {path!r}: {reason}"
