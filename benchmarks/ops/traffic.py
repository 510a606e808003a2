"""This module runs an op in Triton's interpreter, and counts the bytes that its kernels ask of global memory.

Needs TRITON_INTERPRET=1 before Triton is imported, so `audit.py` runs it as a process of its own, which prints JSON.
Every lane whose mask is set counts with the size of its element, as often as it asks: also what a cache would serve.
`distinct` counts each 32-byte sector once, for that is the least a GPU's memory moves. Both are lines in the batch
size, drawn through two small batches.
"""

import argparse
import json
import sys
from typing import Any

import numpy as np
import registry
import torch
import triton.runtime.interpreter as interpreter

from ccmim_kernels.triton_impl.launch import Launch, recorded

SECTOR = 32  # bytes
SMALL = (1, 2)  # batch sizes


class Counted:
    """This class counts the accesses of each launch in a list that `recorded` fills."""

    def __init__(self):
        self.begin([])

    def begin(self, launches: list[Launch]) -> None:
        self.launches = launches
        self.moved: dict[int, int] = {}
        self.sectors: dict[int, list[np.ndarray]] = {}

    def access(self, addresses: np.ndarray, mask: np.ndarray, size: int) -> None:
        active = np.broadcast_to(addresses, mask.shape)[mask].astype(np.int64)
        number = len(self.launches) - 1
        self.moved[number] = self.moved.get(number, 0) + len(active) * size
        touched = np.concatenate([active // SECTOR, (active + size - 1) // SECTOR])
        self.sectors.setdefault(number, []).append(np.unique(touched))

    def distinct(self, number: int) -> int:
        return len(np.unique(np.concatenate(self.sectors[number]))) * SECTOR


def watch(counted: Counted) -> None:
    """Let the interpreter tell `counted` of every load and store from now on."""
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def size_of(pointers) -> int:
        return max(1, pointers.get_element_ty().primitive_bitwidth // 8)

    def counted_load(self, ptrs, mask, *rest):
        counted.access(ptrs.data, mask.data, size_of(ptrs))
        return load(self, ptrs, mask, *rest)

    def counted_store(self, ptrs, value, mask, *rest):
        counted.access(ptrs.data, mask.data, size_of(ptrs))
        return store(self, ptrs, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store


def call(op: str, batch: int, launches: list[Launch]) -> int:
    """Call an op and its gradient once; return how many of the launches are its forward's."""
    case = registry.benchmark(op).case(registry.Size(batch), torch.device("cpu"))
    out = case.call(*case.inputs, kernels="triton")
    forward, out = len(launches), [x for x in out if x.requires_grad]
    if case.leaves:
        torch.autograd.grad(out, case.leaves, [torch.empty_like(x) for x in out])
    return forward


def measure(op: str, batch: int) -> list[dict[str, Any]]:
    """Describe every launch of an op at `batch`: what was launched, and the bytes it moves."""
    with recorded(run=False) as launches:
        forward = call(op, batch, launches)
    counted, lines = Counted(), []
    watch(counted)
    for small in SMALL:
        with recorded(run=True) as small_launches:
            counted.begin(small_launches)
            call(op, small, small_launches)
        lines.append([(counted.moved[n], counted.distinct(n)) for n in range(len(small_launches))])
    rows = []
    for number, launch in enumerate(launches):
        pairs = zip(*(line[number] for line in lines))
        steps = [(least, (most - least) / (SMALL[1] - SMALL[0])) for least, most in pairs]
        moved, distinct = (least + step * (batch - SMALL[0]) for least, step in steps)
        row = {
            "pass": "forward" if number < forward else "backward",
            "module": launch.kernel.fn.__module__,
            "kernel": launch.kernel.fn.__name__,
            "arguments": [kind if value is None else value for kind, value in zip(launch.arguments, launch.numbers)],
            "constants": dict(launch.constants),
            "warps": launch.warps,
            "fp_fusion": launch.fp_fusion,
            "registers": launch.registers,
            "programs": launch.programs,
        }
        rows.append(row | {"moved": round(moved), "distinct": round(distinct)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("op", choices=registry.NAMES)
    parser.add_argument("--batch", type=int, default=1024)
    options = parser.parse_args()
    json.dump(measure(options.op, options.batch), sys.stdout)


if __name__ == "__main__":
    main()
