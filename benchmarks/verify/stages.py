"""The stages of `make verify-gpu` in order: what each asks, the command that answers, and how long it may take."""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
PYTEST = (PYTHON, "-m", "pytest", "-p", "no:cacheprovider")
SMALL = (
    "(same_partition or equals_reference or gradients or test_kernel or gold) and not 2048"  # of every op, in seconds
)
OURS = ("ccmim-bank", "ccmim-first", "mae-2", "mae-8")
PEERS = tuple(name for name in ("transformers", "lightly") if importlib.util.find_spec(name))
BRIEF = ("--width=384", "--rounds=2", "--no-tests", "--out={out}")
# Attention by name: the null device of the tests has no cuDNN, which torch would take from compute capability 9.0 on.
NARROW = ("--arch=vit_tiny_patch16_224", "--image-size=64", "--model.depth=2", "--train.compile=off")
NARROW += ("--train.attention=flash",)
CANNOT = 3  # exit status of a script that cannot answer on this machine


@dataclass(frozen=True)
class Stage:
    """One question about the GPU path.

    Attributes:
        question: which the report answers.
        command: `{out}` in it is a path for results, without a suffix; exit status 0 passes, `CANNOT` is told.
        limit: minutes after which it is stopped.
        dry: what runs in its place where the device computes nothing; None: `command` itself.
        needs: a program that must be on PATH, or a module that must be installed.
        environment: variables of its own.
    """

    name: str
    question: str
    command: tuple[str, ...]
    limit: float
    dry: tuple[str, ...] | None = None
    needs: str = ""
    environment: tuple[tuple[str, str], ...] = ()


def bench(name: str, *options: str) -> tuple[str, ...]:
    return (PYTHON, "-m", "ccmim_fast.cli", "bench", name, "--device", "cuda", *options)


def script(name: str, *options: str) -> tuple[str, ...]:
    return (PYTHON, str(BENCHMARKS / "verify" / f"{name}.py"), *options)


def kernel_tests(*options: str) -> tuple[str, ...]:
    return (str(BENCHMARKS / "verify" / "kernel_tests.py"), "-k", SMALL, *options)


def sanitizer(tool: str) -> Stage:
    """compute-sanitizer, of the CUDA toolkit, over the small tests of the kernels."""
    return Stage(
        tool,
        f"does compute-sanitizer's {tool} find nothing in the kernels?",
        ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", PYTHON, *kernel_tests()),
        3,
        dry=(PYTHON, *kernel_tests("--collect-only")),
        needs="compute-sanitizer",
        environment=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
    )


# Correct first; then speed; what needs tools of the CUDA toolkit, or takes long, last.
STAGES = (
    Stage("doctor", "what is there, and does each part work?", (PYTHON, "-m", "ccmim_fast.cli", "doctor"), 2),
    Stage(
        "suite",
        "do all tests pass on CUDA that touch it?",
        (*PYTEST, "-m", "gpu and not slow"),
        6,
        dry=(*PYTEST, "--collect-only", "-m", "gpu"),
    ),
    Stage(
        "curve",
        "does a short training give the CPU's losses?",
        script("curve"),
        3,
        dry=script("curve", "--only-run", "--steps=4"),
    ),
    Stage(
        "attention",
        "which attention is fastest at our lengths?",
        bench("attention", "--dtype=bf16", "--out={out}"),
        1,
        dry=bench("attention", "--dtype=bf16", "--shapes=1", "--rounds=1", "--out={out}"),
    ),
    Stage(
        "ops",
        "how far is each kernel from its floor, and from PyTorch?",
        bench("ops", "--batch=128", "1024", "--width=768", "--rounds=20", "--out={out}"),
        5,
        dry=bench("ops", "--device=cpu", "--kernels=reference", "--op=gather_tokens", "--batch=2", *BRIEF),
    ),
    Stage(
        "throughput",
        "how fast is a whole step, beside those of others?",
        bench("throughput", "--seconds=12", "--rounds=3", "--only", *OURS, *PEERS, "--out={out}"),
        12,
        dry=bench(
            "throughput", "--seconds=1", "--rounds=1", "--batch=2", *NARROW, "--only", "ccmim-first", "--out={out}"
        ),
    ),
    Stage("peaks", "is the peak of memory the predicted one?", script("peaks"), 2, dry=script("peaks", "--only-run")),
    Stage(
        "dali",
        "does DALI decode on the GPU, and how fast?",
        (PYTHON, "-m", "ccmim_fast.cli", "bench", "data", "--device=cuda", "--rounds=3", "--out={out}"),
        3,
        dry=(PYTHON, "-m", "ccmim_fast.cli", "bench", "data", "--images=16", "--batch=8", "--rounds=1", "--out={out}"),
    ),
    Stage(
        "traffic", "does divide_tokens read its tokens once?", script("traffic"), 1, dry=script("traffic"), needs="ncu"
    ),
    Stage(
        "gsan",
        "does Triton's own sanitizer find no race in the kernels?",
        (PYTHON, "-m", "triton.tools.gsan", *kernel_tests()),
        3,
        dry=(PYTHON, *kernel_tests("--collect-only")),
        needs="triton.tools.gsan",
    ),
    sanitizer("memcheck"),
    sanitizer("racecheck"),
)
