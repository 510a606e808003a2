"""`ccmim doctor`: what this machine has, whether it works, what runs in its place, and the line that installs it.

What is installed is tried as the trainer uses it (trials.py), each in a process of its own: a library that was built
for another torch may crash or hang.
"""

import importlib.metadata
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ccmim_fast.engine.compile import choose_compile
from ccmim_fast.errors import ConfigError
from ccmim_fast.models.precision import choose_precision
from ccmim_fast.optim.apex import BUILD
from ccmim_fast.ranks.session import open_session

PATIENCE = 120  # seconds for a trial; torch.compile takes 20 to 60 of them
_WIDE = 160  # characters of a line where nobody reads it on a terminal
_PASCAL = "pip install torch==2.7.1 torchvision==0.22.1"  # the last with code for compute capability 6.x


class Part(NamedTuple):
    """What may be there or not.

    Attributes:
        name: in the table.
        module: that is looked for.
        packages: distributions that may bring it; their version is told.
        trial: arguments of trials.py, which ends with 0 where it works.
        instead: what runs without it.
        install: the command that brings it, or how to build it.
    """

    name: str
    module: str
    packages: tuple[str, ...]
    trial: tuple[str, ...]
    instead: str
    install: str


class Row(NamedTuple):
    """Of the table. `works`: `yes`, `loads` (no CUDA to try more), `not installed`, or `no: ` and the reason."""

    name: str
    found: str
    works: str
    instead: str = ""
    install: str = ""


def print_report(argv: Sequence[str] = ()) -> None:
    """`ccmim doctor`: GPUs and libraries, each tried; what runs in place of those that fail, and how to get them.

    It changes nothing, and takes about a minute where torch.compile is tried.
    """
    if argv and argv[0] in ("-h", "--help"):
        print(print_report.__doc__.replace("`", ""))
        return
    if argv:
        raise ConfigError(f"usage: ccmim doctor; it takes no options, not {argv[0]!r:.80}")
    with open_session("auto") as here:
        precision, compiled = choose_precision("auto", here.device).name, choose_compile("auto", here.device)
    rows = [*gpus(), *examine(parts(here.device.type == "cuda"))]
    table = Table("part", "found", "works", "instead")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row[:4]))
    Console(width=None if sys.stdout.isatty() else _WIDE).print(table)
    print(f"train.device=auto is {here.device.type}, precision=auto {precision}, compile=auto {compiled}")
    for row in rows:
        if row.install:  # not in the table, which would break it: it is there to be copied
            print(f"for {row.name}: {row.install}")


def gpus() -> list[Row]:
    """torch and each GPU that it sees, or why it sees none."""
    listed = _nvidia_smi()
    found = [_gpu(index, listed) for index in range(torch.cuda.device_count())]
    if not found and listed:
        name, driver = listed[0]
        why = f"no: torch {torch.__version__} does not see it; its driver is too old, or CUDA_VISIBLE_DEVICES hides it"
        newer = f"a driver for CUDA {torch.version.cuda}, or a torch for the driver: https://pytorch.org/get-started"
        found = [Row("GPU", f"{name}, driver {driver}", why, "the CPU", newer)]
    elif not found:
        found = [Row("GPU", "none", "not installed", "the CPU, with bf16 where it has it")]
    return [Row("torch", f"{torch.__version__}, Python {sys.version.split()[0]}", "yes"), *found]


def _gpu(index: int, listed: list[tuple[str, str]]) -> Row:
    properties = torch.cuda.get_device_properties(index)
    major, minor = torch.cuda.get_device_capability(index)
    what = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability {major}.{minor}"
    if listed:
        what += f", driver {listed[0][1]}"
    (works,) = try_all([("cuda", str(index))])
    if works == "yes":
        return Row(f"cuda:{index}", what, works)
    return Row(f"cuda:{index}", what, works, "the CPU: train.device=cpu", _PASCAL if major < 7 else "")


