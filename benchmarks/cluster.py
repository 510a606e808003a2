"""On paper: what a step sends on a cluster, and what of it nothing hides. Prints the tables of docs/scaling.md.

    python benchmarks/cluster.py

Nothing here is a measurement; benchmarks/scaling.py counts what two ranks send and holds it against `traffic`.
"""

# n GPUs on m nodes, P parameters, B images of a GPU, D width, E contrastive width

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
from arithmetic import RATE, VITS, E, Vit, block_parameters, lines, parameters, parts

NODE = 8  # GPUs
NVLINK = 450e9  # bytes/s and GPU in one direction: H100 data sheet, 900 GB/s for both
NETWORK = 50e9  # bytes/s and GPU in one direction: 400 Gbit/s, one adapter for each GPU
GRADIENT = 4  # bytes: float32
WEIGHT, EXACT = 2, 4  # bytes that FSDP gathers of each: bf16; float32 in the first block and outside blocks
BUCKET = 25 * 2**20  # bytes of gradients that DDP sums at a time: torch's default
LARGE = ("ViT-B/16", "ViT-L/16", "ViT-H/14")
HOW = ("ddp", "fsdp")
BATCHES = (0, 4096, 1024)  # of a step; 0: `EACH` per GPU
EACH = 128
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)

# Seconds of latency by NCCL's own cost model (its src/graph/tuning.cc): at the start, of each step over NVLink, and of
# each over the network. Small sums go by the tree (protocol LL), buckets by the tree and shards by the ring (LL128).
SMALL = (4.4e-6, 0.52e-6, 5.0e-6)
TREE = (4.4e-6, 1.2e-6, 8.5e-6)
RING = (10e-6, 1.9e-6, 4.0e-6)


class Traffic(NamedTuple):
    """What a rank gives to one kind of collective in a step, as torch counts it: the tensor that is summed or scattered
    whole, the part that is gathered. `calls`: None where the number depends on what a bucket holds."""

    what: str
    op: str
    calls: int | None
    size: float


def traffic(
    count: int, width: int, images: int, gpus: int, *, accumulate: int = 1, cells: int = 0, contrast: bool = True
) -> list[Traffic]:
    """Of one optimizer step with DDP, of `accumulate` micro-batches of `images` per GPU.

    Args:
        count: P.
        width: D.
        cells: of a score bank whose ranks all keep the same maps, G; 0: none.
    """
    found = [Traffic("gradients", "all_reduce", None, GRADIENT * count), Traffic("flags", "all_reduce", 1, 8)]
    if contrast:
        row_bytes = accumulate * images * E * 4
        # Mean and variance of two layers: in both passes forward, in one of them backward.
        statistics = accumulate * 3 * 2 * (width + E) * 4
        found += [
            Traffic("statistics", "all_reduce", accumulate * 12, statistics),
            Traffic("rows", "all_gather", accumulate, row_bytes),
            Traffic("their gradient", "reduce_scatter", accumulate, gpus * row_bytes),
        ]
    if cells:
        found.append(Traffic("maps", "all_gather", 1, accumulate * images * cells**2 * 2))
    return found


def out_of_a_gpu(sent: Traffic, gpus: int) -> float:
    """Bytes that leave each GPU when a ring carries it out."""
    if sent.op == "all_gather":
        return (gpus - 1) * sent.size
    return (2 if sent.op == "all_reduce" else 1) * (gpus - 1) / gpus * sent.size


def all_gather(count: float, gpus: int) -> float:
    """Seconds until every GPU has the `count` bytes of each other one; as long as a reduce-scatter of `gpus * count`.

    Each GPU gets those of its peers in the other nodes by its own adapter, then all of them are gathered in the node.
    """
    local, nodes = _divided(gpus)
    return (nodes - 1) * count / NETWORK + (local - 1) * nodes * count / NVLINK


