"""A batch of the warm-up is laid out as those of the loaders, so that the first real step compiles nothing again."""

import numpy as np
import pytest
import torch
from few_steps import config_for
from tiny import tiny_config

from ccmim_fast.data.build import build_loader, build_source
from ccmim_fast.data.stream import dali_loader
from ccmim_fast.engine.build import build_bank, build_step
from ccmim_fast.engine.compile import compile_step, warm_up
from ccmim_fast.engine.dry_run import synthetic_batch
from ccmim_fast.ranks.session import Session
from ccmim_fast.registry import SCORE_SOURCES

HERE = Session(0, 1, torch.device("cpu"))
needs_dali = pytest.mark.skipif(not dali_loader.is_installed(), reason="DALI is not installed")


@pytest.fixture
def real(tmp_path, photo_folder):
    """The micro-batches of the first step of a run, as its task takes them."""

    def batches(config, images="shapes", loader="torch"):
        root = photo_folder if images == "images" else tmp_path / "shapes"
        data = {"source": images, "root": str(root), "samples": 40, "loader": loader, "workers": 1, "flip": True}
        config = tiny_config(score=config.score, train=config.train, data=data)
        train, source = config.train, build_source(config.data, 0)
        loader = build_loader(source, config.data, 0, train.batch_size, accumulate=train.accumulate)
        bank, stream = build_bank(config, loader.plan, HERE, tmp_path), loader.stream(0)
        batches = [next(stream) for _ in range(train.accumulate)]
        stream.close()
        return batches if bank is None else bank.read(0, batches)

    return batches


def layout(value):
    """All that a guard of a compiled step may look at, but for where in its memory a tensor begins."""
    if isinstance(value, torch.Tensor):
        place = value.device, value.requires_grad, value.is_contiguous(), value._is_view()
        return type(value), value.dtype, value.shape, value.stride(), *place
    return (type(value), value.dtype, value.shape) if isinstance(value, np.ndarray) else type(value)


@pytest.mark.parametrize("source", SCORE_SOURCES)
@pytest.mark.parametrize(
    ("images", "loader"),
    [
        ("shapes", "torch"),
        ("photos", "torch"),
        ("images", "torch"),
        pytest.param("images", "dali", marks=needs_dali),
    ],
)
def test_it_is_laid_out_as_a_loaders(real, images, loader, source):
    config = config_for(score={"source": source}, accumulate=2, batch_size=8)
    (*_, batch), synthetic = real(config, images, loader), synthetic_batch(build_step(config, HERE), 4)
    for name, value in synthetic._asdict().items():
        if name != "labels_B":  # which no step takes
            assert layout(value) == layout(getattr(batch, name)), name


@pytest.mark.parametrize(
    ("source", "what"), [*((source, "step") for source in SCORE_SOURCES), ("bank", "blocks"), ("all", "blocks")]
)
def test_the_first_real_step_compiles_nothing(real, source, what):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    config = config_for(score={"source": source}, accumulate=2, batch_size=8)
    step = build_step(config, HERE)
    compile_step(step, what, backend=backend)
    assert warm_up(step, 4, accumulate=2)
    count = len(graphs)
    assert count > 0
    step(real(config), 1e-4)
    assert len(graphs) == count
