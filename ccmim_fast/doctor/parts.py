"""Parts of a machine that the trainer can use: GPUs and libraries, what runs in place of each, and how to get it."""

import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata, util
from typing import NamedTuple

import torch

from ccmim_fast.doctor.trials import command_of, try_all
from ccmim_fast.optim.optimizer import BUILD

_PASCAL = "pip install torch==2.7.1 torchvision==0.22.1"  # the last with code for compute capability 6.x


class Part(NamedTuple):
    """A library that may be installed or not."""

    name: str  # in the table
    trial: tuple[str, ...]  # a function of `trials` and its argument: what the trainer does with the library
    instead: str  # what runs without it
    install: str  # the command that brings it, or how to build it
    module: str = ""  # that is looked for; "": its name
    packages: tuple[str, ...] = ()  # distributions that may bring it, and whose version is told; empty: the module's


class Row(NamedTuple):
    """A row of the table."""

    name: str
    found: str
    works: str  # `yes` (and by what), `loads` (no CUDA to try more), `not installed`, or `no: ` and the reason
    instead: str = ""
    install: str = ""
    again: str = ""  # the command that repeats a trial which failed, and prints all that it says


def gpus() -> list[Row]:
    """Return a row for torch and for each GPU that torch sees, or one that says why it sees none."""
    own, listed = Row("torch", f"{torch.__version__}, Python {sys.version.split()[0]}", "yes"), _nvidia_smi()
    if count := torch.cuda.device_count():
        return [own, *(_gpu(index, listed) for index in range(count))]
    if not listed:
        return [own, Row("GPU", "none", "not installed", "the CPU, with bf16 where it has it")]
    name, driver = listed[0]
    why = f"no: torch {torch.__version__} does not see it; its driver is too old, or CUDA_VISIBLE_DEVICES hides it"
    newer = f"a driver for CUDA {torch.version.cuda}, or a torch for the driver: https://pytorch.org/get-started"
    return [own, Row("GPU", f"{name}, driver {driver}", why, "the CPU", newer)]


def _gpu(index: int, listed: list[tuple[str, str]]) -> Row:
    properties = torch.cuda.get_device_properties(index)
    major, minor = torch.cuda.get_device_capability(index)
    what = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability {major}.{minor}"
    if listed:
        what += f", driver {listed[0][1]}"
    (works,) = try_all([("cuda", str(index))])
    if works == "yes":
        return Row(f"cuda:{index}", what, works)
    again = command_of(("cuda", str(index)))
    return Row(f"cuda:{index}", what, works, "the CPU: train.device=cpu", _PASCAL if major < 7 else "", again)


def _nvidia_smi() -> list[tuple[str, str]]:
    """Return name and driver of each GPU, as the driver's own tool has it; none where there is no driver."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = filter(str.strip, done.stdout.splitlines() if done.returncode == 0 else [])
    return [(name.strip(), driver.strip()) for name, _, driver in (line.partition(",") for line in lines)]


def parts(on_cuda: bool) -> list[Part]:
    """Return what the trainer can use, with trials for CUDA or, as far as they go, for a CPU."""
    old = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8)
    xformers = "pip install xformers" + "==0.0.31.post1" * old
    if (torch.version.cuda or "").startswith("13"):
        xformers += " nvidia-cuda-runtime-cu12"  # see models/memory_efficient.py
    # On a CPU, too: its pipeline needs no GPU, its package names a CUDA all the same.
    dali = "nvidia-dali-cuda120" if (torch.version.cuda or "").startswith("12") else "nvidia-dali-cuda130"

    def trial(name: str, module: str) -> tuple[str, ...]:
        """Return the trial of a library, which without CUDA can only be imported."""
        return (name,) if on_cuda else ("imported", module)

    compiled = Part("torch.compile", ("compiled",), "train.compile=off: eager steps", "apt install gcc", "torch")
    return [
        *([compiled] if on_cuda else []),
        Part("triton", trial("triton", "triton.language"), "train.kernels=reference: PyTorch", "pip install triton"),
        Part("xformers", trial("xformers", "xformers.ops"), "train.attention=sdpa: torch's own", xformers),
        Part("apex", trial("apex", "apex.optimizers"), "optim.name=adamw: torch's fused AdamW", BUILD),
        Part(
            "DALI",
            ("dali", "cuda" if on_cuda else "cpu"),
            "data.loader=torch: Pillow decodes",
            f"pip install {dali}",
            "nvidia.dali",
            ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
        ),
        Part("TensorBoard", ("tensorboard",), "metrics.jsonl", "pip install tensorboard", "tensorboard"),
        Part("submitit", ("submitit",), "ccmim submit --print", "pip install submitit"),
    ]


def examine(asked: Sequence[Part]) -> list[Row]:
    """Return a row for each part; those that are installed are tried, all at a time."""
    there = [part for part in asked if _is_there(part.module or part.name)]
    works = dict(zip(there, try_all([part.trial for part in there])))
    rows = []
    for part in asked:
        said = works.get(part, "not installed")
        again = command_of(part.trial) if said.startswith("no: ") else ""
        row = Row(part.name, _version(part) if part in works else "", said, part.instead, part.install, again)
        if said == "yes" and part.trial[0] == "imported":
            row = row._replace(works="loads", install="")
        rows.append(row._replace(instead="", install="") if row.works.startswith("yes") else row)
    return rows


def _is_there(module: str) -> bool:
    """Return whether a module is installed; its parents, which `find_spec` imports, may be broken."""
    try:
        return util.find_spec(module) is not None
    except Exception:
        return util.find_spec(module.partition(".")[0]) is not None


def _version(part: Part) -> str:
    for package in part.packages or (part.module or part.name,):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return "unknown version"
