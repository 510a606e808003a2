"""This file builds the training step and the score bank of a run from its configuration."""

import ctypes
import socket
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ccmim_fast.bank.bank import ScoreBank, own_maps
from ccmim_fast.bank.stores import choose_store, open_store
from ccmim_fast.build.model import build_model, build_objective
from ccmim_fast.config.schema import Config
from ccmim_fast.data.source import Source
from ccmim_fast.data.stream.plan import Plan
from ccmim_fast.engine.compile import GraphedStep, choose_compile, compile_step, warm_up
from ccmim_fast.engine.step import TrainStep
from ccmim_fast.engine.teacher import check_int8
from ccmim_fast.errors import ConfigError, DataError
from ccmim_fast.models import memory_efficient
from ccmim_fast.models.block import ViTBlock, check_attention, check_heads
from ccmim_fast.models.ccmim import CCMIM
from ccmim_fast.models.precision import choose_precision
from ccmim_fast.optim.ema import build_ema
from ccmim_fast.optim.optimizer import build_optimizer
from ccmim_fast.optim.update import scaled_lr
from ccmim_fast.ranks.fsdp import is_sharded, shard
from ccmim_fast.ranks.session import Session, backend_timeout, broadcast, node_count
from ccmim_fast.registry import SCORE_SOURCES
from ccmim_kernels import check_triton

_MALLOC_TRIM_THRESHOLD, _MALLOC_MMAP_MAX = -1, -4  # parameters of glibc's mallopt(3)


def check_device(config: Config, here: Session, looks: bool = False) -> None:
    """Return if this device can run what `config.train` asks for; `looks`: one rank at times runs the model alone.

    Raises ConfigError or MachineError: one line that names the setting and what to use instead.
    """
    check_attention(config.train.attention, here.device)
    check_int8(config, here.device, is_divided(config, here))
    if config.train.kernels == "triton":
        try:
            check_triton(here.device)
        except ValueError as error:
            raise ConfigError(f"train.{error}") from None
    for key in ("cuda_graph", "find_batch"):
        if getattr(config.train, key) and here.device.type != "cuda":
            raise ConfigError(f"train.{key}=true needs CUDA, got {here.device.type}; use train.{key}=false")
    if config.train.cuda_graph and here.world_size > 1:
        raise ConfigError(f"train.cuda_graph=true: one process only, got {here.world_size}; use train.cuda_graph=false")
    if is_divided(config, here):
        _check_divided(config, here, looks)
    if config.train.compile in ("blocks", "step") and here.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(here.device)
        if major < 7:
            raise ConfigError(
                f"train.compile={config.train.compile}: needs compute capability 7.0, got {major}.{minor}; use off"
            )


def _check_divided(config: Config, here: Session, looks: bool) -> None:
    if looks:
        raise ConfigError("train.parallel=fsdp: no rank can look at the model alone; use train.parallel=ddp")
    if choose_precision(config.train.precision, here.device).scaled:
        raise ConfigError("train.parallel=fsdp: has no loss scaling, which fp16 needs; use bf16, fp32, or parallel=ddp")
    if config.optim.name != "adamw":
        raise ConfigError(f"train.parallel=fsdp: optim.name={config.optim.name} knows no divided weights; use adamw")
    if config.train.compile == "step":
        raise ConfigError("train.parallel=fsdp: train.compile=step makes one graph of all blocks; use blocks")


def check_images(source: Source, here: Session) -> None:
    """Raise DataError unless this rank has the images of the first: machines may have copies. All ranks call it."""
    fingerprint, count = broadcast((source.fingerprint, len(source)))
    if fingerprint != source.fingerprint:
        raise DataError(
            f"rank {here.rank} on {socket.gethostname()} has other images than rank 0 ({len(source)}, there {count}); "
            "data.root must hold the same files on all machines, and data.index be of them"
        )


