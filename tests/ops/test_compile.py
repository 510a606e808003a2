"""The whole model, loss and backward pass with kernels is one graph for torch.compile, equal to eager."""

import pytest
import torch
from tiny import images, tiny_config

from ccmim_fast.build.model import build_model, build_objective

CASES = {
    "all": {"score": {"source": "all"}},
    "first, moco, hog": {"score": {"source": "first"}, "contrast": {"loss": "moco"}, "target": {"kind": "hog"}},
    "MAE": {"mask": {"strategy": "random"}, "contrast": {"loss": "none"}},
    "block": {"mask": {"strategy": "block", "block_min": 2}, "teacher": {"tokens": 0.4}},
    "bank": {"score": {"source": "bank"}, "teacher": {"tokens": 0.4}},
}


@pytest.mark.parametrize("case", CASES)
def test_one_graph_and_the_same_gradients(case, device):
    config = tiny_config(train={"kernels": "triton"}, **CASES[case])
    model = build_model(config).to(device).train()
    objective = build_objective(config, model)
    pixels, ids = images(4).to(device), torch.arange(4, device=device)

    def loss_of(epoch):
        return objective(model(pixels, ids, epoch), pixels).total

    results = []
    for run in (loss_of, torch.compile(loss_of, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        loss = run(3)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 20
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
