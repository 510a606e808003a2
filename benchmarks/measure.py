"""Measures one contender in a process of its own: speed, peak memory, arithmetic and losses.

`measure(job)` starts the process, which is this file as a script: JSON in and JSON out. Where the job is another
commit's, the script is that commit's.
"""

# B batch, H height, W width, C channels

import functools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import contenders
import torch

from ccmim_fast.errors import CcmimError, MachineError
from ccmim_fast.models.precision import choose_precision
from ccmim_fast.profile.meter import flop_counter, measure_matmul_rate, synchronise

ROOT = Path(__file__).resolve().parents[1]
# Steps before the clock starts: the first one makes the optimizer's state (and compiles). On a CPU malloc learns there
# which sizes to keep (200,000 page faults a step at first, none in the third, ViT-B); on CUDA the clocks settle.
WARM_UP = {"cpu": 2, "cuda": 3}
SMALL = 2  # images of the step whose arithmetic is counted; BatchNorm needs two


class Job(NamedTuple):
    """What to measure.

    Attributes:
        settings, without, peer: of the contender, see `contenders.Contender`.
        precision: fp32, bf16 or fp16.
        threads: on a CPU.
        seconds: how long to measure, in whole steps, at least one; where `steps` is 0.
        steps: how many steps to measure.
        count: count the arithmetic too.
        form: keyword arguments of the peer, see `forms.best`.
        root: of the checkout whose step it is; empty: this one.
    """

    settings: list[str]
    peer: str
    arch: str
    batch: int
    image_size: int
    device: str
    precision: str
    threads: int
    seconds: float
    steps: int = 0
    count: bool = True
    without: list[str] = []  # noqa: RUF012 (never changed)
    form: dict[str, str] = {}  # noqa: RUF012
    root: str = ""


class Figures(NamedTuple):
    """Of one process.

    Attributes:
        images_per_second: over the measured steps.
        peak_bytes: the most memory beyond that before the model was built: allocated on CUDA, resident on a CPU.
        flops_per_image: of one training step; None where it was not counted.
        matmul_flops: FLOP/s of large matmuls in this precision, on this device.
        losses: of every step, the steps before the clock included.
    """

    images_per_second: float
    peak_bytes: int
    flops_per_image: float | None
    matmul_flops: float
    losses: list[float]


def measure(job: Job) -> Figures | str:
    """The figures of a process that runs `job`, or one line that says why there are none.

    Raises:
        CcmimError: the job itself is a mistake.
    """
    said = in_own_process(Path(__file__).name, job)
    if isinstance(said, str):
        return said
    figures = Figures(**{name: said[name] for name in Figures._fields})
    return figures if all(map(math.isfinite, figures.losses)) else f"its loss is {figures.losses[-1]}"


