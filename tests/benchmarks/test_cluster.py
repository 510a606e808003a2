"""Traffic of a step on paper equals what plain arithmetic gives, and the page holds the tables."""

from pathlib import Path

import pytest
import torch
from arithmetic import config_of
from divided import block_shapes, filled, other_shapes

from ccmim_fast.build.model import build_model

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"


@pytest.fixture
def cluster(module):
    return module("cluster")


def test_collectives(cluster):
    assert cluster.all_reduce(1e9, 1) == cluster.all_gather(1e9, 1) == 0
    assert cluster.all_reduce(450e9, 8) == pytest.approx(2 * 7 / 8)
    # Two nodes: the same within each, and an eighth to and from the other one.
    assert cluster.all_reduce(450e9, 16) == pytest.approx(2 * 7 / 8 + 450 / 8 / 50)
    assert cluster.all_gather(450e9, 8) == pytest.approx(7)
    assert cluster.all_gather(450e9, 16) == pytest.approx(450 / 50 + 14)


def test_latency(cluster):
    """NCCL's model: a ring takes a step for each other GPU, a tree two for each level."""
    assert cluster.ring_latency(1) == cluster.tree_latency(1) == 0
    assert cluster.ring_latency(8) == pytest.approx(10e-6 + 7 * 1.9e-6)
    assert cluster.ring_latency(32) == pytest.approx(10e-6 + 28 * 1.9e-6 + 3 * 4e-6)
    assert cluster.tree_latency(32) == pytest.approx(4.4e-6 + 2 * (7 * 1.2e-6 + 2 * 8.5e-6))


def test_traffic_of_a_step(cluster):
    """ViT of width 8 with 1,000 weights, 4 images each on 2 ranks, 2 micro-batches, maps of 16 x 16."""
    found = {t.what: t for t in cluster.traffic(1000, 8, 4, 2, accumulate=2, cells=16)}
    assert found["gradients"].size == 4000
    assert (found["rows"].op, found["rows"].calls, found["rows"].size) == ("all_gather", 2, 2 * 4 * 256 * 4)
    assert found["their gradient"].size == 2 * found["rows"].size
    assert (found["statistics"].calls, found["statistics"].size) == (24, 2 * 6 * (8 + 256) * 4)
    assert found["maps"].size == 2 * 4 * 512
    # Out of a GPU: of four, three quarters of a scattered tensor, twice that of a summed one, a gathered part to three.
    sent = [cluster.out_of_a_gpu(found[what], 4) for what in ("their gradient", "gradients", "rows")]
    assert sent == [2 * found["rows"].size * 0.75, 6000, 3 * found["rows"].size]


def test_communication_behind_arithmetic_costs_nothing(cluster):
    few, many = (cluster.step(cluster.VITS["ViT-B/16"], images, 64) for images in (8, 128))
    assert few.backward.communication < many.backward.communication  # more rows, as many gradients
    assert many.exposed == many.small
    assert few.exposed == pytest.approx(few.small + few.backward.communication - few.backward.compute)
    assert few.efficiency < 0.4 < 0.95 < many.efficiency


def test_fsdp_gathers_once_a_step(cluster):
    """ViT-L on one node: 23 blocks and the decoder's 2 in bf16, the first and what is in none in float32."""
    vit = cluster.VITS["ViT-L/16"]
    step = cluster.step(vit, 128, 8, "fsdp")
    count, block, small = cluster.parameters(vit, "bank", 2), 12 * 1024**2 + 13 * 1024, 12 * 512**2 + 13 * 512
    rest = count - 24 * block - 2 * small
    encoder = 2 * 23 * block + 4 * (block + rest)
    assert step.first.communication == pytest.approx(encoder / 8 * 7 / 450e9 + 25 * cluster.ring_latency(8))
    rows = cluster.step(vit, 128, 8, "ddp").rest.communication
    decoder = 2 * 2 * small / 8 * 7 / 450e9 + 2 * cluster.ring_latency(8)
    assert step.rest.communication == pytest.approx(rows + decoder)
    sums = 4 * count / 8 * 7 / 450e9 + 27 * cluster.ring_latency(8)
    assert step.backward.communication == pytest.approx(rows + sums)
    assert cluster.weight_bytes(vit, 8, "fsdp") == pytest.approx(7 / 8 * (encoder + 2 * 2 * small + 4 * count))
    assert cluster.weight_bytes(vit, 8, "ddp") == pytest.approx(7 / 8 * 8 * count)


@pytest.mark.parametrize("name", ["ViT-B/16", "ViT-H/14"])
def test_many_ranks_divide_the_weights_with_little_to_fill(cluster, name):
    vit = cluster.VITS[name]
    config = config_of(vit, "bank", 2)
    with torch.device("meta"):
        model = build_model(config)
    shapes = vit.depth * block_shapes(vit.width) + 2 * block_shapes(512) + other_shapes(vit, "bank")
    assert sorted(shapes) == sorted(tuple(p.shape) for p in model.parameters() if p.requires_grad)
    count = cluster.parameters(vit, "bank", 2)
    assert filled(shapes, 8) == pytest.approx(count, rel=1e-6)
    assert count < filled(shapes, 512) < 1.07 * count


def test_traffic_of_divided_weights(cluster):
    """As counted of ViT-B on a null device that believes to be the first of 512."""
    found = cluster.divided_traffic(cluster.VITS["ViT-B/16"], 4, 512)
    sizes = {op: sum(t.size for t in found if t.op == op) for op in ("all_gather", "reduce_scatter", "all_reduce")}
    assert sizes == {"all_gather": 433_354, "reduce_scatter": 399_110_144, "all_reduce": 24_588 + 8}
    assert sum(t.calls for t in found if t.op == "all_gather") == 16


@pytest.mark.parametrize("name", ["volume", "windows", "efficiency"])
def test_the_page_holds_the_table(cluster, name):
    assert getattr(cluster, f"{name}_table")() in PAGE.read_text()
