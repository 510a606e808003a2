"""What this machine has, what runs by the next best, and the line that installs more."""

import importlib.metadata
import importlib.util

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ccmim_fast.trainer.distributed import session
from ccmim_fast.trainer.precision import choose_precision

# Distribution, what goes on without it, how to get it.
_OPTIONAL = (
    ("nvidia-dali-cuda130", "images are decoded by Pillow", "pip install nvidia-dali-cuda130"),
    ("nvidia-dali-cuda120", "images are decoded by Pillow", "pip install nvidia-dali-cuda120"),
    ("triton", "train.kernels=triton cannot be had: ops run as plain PyTorch", "comes with torch on Linux"),
)


def print_report() -> None:
    """Print one table: part, what was found, what follows."""
    table = Table("part", "found", "what follows")
    table.add_row("torch", torch.__version__, "")
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        table.add_row(f"cuda:{index}", torch.cuda.get_device_name(index), f"compute {major}.{minor}, {memory:.0f} GiB")
    with session("auto") as here:
        precision = choose_precision("auto", here.device)
        table.add_row("device", str(here.device), f"precision auto = {precision.name}")
    for name, without, install in _OPTIONAL:
        try:
            table.add_row(name, importlib.metadata.version(name), "")
        except importlib.metadata.PackageNotFoundError:
            table.add_row(name, "not installed", escape(f"{without}; {install}"))
    Console().print(table)