def all_reduce(count: float, gpus: int) -> float:
    """Seconds to sum `count` bytes over GPUs.

    A reduce-scatter in the node, an all-reduce of an eighth by each GPU's own adapter, a gather in the node.
    """
    return 2 * all_gather(count / gpus, gpus)


def tree_latency(gpus: int, of: tuple[float, float, float] = TREE) -> float:
    """Seconds of an all-reduce, whatever its size."""
    (local, nodes), (base, near, far) = _divided(gpus), of
    return 0.0 if gpus == 1 else base + 2 * ((local - 1) * near + math.log2(nodes) * far)


def ring_latency(gpus: int) -> float:
    """Seconds of an all-gather or a reduce-scatter, whatever its size."""
    nodes, (base, near, far) = _divided(gpus)[1], RING
    return 0.0 if gpus == 1 else base + (gpus - nodes) * near + (nodes - 1) * far


def _divided(gpus: int) -> tuple[int, int]:
    local = min(gpus, NODE)
    return local, gpus // local


class Window(NamedTuple):
    """A stretch of a step: seconds of its arithmetic, and of what can travel meanwhile."""

    compute: float
    travel: float

    @property
    def exposed(self) -> float:
        return max(0.0, self.travel - self.compute)


@dataclass(frozen=True)
class Step:
    """A step on paper, in seconds.

    Attributes:
        first: score and the visible set's forward pass. rest: forward, what comes after hV is known; its rows travel.
        backward: gradients travel.
        small: statistics and flags, behind which nothing runs.
    """

    first: Window
    rest: Window
    backward: Window
    small: float

    @property
    def compute(self) -> float:
        return sum(window.compute for window in (self.first, self.rest, self.backward))

    @property
    def exposed(self) -> float:
        return self.small + sum(window.exposed for window in (self.first, self.rest, self.backward))

    @property
    def efficiency(self) -> float:
        return self.compute / (self.compute + self.exposed)


def step(vit: Vit, images: float, gpus: int, how: str = "ddp", source: str = "bank", decoder_blocks: int = 2) -> Step:
    """One optimizer step of `images` per GPU; `how`: `ddp`, or `fsdp`: fully_shard of each block, over all GPUs."""
    flops = parts(vit, source, decoder_blocks)
    seconds = {name: images * flops.get(name, 0.0) / RATE for name in (*flops, "masked", "heads", "score")}
    trained = seconds["embedding"] + seconds["visible"] + seconds["heads"]
    contrast = source != "none"
    rows = (all_gather(images * E * 4, gpus) + ring_latency(gpus)) * contrast
    encoder, decoder, sums = _weights(vit, source, decoder_blocks, gpus, how)
    return Step(
        Window(seconds["score"] + trained / 3, encoder),
        Window(seconds["masked"] + seconds["decoder"] / 3, rows + decoder),
        Window(2 / 3 * (trained + seconds["decoder"]), rows + sums),
        (12 * contrast + 1) * tree_latency(gpus, SMALL),
    )


def _weights(vit: Vit, source: str, decoder_blocks: int, gpus: int, how: str) -> tuple[float, float, float]:
    """Seconds to gather the blocks of encoder and decoder once, and to sum all gradients."""
    count = parameters(vit, source, decoder_blocks)
    if how == "ddp":
        buckets = math.ceil(GRADIENT * count / BUCKET)
        return 0.0, 0.0, all_reduce(GRADIENT * count, gpus) + buckets * tree_latency(gpus)

    def travelling(size: float, units: int) -> float:
        return all_gather(size / gpus, gpus) + units * ring_latency(gpus)

    units = vit.depth + decoder_blocks + 1  # what is in no block, too
    in_decoder = WEIGHT * decoder_blocks * block_parameters(512)
    before_it = gathered_bytes(vit, source, decoder_blocks) - in_decoder
    encoder, decoder = travelling(before_it, vit.depth + 1), travelling(in_decoder, decoder_blocks)
    return encoder, decoder, travelling(GRADIENT * count, units)


