"""This script does on the null device what its counters are to notice, each thing once, and tells what they said."""

import gc

import torch
from nullgpu.counters import bools_are, counted, memory, no_waits, tell, traced, without_cudnn

MIB = 2**20


def told_of(action) -> str:
    """Return what an action raises, in one line."""
    try:
        action()
    except Exception as error:
        return " ".join(str(error).split())
    return ""


def products() -> None:
    for dtype, precision in (
        (torch.bfloat16, "high"),
        (torch.float16, "high"),
        (torch.float32, "high"),
        (torch.float32, "highest"),
    ):
        torch.set_float32_matmul_precision(precision)
        a_MK, b_KN = torch.zeros(8, 16, device="cuda", dtype=dtype), torch.zeros(16, 24, device="cuda", dtype=dtype)
        bias_N = torch.zeros(24, device="cuda", dtype=dtype)
        with counted() as counts:
            a_MK @ b_KN
            torch.addmm(bias_N, a_MK, b_KN)
            torch.nn.functional.linear(a_MK, b_KN.T.contiguous(), bias_N)
            a_MK.expand(3, 8, 16).contiguous() @ b_KN.expand(3, 16, 24).contiguous()
        tell(
            f"products {dtype} {precision}",
            [list(key) + list(row) for key, row in counts.items() if key[0] == "product"],
        )


def copies_and_waits() -> None:
    x, pinned = torch.zeros(1000, device="cuda"), torch.zeros(1000).pin_memory()
    host = torch.zeros(1000)
    for name, action in {
        "item": lambda: x.sum().item(),
        "to the host": lambda: x.cpu(),
        "from pageable memory": lambda: x.copy_(host),
        "from pinned memory": lambda: x.copy_(pinned, non_blocking=True),
        "synchronize": torch.cuda.synchronize,
        "nonzero": x.nonzero,
        "kernel": lambda: x.add_(1),
    }.items():
        with counted() as counts:
            action()
        tell(
            name,
            {
                "waits": counts.events("wait"),
                "copies": {k[1]: r for k, r in counts.items() if k[0] == "copy"},
                "kernels": counts.events("kernel"),
            },
        )
    with no_waits():
        tell("no_waits", told_of(lambda: x.sum().item()))
    tell("data", x.copy_(torch.arange(1000.0)).cpu().sum().item())
    with bools_are(True):
        tell("bool", bool((x < 0).any()))


def captures() -> None:
    x = torch.zeros(1000, device="cuda")

    def captured(action) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            action()
        return graph

    tell("captured wait", told_of(lambda: captured(lambda: x.sum().item())))
    tell("captured pageable copy", told_of(lambda: captured(lambda: x.copy_(torch.zeros(1000), non_blocking=True))))
    pinned = torch.zeros(1000).pin_memory()
    graph = captured(lambda: x.copy_(pinned, non_blocking=True).add_(1))
    for name in ("unchanged", "changed"):
        with counted() as counts:
            graph.replay()
        tell(f"replay {name}", {key[1]: row for key, row in counts.items() if key[0] == "graph"})
        pinned += 1


def limits() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    before = memory()["used"]
    block = torch.empty(100 * MIB, dtype=torch.uint8, device="cuda")
    tell("memory", [memory()["used"] - before, torch.cuda.mem_get_info()[1]])
    tell("too much", told_of(lambda: torch.empty(2 * torch.cuda.mem_get_info()[1], dtype=torch.uint8, device="cuda")))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with traced() as events:
        start.record()
        for _ in range(5):
            block.add_(1)
        end.record()
    tell("time of five launches in ms", start.elapsed_time(end))
    tell("trace", [event[0] for event in events])


if __name__ == "__main__":
    without_cudnn()
    tell("device", [torch.cuda.get_device_name(), list(torch.cuda.get_device_capability())])
    for part in (products, copies_and_waits, captures, limits):
        part()
