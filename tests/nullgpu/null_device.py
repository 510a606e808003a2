"""This module builds the null device, a CUDA device that computes nothing, and runs Python in a process that has one.

    result = run("import torch; from nullgpu.counters import tell; tell('name', torch.cuda.get_device_name())")
    result.told["name"]    # "Null GPU sm_90"

README.md in this folder says what the device does, what it proves, and which environment variables it reads.
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCES = sorted((HERE / "device").glob("*.c"))
LIBRARY = "libcuda.so.1"
# Libraries of torch that call CUDA. A function that one of them needs and the C files do not define gets an empty body.
CALLERS = ("torch_cuda", "torch_cuda_linalg", "c10_cuda", "torch_python", "caffe2_nvrtc", "torch_nvshmem")
OURS = re.compile(r"(cuda[A-Z]|cu[A-Z]|__cuda|cublas|nccl|cusolver)\w+$")
DEFINED = re.compile(r"^API [^=;(]*?(\w+)\(", re.MULTILINE)


class BuildError(Exception):
    """Raised with the reason where this machine cannot build the null device."""


class Result(NamedTuple):
    """The end of a process: its exit code, what it printed, and what it told by `counters.tell`, by name."""

    code: int
    out: str
    err: str
    told: dict[str, Any]


def build() -> Path:
    """Compile the null device, once for these sources and this torch; returns the folder of its library.

    Raises:
        BuildError: a compiler, the headers or a torch with CUDA is missing here.
    """
    for tool in ("gcc", "nm"):
        if shutil.which(tool) is None:
            raise BuildError(f"no {tool} on PATH")
    torch = _package("torch")
    headers = _headers(torch.parent / "nvidia")
    digest = hashlib.sha256((torch / "version.py").read_bytes())
    for source in (Path(__file__), *SOURCES, *(HERE / "device").rglob("*.h")):
        digest.update(source.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"null-device-{os.getuid()}-{digest.hexdigest()[:16]}"
    if not (folder / LIBRARY).exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        # Several test processes may build at once: each in a folder of its own, and the last one's library stays.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _compile(Path(scratch), torch, headers)
            os.replace(Path(scratch) / LIBRARY, folder / LIBRARY)
    return folder


def run(
    target: str | Path | Sequence[str],
    *arguments: str,
    capability: int = 90,
    memory_gb: float = 80,
    timeout: float = 600,
    **environment: str,
) -> Result:
    """Run code (a string), a script (a path) or the interpreter's arguments (a list) in a process with a null device.

    Skips the test, with the reason, where the device cannot be built.

    Args:
        capability: ten times the compute capability: 61, 75, 80, 90, 100.
        memory_gb: in units of 1e9 bytes.
        timeout: seconds; whoever is over it is killed, and `subprocess.TimeoutExpired` raised.
        environment: more variables of the process.
    """
    try:
        folder = build()
    except BuildError as reason:
        pytest.skip(f"no null device: {reason}")
    command = ["-c", target] if isinstance(target, str) else [str(target)] if isinstance(target, Path) else [*target]
    with tempfile.TemporaryDirectory() as scratch:
        told = Path(scratch) / "told.jsonl"
        variables = _environment(folder, capability, memory_gb) | {"NULL_DEVICE_TELLS": str(told)} | environment
        ended = subprocess.run(
            [sys.executable, *command, *arguments],
            env=variables,
            cwd=ROOT,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
        )
        lines = told.read_text().splitlines() if told.exists() else []
    return Result(ended.returncode, ended.stdout, ended.stderr, dict(json.loads(line) for line in lines))


def end_of(result: Result) -> str:
    """Return the last lines on the process's standard error, for a message."""
    return f"exit code {result.code}\n" + "\n".join(result.err.splitlines()[-25:])


def _environment(folder: Path, capability: int, memory_gb: float) -> dict[str, str]:
    # Kernels are compiled for the device, not interpreted.
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [ROOT, ROOT / "kernels", ROOT / "tests", ROOT / "benchmarks"]
    return inherited | {
        "LD_PRELOAD": str(folder / LIBRARY),
        "TRITON_LIBCUDA_PATH": str(folder),
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "OMP_NUM_THREADS": "1",
        "NULLCUDA_CC": str(capability),
        "NULLCUDA_MB": str(int(memory_gb * 1e9) >> 20),
    }


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise BuildError(f"{name} is not installed")
    return Path(spec.submodule_search_locations[0])


def _headers(nvidia: Path) -> list[Path]:
    """Return the folders of the CUDA headers: one of CUDA 13's wheels; one per library of those of CUDA 12."""
    found = []
    for name in ("cuda.h", "cuda_runtime_api.h", "cublas_v2.h", "cublasLt.h", "nccl.h"):
        headers = sorted(nvidia.glob(f"*/include/{name}"))
        if not headers:
            raise BuildError(f"no {name} in the wheels beside torch: it is built without CUDA, or with another CUDA")
        found.append(headers[-1].parent)
    return list(dict.fromkeys(found))


def _compile(folder: Path, torch: Path, headers: list[Path]) -> None:
    rest = folder / "rest.c"
    rest.write_text(_empty_bodies(torch))
    # The headers ask for crt/host_defines.h, which the wheels of CUDA 13 do not have: ours is looked up last.
    includes = [f"-I{path}" for path in (HERE / "device", *headers)] + [f"-idirafter{HERE / 'device' / 'stand_in'}"]
    flags = ["-O1", "-shared", "-fPIC", "-fvisibility=hidden", f"-Wl,-soname,{LIBRARY}", "-o", str(folder / LIBRARY)]
    command = ["gcc", *flags, *includes, *map(str, SOURCES), str(rest), "-ldl", "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError("gcc: " + next((line for line in done.stderr.splitlines() if "error" in line), "failed"))


def _empty_bodies(torch: Path) -> str:
    """Return C for all functions of CUDA that torch and Triton look up and the device lacks: counted, they succeed."""
    wanted: set[str] = set()
    for name in CALLERS:
        library = torch / "lib" / f"lib{name}.so"
        if library.exists():
            listed = subprocess.check_output(["nm", "-D", "--undefined-only", library], text=True)
            wanted |= {line.split()[-1].partition("@")[0] for line in listed.splitlines()}
    if not any(name.startswith("cuda") for name in wanted):
        raise BuildError("torch was built without CUDA")
    for driver in torch.parent.glob("triton/backends/nvidia/driver.c"):
        wanted |= set(re.findall(r"\b(cu[A-Z]\w+)\s*\(", driver.read_text()))
    have = {name for source in SOURCES for name in DEFINED.findall(source.read_text())}
    rest = sorted(name for name in wanted - have if OURS.match(name) and not name.startswith("cuFile"))
    body = 'API long {0}(void) {{ count("empty", "{0}", 0); return 0; }}\n'
    head = '#define API __attribute__((visibility("default")))\nvoid count(const char *, const char *, double);\n'
    return head + "".join(body.format(name) for name in rest)
