"""What `ccmim doctor` runs, each in a process of its own: a library as the trainer uses it. Where it fails, it raises.

    python -m ccmim_fast.commands.trials NAME [ARGUMENT]

Nothing is imported before it is needed: a library that is broken must not end the trial of another.
"""

import importlib
import sys
import tempfile
from contextlib import closing
from pathlib import Path


def imported(module: str) -> None:
    """That is all that can be tried of a library for CUDA where there is none."""
    importlib.import_module(module)


def cuda(index: str) -> None:
    """A product of matrices on a GPU; fails where torch has no code for it."""
    import torch

    x = torch.ones(64, 64, device=f"cuda:{index}")
    _agree((x @ x).sum(), torch.tensor(64.0**3, device=x.device))


def compiled() -> None:
    """torch.compile, forward and backward, on CUDA."""
    import torch

    x = torch.randn(64, 64, device="cuda", requires_grad=True)
    torch.compile(lambda x: (x.softmax(1) @ x).square().sum())(x).backward()
    found, x.grad = x.grad, None
    (x.softmax(1) @ x).square().sum().backward()
    _agree(found, x.grad)


def triton() -> None:
    """A kernel of ours against its reference."""
    import torch

    from ccmim_kernels import gather_tokens

    tokens_BLD = torch.randn(2, 16, 64, device="cuda")
    ids_BK = torch.arange(4, device="cuda").expand(2, 4).contiguous()
    _agree(*(gather_tokens(tokens_BLD, ids_BK, kernels=kernels) for kernels in ("triton", "reference")))


def xformers() -> None:
    """Its attention against two products and a softmax."""
    import torch

    from ccmim_fast.models.block import attention

    q, k, v = torch.randn(3, 2, 50, 4, 32, device="cuda", dtype=torch.float16)
    _agree(*(attention(q, k, v, backend) for backend in ("xformers", "plain")))


def dali(device: str) -> None:
    """A batch of JPEG files, decoded and cut."""
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
    """One step of its fused AdamW."""
    import torch

    from ccmim_fast.optim.apex import apex_optimizer

    weight = torch.nn.Parameter(torch.ones(8, device="cuda"))
    weight.grad = torch.ones_like(weight)
    apex_optimizer("apex_adamw", [{"params": [weight]}], lr=0.1, betas=(0.9, 0.95)).step()
    _agree(weight.detach(), torch.full_like(weight, 0.9))


def tensorboard() -> None:
    """A figure in a file of events."""
    from torch.utils.tensorboard import SummaryWriter

    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as board:
        board.add_scalar("loss", 1.0, 1)


def submitit() -> None:
    """Nothing is submitted."""
    importlib.import_module("submitit")


def _agree(found, expected, within: float = 1e-2) -> None:
    """`within` is far above rounding, in half precision too: what is looked for is garbage."""
    error = float((found.float() - expected.float()).abs().max())
    if not error <= within:
        raise ValueError(f"its result is wrong by {error:.3g}")


_ALL = (imported, cuda, compiled, triton, xformers, dali, apex, tensorboard, submitit)

if __name__ == "__main__":
    {trial.__name__: trial for trial in _ALL}[sys.argv[1]](*sys.argv[2:])
