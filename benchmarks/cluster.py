"""This script computes what a step sends on a cluster and how much of it nothing hides: the tables of docs/scaling.md.

    python benchmarks/cluster.py

Nothing here is a measurement; benchmarks/scaling.py counts what two ranks send and compares it with `traffic`.
"""

# n GPUs on m nodes, P parameters, B images of a GPU, D width, E contrastive width

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
from arithmetic import DECODER_WIDTH, RATE, VITS, E, Vit, lines, parameters, parts
from divided import GRADIENT, WEIGHT, block_shapes, filled, gathered_bytes, summed_bytes

NODE = 8  # GPUs
NVLINK = 450e9  # bytes/s and GPU in one direction: H100 data sheet, 900 GB/s for both
NETWORK = 50e9  # bytes/s and GPU in one direction: 400 Gbit/s, one adapter for each GPU
BUCKET = 25 * 2**20  # bytes of gradients that DDP sums at a time: torch's default
LARGE = ("ViT-B/16", "ViT-L/16", "ViT-H/14")
HOW = ("ddp", "fsdp")
BATCHES = (0, 4096, 1024)  # of a step; 0: `EACH` per GPU
EACH = 128
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)

# Seconds of latency by NCCL's own cost model (its src/graph/tuning.cc): at the start, of each step over NVLink, of each
# over the network. Small all-reduces use the tree (protocol LL), buckets the tree and shards the ring (LL128).
SMALL = (4.4e-6, 0.52e-6, 5.0e-6)
TREE = (4.4e-6, 1.2e-6, 8.5e-6)
RING = (10e-6, 1.9e-6, 4.0e-6)


class Traffic(NamedTuple):
    """The bytes that a rank gives to one kind of collective in a step, as torch counts them.

    They are the whole tensor that is summed or scattered, or the rank's part that is gathered. `calls` is None where it
    depends on the size of a bucket.
    """

    what: str
    op: str
    calls: int | None
    size: float


def traffic(
    count: int, width: int, images: int, gpus: int, *, accumulate: int = 1, cells: int = 0, contrast: bool = True
) -> list[Traffic]:
    """Return the traffic of one optimizer step with DDP, of `accumulate` micro-batches of `images` per GPU.

    Args:
        count: P.
        width: D.
        cells: of a score bank whose ranks all keep the same maps, G; 0: none.
    """
    found = [Traffic("gradients", "all_reduce", None, GRADIENT * count)]
    return found + _traffic_of_images(width, images, gpus, accumulate, cells, contrast)


def divided_traffic(
    vit: Vit,
    images: int,
    gpus: int,
    *,
    source: str = "bank",
    decoder_blocks: int = 2,
    accumulate: int = 1,
    cells: int = 0,
) -> list[Traffic]:
    """Return the traffic of one optimizer step with FSDP2, whose products are in bf16; arguments as of `traffic`."""
    contrast, units = source != "none", vit.depth + decoder_blocks + 1  # the last one holds what is in no block
    found = [
        Traffic("weights", "all_gather", units, gathered_bytes(vit, gpus, source, decoder_blocks) / gpus),
        Traffic("gradients", "reduce_scatter", units, summed_bytes(vit, gpus, source, decoder_blocks)),
        Traffic("norms", "all_reduce", 1, 4 * (2 + contrast)),
    ]
    return found + _traffic_of_images(vit.width, images, gpus, accumulate, cells, contrast)


def _traffic_of_images(
    width: int, images: int, gpus: int, accumulate: int, cells: int, contrast: bool
) -> list[Traffic]:
    """Return what is sent besides weights and gradients."""
    found = [Traffic("flags", "all_reduce", 1, 8)]
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
    """Return the bytes that each GPU sends when a ring carries out the collective."""
    if sent.op == "all_gather":
        return (gpus - 1) * sent.size
    return (2 if sent.op == "all_reduce" else 1) * (gpus - 1) / gpus * sent.size


def all_gather(count: float, gpus: int) -> float:
    """Return the seconds until every GPU has the `count` bytes of each other one.

    Each GPU gets the bytes of its peers in the other nodes by its own adapter, then the node gathers all of them. A
    reduce-scatter of `gpus * count` takes as long.
    """
    local, nodes = _divided(gpus)
    return (nodes - 1) * count / NETWORK + (local - 1) * nodes * count / NVLINK


