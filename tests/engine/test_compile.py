"""Compiled, warmed up, captured: the same step."""

from types import SimpleNamespace

import pytest
import torch
from few_steps import batches, config_for, here, trained
from torch._dynamo.utils import counters

from ccmim_fast.engine import compile as compiled
from ccmim_fast.engine.build import build_step, check_device, prepare_step
from ccmim_fast.engine.compile import choose_compile, compile_step, vit_blocks, warm_up
from ccmim_fast.engine.dry_run import count_flops
from ccmim_fast.engine.pretraining import Pretraining
from ccmim_fast.errors import ConfigError
from ccmim_fast.models.block import CUDA_ONLY


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()


# Of inductor's code, which takes a minute to make, one of each: a loop over blocks and a whole step with a bank.
@pytest.mark.parametrize(
    ("source", "what", "backend"),
    [
        ("all", "blocks", "inductor"),
        ("all", "step", "aot_eager"),
        ("bank", "blocks", "aot_eager"),
        ("bank", "step", "inductor"),
    ],
)
def test_compiled_equals_eager(source, what, backend, device):
    """Losses and gradient norms over six steps, which all weights have a part in; and a bank's maps."""
    config = config_for(model={"depth": 2}, decoder={"depth": 1}, score={"source": source})
    expected, _ = trained(build_step(config, here(device)), steps=6)
    step = build_step(config, here(device))
    compile_step(step, what, backend=backend)
    found, _ = trained(step, steps=6)
    # Fused code rounds otherwise, and AdamW's first steps follow the gradient's sign: 7e-4 was seen after three.
    torch.testing.assert_close(found[:1], expected[:1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=5e-3, atol=1e-5)


# Every source, every contrast and both kinds of kernels, but not all of their combinations: each compiles a step.
@pytest.mark.parametrize(
    ("source", "contrast", "kernels"),
    [
        ("first", "nce", "reference"),
        ("block", "moco", "reference"),
        ("all", "align", "reference"),
        ("all", "none", "reference"),
        ("bank", "nce", "triton"),
        ("bank", "moco", "reference"),
        ("bank", "align", "reference"),
    ],
)
def test_the_step_is_one_graph_and_stays_it(source, contrast, kernels, device):
    """No graph break (fullgraph raises), and after the warm-up nothing is compiled again: not in another epoch."""
    sections = {"contrast": {"loss": contrast}, "score": {"source": source, "block": 1}}
    if contrast == "nce":  # a division that changes with the epoch
        sections["mask"] = {"hints": 0.2, "importance": (0.2, 1.0)}
        sections["score"]["temperature"] = (3.0, 1.0)
    config = config_for(**sections, kernels=kernels, epochs=2)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    step = build_step(config, here(device))
    compile_step(step, "step", backend=backend)
    assert warm_up(step, 4, 1)
    assert len(graphs) == 1
    trained(step)
    assert len(graphs) == 1


def test_one_graph_under_autocast_too(device):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    step = build_step(config_for(precision="bf16"), here(device))
    compile_step(step, "step", backend=backend)
    assert warm_up(step, 4, 1)
    assert len(graphs) == 1


def test_blocks_of_one_shape_share_a_graph(device):
    """Encoder of 3 blocks: all tokens of the visible set, of the masked set, the last one's [CLS]; decoder: two."""
    config = config_for(model={"depth": 5})
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    step = build_step(config, here(device))
    compile_step(step, "blocks", backend=backend)
    warm_up(step, 4, 1)
    count = len(graphs)
    assert count <= 8
    trained(step)
    assert len(graphs) == count


def test_flops_of_compiled_blocks_are_counted_eagerly(device):
    """torch compiles nothing under a counter, and a block that asks for it fails there."""
    step = build_step(config_for(), here(device))
    expected = count_flops(step)
    for block in vit_blocks(step.model):
        block.compute = None
    assert Pretraining.count_flops(SimpleNamespace(train_step=step)) == expected
    assert all(vars(block)["compute"] is None for block in vit_blocks(step.model))


@pytest.mark.parametrize("taken_before", [0, 2])
def test_warm_up_leaves_no_trace(taken_before, device):
    step, untouched = (build_step(config_for(), here(device)) for _ in range(2))
    for one in (step, untouched):
        trained(one, steps=taken_before) if taken_before else None
    before = torch.get_rng_state()
    addresses = [p.data_ptr() for p in step.model.parameters()]
    warm_up(step, 3, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert [p.data_ptr() for p in step.model.parameters()] == addresses
    found, expected = trained(step), trained(untouched)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(found[1][name], value) for name, value in expected[1].items())
    for one, other in zip(step.ema.parameters(), untouched.ema.parameters()):
        assert torch.equal(one, other)


def test_a_step_that_does_not_compile_runs_eagerly_after_one_line(capsys, device):
    def broken(graph, inputs):
        raise RuntimeError("no such\n  instruction")

    expected, _ = trained(build_step(config_for(), here(device)))
    for what in ("step", "blocks"):
        step = build_step(config_for(), here(device))
        compile_step(step, what, backend=broken)
        assert not warm_up(step, 4, 1)
        said = capsys.readouterr().err
        assert said.startswith("train.compile failed, the run goes on without: ")
        assert "no such instruction" in said
        assert said.count("\n") == 1
        assert torch.equal(trained(step)[0], expected)


def test_an_error_of_the_step_itself_is_not_hidden(monkeypatch, device):
    step = build_step(config_for(), here(device))

    def fails(*_):
        raise RuntimeError("of the step")

    monkeypatch.setattr(type(step), "losses", fails)
    step.forward = step.losses
    with pytest.raises(RuntimeError, match="of the step"):
        warm_up(step, 4, 1)


@pytest.mark.parametrize(
    ("capability", "expected"), [(None, "off"), ((6, 1), "off"), ((7, 0), "step"), ((9, 0), "step")]
)
def test_auto(monkeypatch, capability, expected):
    monkeypatch.setattr(compiled.torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_compile("auto", torch.device("cuda" if capability else "cpu")) == expected
    assert choose_compile("blocks", torch.device("cpu")) == "blocks"


@pytest.mark.parametrize("attention", CUDA_ONLY)
def test_what_needs_cuda_is_refused_by_name(attention):
    cpu = here(torch.device("cpu"))
    with pytest.raises(ConfigError, match=rf"train\.attention={attention} needs CUDA, got cpu; use attention=sdpa"):
        check_device(config_for(attention=attention), cpu)
    with pytest.raises(ConfigError, match=r"train.cuda_graph=true needs CUDA, got cpu; use train.cuda_graph=false"):
        check_device(config_for(cuda_graph=True), cpu)
    with pytest.raises(ConfigError, match=r"train.find_batch=true needs CUDA, got cpu"):
        check_device(config_for(find_batch=True), cpu)


@pytest.mark.gpu
@pytest.mark.parametrize("compile_", ["off", "step"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("source", ["all", "bank"])
def test_a_captured_step_equals_the_step(source, compile_, precision):
    device, score = torch.device("cuda"), {"source": source}
    expected, _ = trained(build_step(config_for(score, precision=precision), here(device)))
    step = build_step(config_for(score, precision=precision, cuda_graph=True, compile=compile_), here(device))
    found, _ = trained(step, prepare_step(step, 4))
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_the_step_never_waits_for_the_device(kernels):
    device = torch.device("cuda")
    step = build_step(config_for(precision="auto", kernels=kernels), here(device))
    given = batches(2, device)
    step([given[0]], lr=1e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step([given[1]], lr=1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