def gathered_bytes(vit: Vit, source: str = "bank", decoder_blocks: int = 2) -> float:
    """Bytes of all weights as FSDP gathers them, once a step: what ranks/fsdp.py keeps exact is in float32."""
    half = (vit.depth - 1) * block_parameters(vit.width) + decoder_blocks * block_parameters(512)
    return WEIGHT * half + EXACT * (parameters(vit, source, decoder_blocks) - half)


def weight_bytes(vit: Vit, gpus: int, how: str, source: str = "bank", decoder_blocks: int = 2) -> float:
    """Bytes of weights and gradients out of each GPU in a step."""
    count = parameters(vit, source, decoder_blocks)
    if how == "ddp":
        return 2 * (gpus - 1) / gpus * GRADIENT * count
    return (gpus - 1) / gpus * (gathered_bytes(vit, source, decoder_blocks) + GRADIENT * count)


def volume_table(gpus: int = 1024) -> str:
    """Megabytes out of each GPU in a step of `EACH` images."""
    vits = [VITS[name] for name in LARGE]
    rows = [
        ["gradients, DDP", *(f"{weight_bytes(vit, gpus, 'ddp') / 1e6:,.0f}" for vit in vits)],
        ["weights and gradients, FSDP2", *(f"{weight_bytes(vit, gpus, 'fsdp') / 1e6:,.0f}" for vit in vits)],
    ]
    named = {"rows": "rows of hV", "their gradient": "their gradient", "statistics": "BatchNorm's statistics"}
    for what, words in named.items():
        sizes = [
            out_of_a_gpu(next(t for t in traffic(0, vit.width, EACH, gpus) if t.what == what), gpus) for vit in vits
        ]
        rows.append([words, *(f"{size / 1e6:,.{0 if size > 1e6 else 2}f}" for size in sizes)])
    return lines(["MB per step", *LARGE], rows)


def windows_table() -> str:
    """Milliseconds of each stretch of a step of `EACH` images per GPU: its arithmetic, and what travels meanwhile."""
    rows = []
    for name in LARGE[::2]:
        for gpus in (8, 64, 1024):
            ddp, fsdp = (step(VITS[name], EACH, gpus, how) for how in HOW)
            cells = [f"{name}, {gpus:,} GPUs"]
            for stretch in ("first", "rest", "backward"):
                own = [getattr(one, stretch) for one in (ddp, fsdp)]
                cells += [f"{1e3 * own[0].compute:.1f}", " / ".join(f"{1e3 * window.travel:.1f}" for window in own)]
            rows.append([*cells, f"{1e3 * ddp.small:.1f}"])
    header = ["ms, DDP / FSDP2", "visible set", "meanwhile", "masked, decoder", "meanwhile", "backward", "meanwhile"]
    return lines([*header, "small sums"], rows)


def efficiency_table() -> str:
    """Compute / (compute + what nothing hides), in per cent, DDP / FSDP2; and with how many GPUs it is fastest."""
    rows = []
    for name in LARGE:
        for batch in BATCHES:
            found = {gpus: [step(VITS[name], batch / gpus or EACH, gpus, how) for how in HOW] for gpus in SIZES}
            cells = [" / ".join(f"{one.efficiency * 100:.0f}" for one in both) for both in found.values()]
            # Efficiency times GPUs is speed.
            best = [max(SIZES, key=lambda gpus: gpus * found[gpus][which].efficiency) for which in range(len(HOW))]
            what = f"{batch:,} in all" if batch else f"{EACH} per GPU"
            rows.append([f"{name}, {what}", *cells, " / ".join(f"{gpus:,}" for gpus in best)])
    return lines(["images", *(f"{gpus:,}" for gpus in SIZES), "fastest"], rows)


if __name__ == "__main__":
    print("\n\n".join([volume_table(), windows_table(), efficiency_table()]))
