"""Another commit of this repository beside the present one: its step, by its own benchmarks/measure.py."""

import shutil
import subprocess
from pathlib import Path

from measure import ROOT, fields_of

from ccmim_fast.errors import ConfigError, MachineError


def full_name(commit: str) -> str:
    """The 40 digits of a commit, a branch or a tag.

    Raises:
        ConfigError: there is none of this name, or it has no benchmark of steps.
        MachineError: this folder is no clone, or there is no git.
    """
    if shutil.which("git") is None:
        raise MachineError(f"@{commit}: needs git, which is not installed")
    if _git("rev-parse", "--git-dir").returncode:
        raise MachineError(f"@{commit}: {ROOT} is no clone; git clone the repository and run it there")
    found = _git("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}")
    if found.returncode:
        raise ConfigError(f"@{commit}: no such commit in {ROOT}; git fetch it (a shallow clone: git fetch --unshallow)")
    name = found.stdout.strip()
    if _git("cat-file", "-e", f"{name}:benchmarks/measure.py").returncode:
        raise ConfigError(f"@{commit}: that commit has no benchmarks/measure.py, so it cannot be measured")
    return name


def unpack(commit: str, folder: Path) -> Path:
    """The files of a commit, by its full name, below `folder`; returns where they lie.

    Raises:
        MachineError: they cannot be read, or the commit cannot be imported.
    """
    where = folder / commit
    if where.exists():
        return where
    archive = folder / f"{commit}.tar"
    done = _git("archive", "--format=tar", f"--output={archive}", commit)
    if done.returncode:
        raise MachineError(f"@{commit}: git archive: {' '.join(done.stderr.split())}")
    shutil.unpack_archive(archive, where)
    archive.unlink()
    fields_of(where)  # before anything is measured
    return where


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
