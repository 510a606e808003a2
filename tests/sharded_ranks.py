"""Two ranks that train with divided and with whole weights, save and go on; one of them writes what was found.

Started by tests/ranks/test_fsdp.py, which looks at it.
"""

import errno
import os
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from bank_ranks import Sizes
from tiny import images, tiny_config
from torch.distributed.tensor import DTensor

from ccmim_fast.checkpoints.distributed import _HashedFiles
from ccmim_fast.data.stream.batch import Batch
from ccmim_fast.data.stream.plan import Plan
from ccmim_fast.engine.build import build_step
from ccmim_fast.engine.checkpointer import Checkpointer
from ccmim_fast.engine.compile import compile_step
from ccmim_fast.engine.task import Task
from ccmim_fast.errors import CheckpointError
from ccmim_fast.optim.update import own_part
from ccmim_fast.ranks.fsdp import let_go, shard
from ccmim_fast.ranks.session import Session

STEPS, FEW = 20, 5
LR = 1e-3
CASES = {
    "bank": {"score": {"source": "bank"}},
    "first": {"score": {"source": "first"}, "contrast": {"loss": "align"}},
    "all": {"contrast": {"loss": "moco"}, "optim": {"clip_grad": 0.5, "ema_decay": 0.9}},
    "block": {"score": {"source": "block", "block": 1}},
    "accumulate": {
        "score": {"source": "bank", "temperature": (4.0, 1.0)},
        "mask": {"hints": 0.2, "importance": (0.5, 1.0)},
        "train": {"accumulate": 2},
        "teacher": {"tokens": 0.4},
    },
    "recompute": {"score": {"source": "bank"}, "train": {"recompute": True}},
    "compiled": {"score": {"source": "bank"}},
    "mae": {"mask": {"strategy": "random"}, "contrast": {"loss": "none"}},
    "own parts": {
        "score": {"source": "bank"},
        "model": {"positions": "learned", "registers": 2, "layer_scale": 0.1, "qk_norm": True, "mlp": "swiglu"},
    },
    "rotary": {
        "score": {"source": "bank"},
        "teacher": {"tokens": 0.4},
        "model": {"arch": "vit_small_patch16_rope_mixed_ape_224", "depth": 2},
    },
    "watched": {"score": {"source": "bank"}, "model": {"arch": "eva02_enormous_patch14_clip_224", "depth": 2}},
}


def whole(tensor):
    """All of a tensor, whoever has its parts."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def config_of(parallel, precision="fp32", **sections):
    train = {"precision": precision, "device": "cpu", "parallel": parallel, **sections.pop("train", {})}
    return tiny_config(**sections, train=train)


def take(step, here, numbers, accumulate=1):
    """Steps of these numbers on images that step and rank decide; [steps, 4] losses and gradient norm."""
    found = []
    for number in numbers:
        torch.manual_seed(1000 * number + here.rank)
        batches = []
        for _ in range(accumulate):
            ids_B = torch.randint(2**40, (4,))
            batch = Batch(images(4), ids_B, torch.zeros_like(ids_B))
            if step.model.banked:
                boxes_B4 = torch.tensor([0, 0, 1, 1], dtype=torch.float64).expand(4, 4)
                batch = batch._replace(boxes_B4=boxes_B4, maps_BGG=torch.randn(4, 16, 16).half())
            batches.append(batch)
        result = step(batches, LR)
        means = torch.stack([result.total, result.recons, result.contrast])
        dist.all_reduce(means)
        found.append([*(means / 2).tolist(), result.gradients.norm.item()])
    return torch.tensor(found)


def weights(step):
    """All weights, averages and moments, whole."""
    state = [*step.model.state_dict().values(), *(step.ema.state_dict().values() if step.ema else ())]
    state += [value for of_one in step.optimizer.state.values() for value in of_one.values()]
    return [whole(tensor).detach().clone() for tensor in state]


class Saved(Task):
    """A step and a place in the stream; it is not trained."""

    def __init__(self, step, here):
        self.model, self.optimizer, self.scaler, self.ema = step.model, step.optimizer, step.scaler, step.ema
        self.loader = SimpleNamespace(plan=Plan(Sizes(64), 0, 8, 1, here.rank, here.world_size))


def checkpointer(step, here, folder, notes):
    return Checkpointer(step.config, here, folder, Saved(step, here), notes.append)


def saved(step, here, folder, at):
    points = checkpointer(step, here, folder, [])
    with points.saver:
        points.save(at, 8 * at)
        points.close()


def resumed(parallel, here, folder):
    """A new step that goes on where `folder` is."""
    config = config_of(parallel, optim={"ema_decay": 0.9}, run={"resume": "auto"})
    step = build_step(config, here)
    assert checkpointer(step, here, folder, []).resume() == (3, 24)
    return step


def equality(here):
    found = {}
    for name, sections in CASES.items():
        of_both = []
        for parallel in ("ddp", "fsdp"):
            step = build_step(config_of(parallel, **{k: dict(v) for k, v in sections.items()}), here)
            steps = range(STEPS if name == "bank" else FEW)
            if name == "compiled":
                compile_step(step, "blocks", backend="eager")
            losses = take(step, here, steps, sections.get("train", {}).get("accumulate", 1))
            of_both.append((losses, weights(step)))
        found[name] = of_both
    return found


def half_precision(here):
    """With blocks gathered in bfloat16, as on CUDA, where autocast's layer norm is float32 whatever its weights are."""
    layer_norm = F.layer_norm

    def exact(x, shape, weight=None, bias=None, eps=1e-5):
        return layer_norm(x.float(), shape, weight.float(), bias.float(), eps)

    with (
        patch("torch.nn.functional.layer_norm", exact),
        patch("ccmim_fast.engine.build.shard", lambda model, here, _: shard(model, here, torch.bfloat16)),
    ):
        return [take(build_step(config_of(parallel, "bf16"), here), here, range(FEW)) for parallel in ("ddp", "fsdp")]


