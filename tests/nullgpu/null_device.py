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
# Libraries of torch that call CUDA. A function that one of them needs and the C files lack gets an empty body.
CALLERS = ("torch_cuda", "torch_cuda_linalg", "c10_cuda", "torch_python", "caffe2_nvrtc", "torch_nvshmem")
OURS = re.compile(r"(cuda[A-Z]|cu[A-Z]|__cuda|cublas|nccl|cusolver)\w+$")


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
    if not sys.platform.startswith("linux"):
        raise BuildError(f"it is for Linux, and this is {sys.platform}")
    for tool in ("gcc", "nm"):
        if shutil.which(tool) is None:
            raise BuildError(f"no {tool} on PATH")
    torch = _package("torch")
    includes = headers(torch)
    digest = hashlib.sha256((torch / "version.py").read_bytes())
    for source in (Path(__file__), *SOURCES, *filter(Path.is_file, (HERE / "device").rglob("*"))):
        digest.update(source.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"null-device-{os.getuid()}-{digest.hexdigest()[:16]}"
    if not (folder / LIBRARY).exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        # Several test processes may build at once: each in a folder of its own, and the last one's library stays.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _compile(Path(scratch), torch, includes)
            os.replace(Path(scratch) / LIBRARY, folder / LIBRARY)
    return folder


def headers(torch: Path) -> list[Path]:
    """Return the folders of the headers of torch's own CUDA, by torch's folder; another CUDA's may stand beside them.

    Raises:
        BuildError: there are none.
    """
    version = re.search(r"^cuda\b.*= '(\d+)", (torch / "version.py").read_text(), re.MULTILINE)
    if version is None:
        raise BuildError("torch was built without CUDA")
    nvidia, major = torch.parent / "nvidia", int(version[1])
    found = [nvidia / "nccl" / "include"]
    found += [nvidia / name / "include" for name in ([f"cu{major}"] if major >= 13 else ["cuda_runtime", "cublas"])]
    for name in ("cuda.h", "cuda_runtime_api.h", "cublas_v2.h", "cublasLt.h", "nccl.h"):
        if not any((folder / name).exists() for folder in found):
            raise BuildError(f"no {name} of CUDA {major} in the wheels beside torch")
    return found


def run(
    target: str | Path | Sequence[str],
    *arguments: str,
    capability: int = 90,
    memory_gb: float = 80,
    timeout: float = 600,
    given: Any = None,
    **environment: str,
) -> Result:
    """Run code (a string), a script (a path) or the interpreter's arguments (a list) in a process with a null device.

    Skips the test, with the reason, where the device cannot be built.

    Args:
        capability: ten times the compute capability: 61, 75, 80, 90, 100.
        memory_gb: in units of 1e9 bytes.
        timeout: seconds; whoever is over it is killed, and `subprocess.TimeoutExpired` raised.
        given: what the process reads on its standard input, as JSON.
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
            input=json.dumps(given),
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


def _compile(folder: Path, torch: Path, headers: list[Path]) -> None:
    rest = folder / "rest.c"
    rest.write_text(_empty_bodies(torch))
    # The headers include some that the wheels lack: ours stand in for those, and are looked up last.
    includes = [f"-I{path}" for path in (HERE / "device", *headers)] + [f"-idirafter{HERE / 'device' / 'stand_in'}"]
    flags = ["-O1", "-shared", "-fPIC", "-fvisibility=hidden", f"-Wl,-soname,{LIBRARY}", "-o", str(folder / LIBRARY)]
    command = ["gcc", *flags, *includes, *map(str, SOURCES), str(rest), "-ldl", "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError("gcc: " + next((line for line in done.stderr.splitlines() if "error" in line), "failed"))


def _empty_bodies(torch: Path) -> str:
    """Return C for all functions of CUDA that torch and Triton look up: counted, they succeed.

    They are weak: the device's own take their place.
    """
    wanted: set[str] = set()
    for name in CALLERS:
        library = torch / "lib" / f"lib{name}.so"
        if library.exists():
            listed = subprocess.check_output(["nm", "-D", "--undefined-only", library], text=True)
            wanted |= {line.split()[-1].partition("@")[0] for line in listed.splitlines()}
    for driver in torch.parent.glob("triton/backends/nvidia/driver.c"):
        wanted |= set(re.findall(r"\b(cu[A-Z]\w+)\s*\(", driver.read_text()))
    wanted = {name for name in wanted if OURS.match(name) and not name.startswith("cuFile")}
    head = 'void count(const char *, const char *, double);\n#define API __attribute__((weak, visibility("default")))\n'
    body = 'API long {0}(void) {{ count("empty", "{0}", 0); return 0; }}\n'
    return head + "".join(body.format(name) for name in sorted(wanted))
