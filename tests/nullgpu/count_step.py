"""This script counts one training step on the null device: `count_step.py IMAGES SETTINGS...`, told as `counts`.

Launches are the device's; FLOPs are torch's count. Bytes are those of each operator's inputs and outputs, products and
attention left out; of a compiled step those of each fused kernel, as inductor counts them.
"""

import logging
import re
import sys
from collections import Counter
from typing import Any

import torch
from nullgpu.counters import bools_are, counted, tell, without_cudnn
from torch._inductor import compile_fx, metrics
from torch._inductor.scheduler import BaseSchedulerNode, ExternKernelSchedulerNode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ccmim_fast.config.load import load_config
from ccmim_fast.engine.build import build_step, check_device, prepare_step
from ccmim_fast.engine.dry_run import synthetic_batch
from ccmim_fast.profile.kinds import kind_of_op
from ccmim_fast.ranks.session import Session


class Moved(TorchDispatchMode):
    """A context that sums the bytes of each operator's inputs and outputs, by the operator's kind."""

    def __init__(self):
        super().__init__()
        self.by_kind: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        kind = kind_of_op(func.name().partition(".")[0])
        self.by_kind[kind] += sum(x.nbytes for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor))
        return out


def fused_bytes() -> int:
    """Return the bytes that inductor's kernels and our operators read and write, without products and attention."""
    nodes = [(node, 4 * words) for node, words in metrics.nodes_num_elem]
    return sum(size for node, size in nodes if not _is_product(node))


def _is_product(node: BaseSchedulerNode) -> bool:
    if not isinstance(node, ExternKernelSchedulerNode):
        return False
    # aten.mm.default, or extern_kernels.mm
    called = str(getattr(node.node, "op_overload", None) or node.node.python_kernel_name)
    name = re.sub(r"^(aten|extern_kernels)\.", "", called).partition(".")[0]
    return kind_of_op(f"aten::{name}") in ("matmul", "attention")


def count(images: int, settings: list[str]) -> dict[str, Any]:
    """Return the fields of `predict.Counts` for a step of so many images."""
    without_cudnn()
    # Inductor counts the bytes of its kernels for whoever reads its log of them.
    compile_fx.inductor_metrics_log.setLevel(logging.INFO)
    one = ["--train.device=cuda", "--data.source=shapes", "--train.accumulate=1", f"--train.batch_size={images}"]
    config, here = load_config([*settings, *one], "predict"), Session(0, 1, torch.device("cuda"))
    check_device(config, here)
    with bools_are(True):
        step = build_step(config, here)
    step_fn, batches = prepare_step(step, images), [synthetic_batch(step, images)]
    step_fn(batches, 1e-4)
    with counted() as found:
        step_fn(batches, 1e-4)
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as flops, Moved() as moved:
        step_fn(batches, 1e-4)
    by_op = flops.get_flop_counts()["Global"]
    attention = sum(count for op, count in by_op.items() if "attention" in str(op))
    work = moved.by_kind["elementwise"] + moved.by_kind["our kernels"]
    compiled = step.forward != step.losses
    return {
        "images": images,
        "launches": found.launches,
        "products": sum(by_op.values()) - attention,
        "attention": attention,
        "bytes": moved.by_kind["optimizer"] + (fused_bytes() if compiled else work),
        "compiled": compiled,
    }


if __name__ == "__main__":
    tell("counts", count(int(sys.argv[1]), sys.argv[2:]))
