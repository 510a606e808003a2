"""The manifest of a checkpoint says how long each of its files is and what its sha256 is. Imports no torch."""

import hashlib
import io
import json
import os
import re
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ccmim_fast.errors import CheckpointError, UnreadableError

CHECKPOINTS = "checkpoints"  # the folder of them, in that of a run
STATE, MANIFEST = "state.pt", "manifest.json"
_ONE_FILE, _MANY = 1, 2  # formats; the first is read by all versions
_LONGEST = 1 << 20  # bytes of a manifest; a real one has about 130 for each file


class Sum(NamedTuple):
    """This tuple identifies a file by its size in bytes and its sha256 in hexadecimal digits."""

    size: int
    sha256: str


class Hashed(io.BufferedWriter):
    """This new file hashes what is written on its way there: reading back would hash what became of it."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path, "wb"))
        self._size, self._sha256 = 0, hashlib.sha256()

    def write(self, data) -> int:
        self._size += memoryview(data).nbytes
        self._sha256.update(data)
        return super().write(data)

    def sum(self) -> Sum:
        """Return the sum of all that was written; also once the file is closed, as torch's writer does early."""
        return Sum(self._size, self._sha256.hexdigest())


def checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in `folder`, oldest first, undamaged or not; empty if there is no such folder.

    Raises UnreadableError where nobody can tell which there are.
    """
    try:
        with os.scandir(folder) as entries:
            found = [folder / entry.name for entry in entries if step_of(Path(entry.name)) is not None]
    except FileNotFoundError:
        if folder.is_symlink():  # to a disk that is not there now
            raise UnreadableError(f"{folder}: links to {os.readlink(folder)}, which is not there") from None
        return []
    except NotADirectoryError:
        return []
    except OSError as error:
        raise UnreadableError(f"{folder}: cannot be read: {error.strerror}") from None
    return sorted((path for path in found if not path.is_file()), key=step_of)


def step_of(path: Path) -> int | None:
    """Return the step that a folder's name tells; None if it is no checkpoint's name."""
    named = re.fullmatch(r"step_(\d{8,})", path.name, re.ASCII)
    return int(named[1]) if named else None


def manifest(step: int, sums: dict[str, Sum]) -> bytes:
    """Return the content of `manifest.json`; `sums` by file name, `state.pt` among them."""
    version = _ONE_FILE if set(sums) == {STATE} else _MANY
    files = {name: found._asdict() for name, found in sums.items()}
    return json.dumps({"format": version, "step": step, "files": files}, indent=1).encode()


def read_manifest(path: Path, step: int | None) -> dict[str, Sum]:
    """Read what each file in the folder `path` must be; CheckpointError: damaged, of another version or step."""
    with open_file(path / MANIFEST) as file:
        text = file.read(_LONGEST)
    try:
        told = json.loads(text)
        version, told_step = told["format"], told["step"]
        sums = {name: Sum(entry["size"], entry["sha256"]) for name, entry in told["files"].items()}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        raise CheckpointError(f"{MANIFEST} is damaged") from None
    if version not in (_ONE_FILE, _MANY):
        raise CheckpointError(
            f"{MANIFEST}: format={version!r:.20} must be {_ONE_FILE} or {_MANY}, those that this version reads"
        )
    # Written back, it must be the same bytes: so the manifest, which no checksum covers, is checked too.
    plain = STATE in sums and all(re.fullmatch(r"[\w.]+", name, re.ASCII) for name in sums)
    if not plain or text != manifest(told_step, sums) or step not in (None, told_step):
        raise CheckpointError(f"{MANIFEST} is damaged")
    return sums


def check_file(file: BinaryIO, expected: Sum) -> None:
    """Raise CheckpointError if an open file has another size or content than expected; go back to its start."""
    name, found = Path(file.name).name, os.fstat(file.fileno()).st_size
    if found != expected.size:
        raise CheckpointError(f"{name} is damaged: {found} bytes, expected {expected.size}")
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    if digest.hexdigest() != expected.sha256:
        raise CheckpointError(f"{name} is damaged: its sha256 is not the manifest's")
    file.seek(0)


def open_file(path: Path) -> BinaryIO:
    """Open a file to read; raises CheckpointError for anything but a plain file."""
    if path.exists() and not path.is_file():  # a named pipe would be waited for
        raise CheckpointError(f"{path.name} is not a file")
    return open(path, "rb")


def sync(file: BinaryIO) -> None:
    """Make the content of `file` survive a power cut."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
