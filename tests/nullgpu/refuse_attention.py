"""This script tries attention backends on the null device, and tells what `check_heads` says of each."""

import torch
from nullgpu.counters import tell, without_cudnn
from tiny import tiny_config

from ccmim_fast.build.model import build_model
from ccmim_fast.engine.build import build_step
from ccmim_fast.errors import ConfigError
from ccmim_fast.models.block import attention, check_heads
from ccmim_fast.models.encoder import configure_blocks
from ccmim_fast.ranks.session import Session

HEADS = (16, 20, 64, 264)  # channels
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICE = torch.device("cuda")


def runs(name: str, channels: int, dtype: torch.dtype) -> bool:
    x_BTNH = torch.zeros(2, 50, 3, channels, device=DEVICE, dtype=dtype, requires_grad=True)
    try:
        attention(x_BTNH, x_BTNH, x_BTNH, backend=name).sum().backward()
    except RuntimeError:
        return False
    return True


def refusal(name: str, channels: int, dtype: torch.dtype) -> str:
    """Return what `check_heads` says of a model whose encoder has such heads; empty: nothing."""
    with torch.device("meta"):
        model = build_model(tiny_config(model={"embed_dim": 4 * channels, "num_heads": 4}))
    configure_blocks(model.encoder.blocks, attention=name)
    try:
        check_heads(model.encoder.blocks, DEVICE, dtype)
    except ConfigError as error:
        return str(error)
    return ""


without_cudnn()
tell(
    "backends",
    [
        [name, str(dtype), channels, runs(name, channels, dtype), refusal(name, channels, dtype)]
        for name in ("flash", "efficient", "sdpa", "plain")
        for dtype in DTYPES
        for channels in HEADS
    ],
)
try:
    build_step(tiny_config(train={"attention": "flash", "precision": "fp32", "device": "cuda"}), Session(0, 1, DEVICE))
except ConfigError as error:
    tell("a run", str(error))
tell("cudnn", refusal("cudnn", 16, torch.float32))
tell("xformers", refusal("xformers", 16, torch.float64))
