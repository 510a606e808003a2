"""Trials of libraries: each does what the trainer does with a library, and raises where that fails.

    python -m ccmim_fast.doctor.trials NAME [ARGUMENT]

A trial has a process of its own, as a library that was built for another torch may crash or hang. Nothing is imported
before it is needed: a library that is broken must not end the trial of another.
"""

import importlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from ccmim_fast.errors import one_line

_SAYS = "trial: "  # before what a trial returned, on its standard output
PATIENCE = 120  # seconds for a trial; torch.compile takes 20 to 60 of them

_ADVICE = "Set TORCHDYNAMO_VERBOSE=1"  # how torch.compile ends each of its errors


def imported(module: str) -> None:
    """Import a module, which is all that can be tried of a library for CUDA where there is none."""
    importlib.import_module(module)


def cuda(index: str) -> None:
    """Multiply matrices on a GPU; fails where torch has no code for it."""
    import torch

    x = torch.ones(64, 64, device=f"cuda:{index}")
    _agree((x @ x).sum(), torch.tensor(64.0**3, device=x.device))


def compiled() -> None:
    """Run torch.compile, forward and backward, on CUDA."""
    import torch

    x = torch.randn(64, 64, device="cuda", requires_grad=True)
    torch.compile(lambda x: (x.softmax(1) @ x).square().sum())(x).backward()
    found, x.grad = x.grad, None
    (x.softmax(1) @ x).square().sum().backward()
    _agree(found, x.grad)


def triton() -> None:
    """Compare a kernel of ours with its reference."""
    import torch

    from ccmim_kernels import gather_tokens

    tokens_BLD = torch.randn(2, 16, 64, device="cuda")
    ids_BK = torch.arange(4, device="cuda").expand(2, 4).contiguous()
    _agree(*(gather_tokens(tokens_BLD, ids_BK, kernels=kernels) for kernels in ("triton", "reference")))


def xformers() -> str:
    """Compare its attention and its gradient with two products and a softmax; returns the operators of both passes."""
    import torch

    from ccmim_fast.models.block import attention
    from ccmim_fast.models.memory_efficient import operators

    inputs = torch.randn(3, 2, 50, 4, 32, device="cuda", dtype=torch.float16).requires_grad_()
    found, expected = (attention(*inputs.unbind(), backend=backend) for backend in ("xformers", "plain"))
    _agree(found.detach(), expected.detach())
    _agree(*(torch.autograd.grad(out, inputs, torch.ones_like(out))[0] for out in (found, expected)))
    return " and ".join(operators(*inputs.detach().unbind()))


def dali(device: str) -> None:
    """Decode and cut a batch of JPEG files."""
    import torch
    from PIL import Image

    from ccmim_fast.config.schema import DataConfig
    from ccmim_fast.data.build import build_loader
    from ccmim_fast.data.index.indexed import open_images

    with tempfile.TemporaryDirectory() as folder:
        for number in range(4):
            Image.new("RGB", (64, 48), (60 * number, 0, 0)).save(Path(folder) / f"{number}.jpg", quality=95)
        source = open_images(folder, 3, str(Path(folder) / "index"))
        data = DataConfig(loader="dali", image_size=(32, 32), workers=1)
        with closing(build_loader(source, data, 0, 4, device=device).stream(0)) as stream:
            batch = next(stream)
    _agree(batch.images_BHWC[:, 0, 0, 0].float(), 60 * batch.ids_B.float(), within=2.0)
    if batch.images_BHWC.dtype != torch.uint8:
        raise ValueError(f"its images are {batch.images_BHWC.dtype}")


def apex() -> None:
    """Take one step of its fused AdamW."""
    import torch

    from ccmim_fast.optim.optimizer import apex_optimizer

    weight = torch.nn.Parameter(torch.ones(8, device="cuda"))
    weight.grad = torch.ones_like(weight)
    apex_optimizer("apex_adamw", [{"params": [weight]}], lr=0.1, betas=(0.9, 0.95)).step()
    _agree(weight.detach(), torch.full_like(weight, 0.9))


def tensorboard() -> None:
    """Write a figure into a file of events."""
    from torch.utils.tensorboard import SummaryWriter

    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as board:
        board.add_scalar("loss", 1.0, 1)


def submitit() -> None:
    """Import submitit; nothing is submitted."""
    importlib.import_module("submitit")


def _agree(found, expected, within: float = 1e-2) -> None:
    """Raise where the largest difference exceeds `within`, which is far above rounding, in half precision too."""
    error = float((found.float() - expected.float()).abs().max())
    if not error <= within:
        raise ValueError(f"its result is wrong by {error:.3g}")


def try_all(trials: Sequence[tuple[str, ...]]) -> list[str]:
    """Run trials, each the words behind `python -m ccmim_fast.doctor.trials`, at the same time.

    Returns for each `yes` (and what the trial returned), or `no: ` and the reason.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(number) for number in range(len(trials))]
        running = [_start(trial, output) for trial, output in zip(trials, outputs)]
        return [_outcome(process, output) for process, output in zip(running, outputs)]


def command_of(trial: Sequence[str]) -> str:
    """Return the command that repeats a trial and prints all that it says."""
    return " ".join(["python -m", __name__, *trial])


def _start(trial: tuple[str, ...], output: Path) -> subprocess.Popen:
    folder = str(output.parent)
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder}
    command = [sys.executable, "-m", __name__, *trial]
    with output.open("wb") as file:
        # A group of its own: what hangs may have started others.
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, start_new_session=True
        )


def _outcome(process: subprocess.Popen, output: Path) -> str:
    try:
        code = process.wait(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"no: no answer in {PATIENCE:g} seconds"
    if code < 0:
        return f"no: ended by {signal.Signals(-code).name}"
    said = output.read_text(encoding="utf-8", errors="replace")
    if code == 0:
        lines = said.splitlines()
        return ", by ".join(["yes", *(line.removeprefix(_SAYS) for line in lines if line.startswith(_SAYS))])
    return f"no: {_cause(said) or f'exit code {code}'}"


def _cause(said: str) -> str:
    """Return on one line what a failed trial says last: its error, whose message may have several lines."""
    lines = [line for line in said.splitlines() if line.strip() and not line.startswith(_ADVICE)]
    # The frames of a traceback are indented, and an error that quotes another ends with that one's.
    in_frames = [number for number, line in enumerate(lines) if line.startswith(" ")]
    of_error = lines[in_frames[-1] + 1 :] if in_frames and "Traceback (most recent call last):" in lines else []
    return one_line("\n".join(of_error or lines[-1:]))


if __name__ == "__main__":
    if said := globals()[sys.argv[1]](*sys.argv[2:]):
        print(f"{_SAYS}{said}")