def keep_freed_memory() -> bool:
    """Let the C library keep what a CPU step frees, for the next one; returns whether it is glibc and agreed.

    By default each large tensor is mapped and unmapped: 150,000 to 200,000 page faults in a ViT-B step of 16 images.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # The limit is an int, in bytes.
    return bool(mallopt and mallopt(_MALLOC_MMAP_MAX, 0) and mallopt(_MALLOC_TRIM_THRESHOLD, 2**31 - 1))


def check_model(config: Config) -> None:
    """Refuse sizes that do not fit each other before anything is read: the model is built without memory."""
    with torch.device("meta"):
        build_model(config)


def build_step(config: Config, here: Session) -> TrainStep:
    """Build the eager step on this rank's device, its initial weights from `config.seed`.

    Raises ConfigError for sizes that do not fit each other, or that the attention backend has no kernel for.
    """
    if here.device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(config.seed)
    if config.train.attention == "xformers":
        memory_efficient.load()
    model = build_model(config).to(here.device).train()
    precision = choose_precision(config.train.precision, here.device)
    _check_blocks(config, model)
    check_heads([*model.encoder.blocks, *model.decoder.blocks], here.device, precision.dtype or torch.float32)
    ema = build_ema(model, config.optim.ema_decay)
    if is_divided(config, here):
        # The layer norm of a CPU takes weights of its input's type alone; CUDA's autocast turns them into float32.
        gathered_in = precision.dtype if here.device.type == "cuda" else None
        for one in (model, *(() if ema is None else (ema.module,))):
            shard(one, here, gathered_in)
    optimizer = build_optimizer(
        config.optim.name,
        model,
        lr=scaled_lr(config.optim.base_lr, config.train.batch_size),
        weight_decay=config.optim.weight_decay,
        betas=config.optim.betas,
        decay_tokens=config.optim.decay_tokens,
        capturable=config.train.cuda_graph,
    )
    return TrainStep(model, _wrapped(model, here), build_objective(config, model), optimizer, precision, config, ema)


def _check_blocks(config: Config, model: CCMIM) -> None:
    """Refuse settings of our blocks where an encoder has timm's own (parallel, post-norm, ...), which have none."""
    others = [type(block).__name__ for block in model.encoder.blocks if not isinstance(block, ViTBlock)]
    for key, plain in (("attention", ("auto", "sdpa")), ("recompute", (False,))):
        value = getattr(config.train, key)
        if others and value not in plain:
            shown = str(value).lower()
            raise ConfigError(
                f"train.{key}={shown}: {config.model.arch} has timm's {others[0]}, which knows none; leave it out"
            )


def is_divided(config: Config, here: Session) -> bool:
    """Return whether ranks share the weights among them; a process alone has them all."""
    return config.train.parallel == "fsdp" and here.world_size > 1


def has_bank(config: Config) -> bool:
    """Return whether the run keeps its scores in a bank."""
    return SCORE_SOURCES[config.score.source].has_bank and config.mask.strategy.startswith("importance")


def choose_shards(config: Config) -> int:
    """Return how many parts of the images have ranks of their own: `score.shards`; for 0 one per node with a bank."""
    return config.score.shards or (node_count() if has_bank(config) else 1)


def build_bank(config: Config, plan: Plan, here: Session, folder: Path) -> ScoreBank | None:
    """Build the empty score bank of this rank, None where the run has none; raises as choosing and opening a store."""
    if not has_bank(config):
        return None
    maps, cells, score = own_maps(plan), config.score.grid, config.score
    store = choose_store(score.store, maps, cells, score.device_gb, score.host_gb)
    opened = open_store(store, maps, cells, here.device, folder / f"scores_{here.rank}.bin")
    return ScoreBank(plan, opened, here.device, backend_timeout(config.watch.timeout))


def prepare_step(step: TrainStep, micro_batch: int, what: str = "") -> TrainStep | GraphedStep:
    """Compile `what`, and warm up, and capture as `train.cuda_graph` says; a checkpoint is loaded afterwards.

    `what` is `off`, `blocks` or `step`; empty: what `train.compile` comes to without a measurement.
    """
    train = step.config.train
    what = what or choose_compile(train.compile, step.device, divided=is_sharded(step.model))
    compile_step(step, what, train.compile_mode)
    if train.cuda_graph:
        # A graph is captured with warm caches and the optimizer's state in its place; three steps, on a stream of their
        # own, as torch advises.
        stream, current = torch.cuda.Stream(step.device), torch.cuda.current_stream(step.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            warm_up(step, micro_batch, train.accumulate, steps=3)
        current.wait_stream(stream)
        return GraphedStep(step)
    if what != "off":
        warm_up(step, micro_batch, train.accumulate)
    return step


def _wrapped(model: CCMIM, here: Session) -> nn.Module:
    if here.world_size == 1 or is_sharded(model):
        return model
    devices = [here.device.index] if here.device.type == "cuda" else None
    # BatchNorm's running statistics are equal on all ranks already; broadcasting them would cost a collective a step.
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)