def all_reduce(count: float, gpus: int) -> float:
    """Return the seconds to sum `count` bytes over GPUs.

    That is a reduce-scatter in the node, an all-reduce of an eighth by each GPU's own adapter, a gather in the node.
    """
    return 2 * all_gather(count / gpus, gpus)


def tree_latency(gpus: int, of: tuple[float, float, float] = TREE) -> float:
    """Return the latency of an all-reduce in seconds."""
    (local, nodes), (base, near, far) = _divided(gpus), of
    return 0.0 if gpus == 1 else base + 2 * ((local - 1) * near + math.log2(nodes) * far)


def ring_latency(gpus: int) -> float:
    """Return the latency of an all-gather or a reduce-scatter in seconds."""
    nodes, (base, near, far) = _divided(gpus)[1], RING
    return 0.0 if gpus == 1 else base + (gpus - nodes) * near + (nodes - 1) * far


def _divided(gpus: int) -> tuple[int, int]:
    local = min(gpus, NODE)
    return local, gpus // local


class Window(NamedTuple):
    """A part of a step: seconds of its arithmetic, and of the communication that can overlap with it."""

    compute: float
    communication: float

    @property
    def exposed(self) -> float:
        return max(0.0, self.communication - self.compute)


@dataclass(frozen=True)
class Step:
    """A step on paper, in seconds.

    Attributes:
        first: score and the visible set's forward pass.
        rest: of the forward pass, after hV is known; its rows are sent meanwhile.
        backward: the backward pass; gradients are sent meanwhile.
        small: all-reduces of statistics and flags, which nothing hides.
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
    """Return an optimizer step of `images` per GPU by `ddp`, or by `fsdp`: fully_shard of each block, over all GPUs."""
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
    """Return the seconds to gather the blocks of the encoder and of the decoder once, and to sum all gradients."""
    count = parameters(vit, source, decoder_blocks)
    if how == "ddp":
        buckets = math.ceil(GRADIENT * count / BUCKET)
        return 0.0, 0.0, all_reduce(GRADIENT * count, gpus) + buckets * tree_latency(gpus)

    def seconds(size: float, units: int) -> float:
        return all_gather(size / gpus, gpus) + units * ring_latency(gpus)

    units = vit.depth + decoder_blocks + 1  # the last one holds what is in no block
    in_decoder = WEIGHT * decoder_blocks * filled(block_shapes(DECODER_WIDTH), gpus)
    before_it = gathered_bytes(vit, gpus, source, decoder_blocks) - in_decoder
    encoder, decoder = seconds(before_it, vit.depth + 1), seconds(in_decoder, decoder_blocks)
    return encoder, decoder, seconds(summed_bytes(vit, gpus, source, decoder_blocks), units)


def weight_bytes(vit: Vit, gpus: int, how: str, source: str = "bank", decoder_blocks: int = 2) -> float:
    """Return the bytes of weights and gradients that each GPU sends in a step."""
    count = parameters(vit, source, decoder_blocks)
    if how == "ddp":
        return 2 * (gpus - 1) / gpus * GRADIENT * count
    both = gathered_bytes(vit, gpus, source, decoder_blocks) + summed_bytes(vit, gpus, source, decoder_blocks)
    return (gpus - 1) / gpus * both


def volume_table(gpus: int = 1024) -> str:
    """Return the table of megabytes that each GPU sends in a step of `EACH` images."""
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
    """Return the table of milliseconds of each part of a step of `EACH` images per GPU, and of its communication."""
    rows = []
    for name in LARGE[::2]:
        for gpus in (8, 64, 1024):
            ddp, fsdp = (step(VITS[name], EACH, gpus, how) for how in HOW)
            cells = [f"{name}, {gpus:,} GPUs"]
            for stretch in ("first", "rest", "backward"):
                own = [getattr(one, stretch) for one in (ddp, fsdp)]
                cells += [
                    f"{1e3 * own[0].compute:.1f}",
                    " / ".join(f"{1e3 * window.communication:.1f}" for window in own),
                ]
            rows.append([*cells, f"{1e3 * ddp.small:.1f}"])
    header = ["ms, DDP / FSDP2", "visible set", "meanwhile", "masked, decoder", "meanwhile", "backward", "meanwhile"]
    return lines([*header, "small sums"], rows)


def efficiency_table() -> str:
    """Return the table of compute / (compute + exposed communication), in per cent, and of the fastest GPU counts."""
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
