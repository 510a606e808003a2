"""Processes train side by side on this CPU, as ranks of a group or independent; pipes carry commands and results."""

# B batch, H height, W width, C channels

import contextlib
import multiprocessing
import tempfile
import time
from argparse import Namespace
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import contenders
import numpy as np
import torch
import torch.distributed as dist
from cluster import BUCKET, GRADIENT
from measure import random_images
from torch.utils._python_dispatch import TorchDispatchMode

from ccmim_fast.config.schema import Config
from ccmim_fast.data.stream.batch import on_device
from ccmim_fast.data.stream.plan import Plan
from ccmim_fast.engine.build import build_bank, build_step
from ccmim_fast.engine.step import TrainStep
from ccmim_fast.engine.step_monitor import StepMonitor
from ccmim_fast.errors import MachineError
from ccmim_fast.ranks.session import Session

PATIENCE = 600  # seconds without an answer after which a process counts as lost

# The tensors that each collective is given, by its place among the arguments.
_GIVEN = {"allreduce_": ("all_reduce", 0), "_reduce_scatter_base_": ("reduce_scatter", 1)}
_GIVEN |= {"allgather_": ("all_gather", 1), "_allgather_base_": ("all_gather", 1)}


class Counted(TorchDispatchMode):
    """This mode counts the collectives of this thread, those of DDP's backward pass too.

    Attributes:
        calls, sizes: number of calls and bytes, by collective.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.sizes = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func.name().removeprefix("c10d::")
            op, place = _GIVEN.get(name, (name, 0))
            self.calls[op] += 1
            self.sizes[op] += sum(x.nbytes for x in _tensors(args[place]))
        return func(*args, **(kwargs or {}))


def _tensors(given: Any) -> list[torch.Tensor]:
    if isinstance(given, torch.Tensor):
        return [given]
    return [x for one in given for x in _tensors(one)] if isinstance(given, (list, tuple)) else []


def config_of(options: Namespace, world_size: int) -> Config:
    """Return the configuration of the processes' runs.

    Raises:
        ConfigError: a setting is wrong.
    """
    shape = (options.batch * world_size, options.image_size, options.image_size, 3)
    given = ["--config=ccmim_vit_small", "--train.device=cpu", *options.settings]
    return contenders.ours_config(given, options.arch, shape, options.precision)


class FewSizes(contenders.MadeSizes):
    """A source of few images, so that the maps of all of them take little memory."""

    sizes_N2 = np.full((10_000, 2), 256, dtype=np.int32)


class Run:
    """This class takes steps as the training loop does: bank, step, flags."""

    def __init__(self, train_step: TrainStep, here: Session, images: int, accumulate: int):
        self.step, config = train_step, train_step.config
        together = images * accumulate * here.world_size
        self.plan = Plan(FewSizes(), 0, together, accumulate, here.rank, here.world_size)
        self.bank = build_bank(config, self.plan, here, Path())
        self.monitor, self.cursor = StepMonitor(here), 0
        self.images_BHWC = random_images(images, config.data.image_size[0], here.device)
        self.boxes_B4 = np.tile([0.1, 0.2, 0.7, 0.6], (images, 1))

    def __call__(self) -> float:
        """Take one step; return its loss."""
        own = range(self.plan.rank, self.plan.rank + 1)
        batches = []
        for ids_B in self.plan.step_ids(self.cursor, own)[:, 0]:
            epochs_B = np.zeros_like(ids_B)
            batches.append(on_device(self.images_BHWC, ids_B, epochs_B, None, self.boxes_B4, self.step.device))
        result = self.step(batches if self.bank is None else self.bank.read(self.cursor, batches), contenders.LR)
        if self.bank is not None:
            self.bank.write([seen.maps_BGG for seen in result.seen])
        self.monitor.submit(0, result.gradients.bad, stop=False)
        list(self.monitor.completed())
        self.cursor += self.plan.global_batch
        return float(result.total)


class Team:
    """A team of processes; `ask` sends all of them the same command at once and returns their answers in order.

    Args:
        count: of processes.
        options: arch, image_size, precision, threads, settings.
        together: the processes are ranks of one group; else they are independent.
    """

    def __init__(self, count: int, options: Namespace, together: bool):
        spawn = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        rendezvous = str(Path(self._folder.name) / "rendezvous") if together else ""
        self._members: list[tuple[Any, Connection]] = []
        for rank in range(count):
            ours, theirs = spawn.Pipe()
            place = (rank, count) if together else (0, 1)
            process = spawn.Process(target=_serve, args=(theirs, *place, rendezvous, vars(options)), daemon=True)
            process.start()
            theirs.close()
            self._members.append((process, ours))

    def ask(self, what: str, *arguments: Any, only: int | None = None) -> list[Any]:
        """Call a method of `_Work` in each process, or in the first `only` ones, and return the answers.

        Raises:
            MachineError: a process ended, or does not answer.
        """
        members = self._members[:only]
        for _, pipe in members:
            pipe.send((what, *arguments))
        return [self._answer(process, pipe, what) for process, pipe in members]

    def _answer(self, process: Any, pipe: Connection, what: str) -> Any:
        try:
            if pipe.poll(PATIENCE):
                return pipe.recv()
        except EOFError:
            process.join()
            raise MachineError(
                f"{what}: a process ended with exit code {process.exitcode}; its error stands above"
            ) from None
        raise MachineError(f"{what}: no answer in {PATIENCE} seconds")

    def close(self) -> None:
        for process, pipe in self._members:
            pipe.close()
            process.join(10)
            process.kill()
        self._folder.cleanup()


def _serve(pipe: Connection, rank: int, world_size: int, rendezvous: str, options: dict[str, Any]) -> None:
    """Run in a member process, until the pipe is closed."""
    torch.set_num_threads(options["threads"])
    if rendezvous:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    work = _Work(Session(rank, world_size, torch.device("cpu")), Namespace(**options))
    with contextlib.suppress(EOFError):  # the pipe is closed when nothing more is asked
        while True:
            what, *arguments = pipe.recv()
            pipe.send(getattr(work, what)(*arguments))
    if rendezvous:
        dist.destroy_process_group()


class _Work:
    """The methods that a member process can be asked to call."""

    def __init__(self, here: Session, options: Namespace):
        self._config = config_of(options, here.world_size)
        self._here, self._step, self._runs = here, build_step(self._config, here), {}

    def _run(self, images: int, accumulate: int = 1) -> Run:
        key = (images, accumulate)
        if key not in self._runs:
            self._runs[key] = Run(self._step, self._here, images, accumulate)
        return self._runs[key]

    def steps(self, images: int, count: int) -> tuple[float, float, list[float]]:
        """Take `count` steps; return seconds, CPU seconds of this process, and the losses."""
        run, start, computed = self._run(images), time.perf_counter(), time.process_time()
        losses = [run() for _ in range(count)]
        return time.perf_counter() - start, time.process_time() - computed, losses

    def counted(self, images: int, accumulate: int) -> tuple[dict[str, int], dict[str, int]]:
        """Return calls and bytes by collective of a step of `accumulate` micro-batches."""
        run = self._run(images, accumulate)
        with Counted() as counted:
            run()
        return dict(counted.calls), dict(counted.sizes)

    def facts(self) -> dict[str, int]:
        """Return the model's number of trained parameters, its width, and the cells of a map (0: no bank)."""
        model = self._step.model
        cells = self._config.score.grid if model.banked else 0
        return {
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "width": model.encoder.embed_dim,
            "cells": cells,
        }

    def all_reduce(self, count: int) -> float:
        """Return the seconds to sum `count` float32 values in buckets like DDP's, without other work."""
        buckets = torch.zeros(count).split(BUCKET // GRADIENT)
        dist.barrier()
        start = time.perf_counter()
        for work in [dist.all_reduce(bucket, async_op=True) for bucket in buckets]:
            work.wait()
        return time.perf_counter() - start