def _nvidia_smi() -> list[tuple[str, str]]:
    """Name and driver of each GPU, as the driver's own tool has it; none where there is no driver."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = filter(str.strip, done.stdout.splitlines() if done.returncode == 0 else [])
    return [(name.strip(), driver.strip()) for name, _, driver in (line.partition(",") for line in lines)]


def parts(on_cuda: bool) -> list[Part]:
    """What the trainer can use, tried on CUDA or, as far as it goes, on a CPU."""
    old = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8)
    xformers = "pip install xformers" + "==0.0.31.post1" * old
    # On a CPU, too: its pipeline needs no GPU, its package names a CUDA all the same.
    dali = "nvidia-dali-cuda120" if (torch.version.cuda or "").startswith("12") else "nvidia-dali-cuda130"
    of_dali, on = ("nvidia-dali-cuda130", "nvidia-dali-cuda120"), ("dali", "cuda" if on_cuda else "cpu")
    # Name, module, packages, trial, what runs instead, how to get it.
    for_cuda = [
        ("torch.compile", "torch", ("torch",), ("compiled",), "train.compile=off: eager steps", "apt install gcc"),
        ("triton", "triton", ("triton",), ("triton",), "train.kernels=reference: plain PyTorch", "pip install triton"),
        ("xformers", "xformers", ("xformers",), ("xformers",), "train.attention=sdpa: torch's own", xformers),
        ("apex", "apex", ("apex",), ("apex",), "optim.name=adamw: torch's fused AdamW", BUILD),
    ]
    anywhere = [
        ("DALI", "nvidia.dali", of_dali, on, "data.loader=torch: Pillow decodes", f"pip install {dali}"),
        ("TensorBoard", "tensorboard", ("tensorboard",), ("tensorboard",), "metrics.jsonl", "pip install tensorboard"),
        (
            "submitit",
            "submitit",
            ("submitit",),
            ("imported", "submitit"),
            "ccmim submit --print",
            "pip install submitit",
        ),
    ]
    if not on_cuda:
        modules = {"triton": "triton.language", "xformers": "xformers.ops", "apex": "apex.optimizers"}
        for_cuda = [(*row[:3], ("imported", modules[row[0]]), *row[4:]) for row in for_cuda if row[0] in modules]
    return [Part(*row) for row in (*for_cuda, *anywhere)]


def examine(asked: Sequence[Part], patience: float = PATIENCE) -> list[Row]:
    """A row for each part; those that are there are tried, all at a time."""
    there = [part for part in asked if _is_there(part.module)]
    works = dict(zip(there, try_all([part.trial for part in there], patience)))
    rows = []
    for part in asked:
        said = works.get(part, "not installed")
        row = Row(part.name, _version(part.packages) if part in works else "", said, part.instead, part.install)
        if said == "yes" and part.trial[0] == "imported":
            row = row._replace(works="loads", install="")
        rows.append(row._replace(instead="", install="") if row.works == "yes" else row)
    return rows


def try_all(trials: Sequence[tuple[str, ...]], patience: float = PATIENCE) -> list[str]:
    """What each trial comes to: `yes`, or `no: ` and the reason."""
    with tempfile.TemporaryDirectory() as folder:
        errors = [open(Path(folder) / str(number), "w+b") for number in range(len(trials))]  # noqa: SIM115
        try:
            running = [_start(trial, error, folder) for trial, error in zip(trials, errors)]
            return [_outcome(process, error, patience) for process, error in zip(running, errors)]
        finally:
            for error in errors:
                error.close()


def _start(trial: tuple[str, ...], error: BinaryIO, folder: str) -> subprocess.Popen:
    # A group of its own: what hangs may have started others.
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder}
    command = [sys.executable, "-m", "ccmim_fast.commands.trials", *trial]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=error, stderr=error, env=environment, start_new_session=True
    )


def _outcome(process: subprocess.Popen, error: BinaryIO, patience: float) -> str:
    try:
        code = process.wait(timeout=patience)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"no: no answer in {patience:g} seconds"
    if code == 0:
        return "yes"
    error.seek(0)
    lines = [line for line in error.read().decode(errors="replace").splitlines() if line.strip()]
    if code < 0:
        return f"no: ended by {signal.Signals(-code).name}"
    return f"no: {lines[-1].strip()[:200] if lines else f'exit code {code}'}"


def _is_there(module: str) -> bool:
    """Whether a module is installed; its parents, which that imports, may be broken."""
    try:
        return importlib.util.find_spec(module) is not None
    except Exception:
        return importlib.util.find_spec(module.partition(".")[0]) is not None


def _version(packages: Sequence[str]) -> str:
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown version"