def shares(here):
    """Elements of weights, gradients and moments that a rank has, of all."""
    step = build_step(config_of("fsdp"), here)
    held = {}
    with patch("ccmim_fast.engine.step.drop_gradients", lambda optimizer: None):
        take(step, here, [0])
    trained = [p for p in step.model.parameters() if p.requires_grad]
    moments = [step.optimizer.state[p]["exp_avg"] for p in trained]
    for name, tensors in (("weights", trained), ("gradients", [p.grad for p in trained]), ("moments", moments)):
        held[name] = sum(own_part(t).numel() for t in tensors), sum(t.numel() for t in tensors)
    return held


def looking(here):
    """Predictions of changed weights: of FSDP before and after it lets go of what it had gathered, and of DDP."""
    found = []
    for parallel in ("fsdp", "ddp"):
        step = build_step(config_of(parallel), here)
        torch.manual_seed(0)
        given = images(4), torch.arange(4), torch.zeros(4, dtype=torch.int64)
        with torch.no_grad():
            step.model(*given)
            for parameter in step.optimizer.param_groups[0]["params"]:
                own_part(parameter).mul_(1.5)
            found.append(step.model(*given).pred_BMP)
            let_go(step.model)
            found.append(step.model(*given).pred_BMP)
    return found[:3]


def going_on(here, folder):
    """Steps 0..2, saved; steps 3..5 of the same run, and of others that go on from what was saved."""
    found = {}
    for writer in ("ddp", "fsdp"):
        step = build_step(config_of(writer, optim={"ema_decay": 0.9}), here)
        take(step, here, range(3))
        saved(step, here, folder / writer, 3)
        before, losses = weights(step), take(step, here, range(3, 6))
        found[writer] = before, losses, weights(step)
        for reader in ("ddp", "fsdp"):
            other = resumed(reader, here, folder / writer)
            before, losses = weights(other), take(other, here, range(3, 6))
            found[writer, reader] = before, losses, weights(other)
    return found


def full_disk(here, folder):
    """The second rank's disk is full at one save, and then at three in a row."""
    step, notes = build_step(config_of("fsdp"), here), []
    points, full = checkpointer(step, here, folder / "full", notes), False
    create = _HashedFiles.create_stream

    def create_stream(self, path, mode):
        if full and here.rank == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return create(self, path, mode)

    with patch.object(_HashedFiles, "create_stream", create_stream):
        points.save(1, 8)
        points.saver.wait()
        full = True
        points.save(2, 16)
        points.saver.wait()
        left = sorted(path.name for path in points.folder.iterdir())
        full = False
        points.save(3, 24)
        points.saver.wait()
        told = len(notes)
        full = True
        try:
            for at in (4, 5, 6, 7):
                points.save(at, 8 * at)
            failure = "none"
        except CheckpointError as error:
            failure = str(error)
    return notes[:told], left, failure


def rank_main(rank, world_size, folder):
    here = Session(rank, world_size, torch.device("cpu"))
    found = {"equality": equality(here), "half": half_precision(here), "shares": shares(here)}
    found["looking"] = looking(here)
    found["going on"] = going_on(here, folder)
    found["full disk"] = full_disk(here, folder)
    torch.save(found, folder / f"found_{rank}.pt")