def in_own_process(script: str, job: Job) -> dict | str:
    """What `script` of the job's benchmarks/ answers, or one line that says why there is no answer.

    Raises:
        CcmimError: the job itself is a mistake; another commit's may not know a setting, which is a line.
    """
    root = Path(job.root or ROOT)
    told = {name: value for name, value in job._asdict().items() if name in fields_of(root) and name != "root"}
    done = subprocess.run(
        [sys.executable, root / "benchmarks" / script],
        input=json.dumps(told),
        env={**environment_of(root), "OMP_NUM_THREADS": str(job.threads)},
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    said = (done.stderr.strip().splitlines() or ["no message"])[-1]
    for mistake in CcmimError.__subclasses__():
        if done.returncode == mistake.exit_code and not job.root:
            raise mistake(said)
    return said if done.returncode > 0 else f"killed by signal {-done.returncode}; 9 is what too little memory ends in"


@functools.cache
def fields_of(root: Path) -> tuple[str, ...]:
    """What the jobs of the checkout `root` know.

    Raises:
        MachineError: the checkout needs a package that is not installed, or cannot be imported for another reason.
    """
    if root == ROOT:
        return Job._fields
    code = "import measure; print(*measure.Job._fields)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root / "benchmarks",
        env=environment_of(root),
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return tuple(done.stdout.splitlines()[-1].split())
    said = (done.stderr.strip().splitlines() or ["no message"])[-1]
    missing = re.search(r"No module named '(\w+)", said)
    what = f"needs {missing[1]}, which is not installed; pip install {missing[1]}" if missing else f"fails: {said}"
    raise MachineError(f"@{root.name[:12]}: that commit {what}")


def environment_of(root: Path) -> dict[str, str]:
    """The variables of a process that imports what lies in the checkout `root`."""
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    # Choices that were measured are kept by device and shape: those of another commit are others.
    kept = {} if root == ROOT else {"XDG_CACHE_HOME": str(root / ".cache")}
    return {**os.environ, **kept, "PYTHONPATH": path}


def run(job: Job) -> Figures:
    """The figures of `job`, measured in this process."""
    device = torch.device(job.device)
    torch.set_num_threads(job.threads)
    dtype = choose_precision(job.precision, device).dtype
    rate = measure_matmul_rate(device, dtype)
    # Loaded here: what a peer's libraries take is no part of its model.
    build = (
        functools.partial(contenders.load_peer(job.peer), **job.form)
        if job.peer
        else functools.partial(contenders.ours, job.settings, savings_off=job.without)
    )
    images_BHWC = random_images(job.batch, job.image_size, device)
    before = _start_of_memory(device)
    torch.manual_seed(0)
    step = build(job.arch, images_BHWC, job.precision)
    losses = [step() for _ in range(WARM_UP[device.type])]
    elapsed, timed = _timed(step, job, device)
    peak = _peak_memory(device) - before
    losses = torch.stack(losses + timed).tolist()
    del step  # before another model is built
    flops = _count(build, job, device) if job.count else None
    return Figures(len(timed) * job.batch / elapsed, peak, flops, rate, losses)


def random_images(count: int, side: int, device: torch.device) -> torch.Tensor:
    """[B, H, W, C] uint8, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator).to(device)


def _timed(step: contenders.Step, job: Job, device: torch.device) -> tuple[float, list[torch.Tensor]]:
    """Seconds that the measured steps took, and their losses. On CUDA nothing waits for the device in between."""
    count = job.steps
    if not count and device.type == "cuda":
        pace, _ = _take(step, 1, device)
        count = max(1, round(job.seconds / pace))
    if count:
        return _take(step, count, device)
    losses, start = [], time.perf_counter()
    while not losses or time.perf_counter() - start < job.seconds:
        losses.append(step())
    return time.perf_counter() - start, losses


def _take(step: contenders.Step, count: int, device: torch.device) -> tuple[float, list[torch.Tensor]]:
    synchronise(device)
    start = time.perf_counter()
    losses = [step() for _ in range(count)]
    synchronise(device)
    return time.perf_counter() - start, losses


def _count(build, job: Job, device: torch.device) -> float:
    """FLOPs per image of one step; compiled code is run as it was written, for the counter sees no fused kernels."""
    step = build(job.arch, random_images(SMALL, job.image_size, device), job.precision)
    with torch.compiler.set_stance("force_eager"), flop_counter() as counter:
        step()
    return counter.get_total_flops() / SMALL


def _start_of_memory(device: torch.device) -> int:
    """Bytes in use now; the peak starts anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM to the memory in use
    return _kernel_says("VmRSS")


def _peak_memory(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _kernel_says("VmHWM")


def _kernel_says(field: str) -> int:
    """Bytes, from Linux's account of this process."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024


def answer(compute: Callable[[Job], NamedTuple]) -> int:
    """Print what `compute` makes of the job on standard input, as JSON; a failure is the last line on stderr."""
    try:
        result = compute(Job(**json.load(sys.stdin)))
    except CcmimError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except torch.OutOfMemoryError:
        print("out of memory", file=sys.stderr)
        return 1
    print(json.dumps(result._asdict()))
    return 0


if __name__ == "__main__":
    sys.exit(answer(run))
