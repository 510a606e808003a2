"""How the form of a peer is chosen, and that each form is the same training step. Nothing here says how fast one is."""

import importlib

import pytest
import torch
from torch import nn

OFFERED = '''
"""A step in several forms; how long a step takes is an attribute, which the test's clock reads."""
import torch

SECONDS = {"slow": 3.0, "fast": 1.0, "wrong": 0.1, "broken": 0.1, "nan": 0.1}

def forms(precision):
    return {"kind": ("slow", "fast", "wrong", "broken", "nan"), "other": ("a", "b"), "only": (precision,)}

def build(arch, images_BHWC, precision, kind="slow", other="a", only=""):
    assert only == "fp32"
    if kind == "broken":
        raise RuntimeError("no such kernel\\nof this size")
    losses = iter([float("nan")] * 99 if kind == "nan" else [1.0, 0.9 if kind == "wrong" else 0.8] * 50)
    def step():
        return torch.tensor(next(losses))
    step.seconds = SECONDS[kind] * (2.0 if other == "b" else 1.0)
    return step
'''


@pytest.fixture
def job(module, tmp_path):
    path = tmp_path / "offered.py"
    path.write_text(OFFERED)
    return module("measure").Job([], f"{path}:build", "vit_tiny_patch16_224", 2, 32, "cpu", "fp32", 1, 0.0)


@pytest.fixture
def plain_step(module, monkeypatch):
    monkeypatch.syspath_prepend(module("contenders").PEERS)
    return module("plain_step")


def test_the_fastest_right_form(module, job, monkeypatch):
    """Each argument in turn, with what was chosen before it; what is wrong or fails is out, with its reason."""
    forms = module("forms")
    monkeypatch.setattr(forms, "seconds_of", lambda step, device: step.seconds)
    found = forms.search(job)
    assert found.form == {"kind": "fast", "other": "a", "only": "fp32"}
    assert found.milliseconds == {"kind": {"slow": 3000.0, "fast": 1000.0}, "other": {"a": 1000.0, "b": 2000.0}}
    assert found.dropped == {
        "kind=wrong": "the loss of step 2 is 0.9, of the default form 0.8",
        "kind=broken": "RuntimeError: no such kernel of this size",
        "kind=nan": "the loss of step 1 is nan, of the default form 1",
    }
    line = found.line()
    assert line.startswith("kind=fast (slow 3000 ms, fast 1000 ms); other=a")
    assert line.endswith("not kind=nan: the loss of step 1 is nan, of the default form 1")
    assert "\n" not in line


@pytest.mark.parametrize("offered", ["", "def forms(precision): return {'kind': ('slow',)}\n"])
def test_a_peer_with_nothing_to_choose_takes_no_step(module, job, tmp_path, offered):
    (tmp_path / "offered.py").write_text(f"{offered}def build(arch, images, precision): raise AssertionError\n")
    assert module("forms").search(job).form == ({"kind": "slow"} if offered else {})


@pytest.mark.parametrize(("precision", "asked"), [("fp32", False), ("bf16", True), ("fp16", False)])
def test_weights_in_bf16_are_asked_of_bf16_alone(plain_step, precision, asked):
    offered = plain_step.forms(precision)
    assert ("weights" in offered) is asked
    assert offered["attention"] == ("sdpa", "eager")
    assert list(offered)[-1] == "compile"  # the costliest last


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 4, stride=4), nn.LayerNorm(8)
        self.linear = nn.Linear(8, 5)
        self.unused = nn.Linear(2, 2)
        self.frozen = nn.Parameter(torch.ones(8), requires_grad=False)

    def forward(self, images):
        return self.linear(self.norm(self.conv(images).flatten(2).mean(2) * self.frozen)).square().mean()


def trained(plain_step, steps, precision="fp32", **form):
    """Losses and weights after so many steps from the same weights."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8)
    model = Model()
    step = plain_step.plain_step(model, lambda model, images: model(images), images, precision, **form)
    losses = [step().item() for _ in range(steps)]
    return losses, {name: p.detach().clone() for name, p in model.named_parameters()}, step


def test_a_step_is_torchs_adamw(plain_step, module):
    """Held against a loop in float64 over three steps; biases and norms have no decay."""
    lr, (beta1, beta2), decay = (
        module("contenders").LR,
        plain_step.OptimConfig.betas,
        plain_step.OptimConfig.weight_decay,
    )
    _, found, _ = trained(plain_step, 3)
    torch.manual_seed(0)
    images = plain_step.normalised(torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8)).double()
    model = Model().double()
    means = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    for number in range(1, 4):
        model(images).backward()
        for name, p in model.named_parameters():
            if p.grad is None:
                continue
            first, second = means[name]
            first.mul_(beta1).add_(p.grad, alpha=1 - beta1)
            second.mul_(beta2).add_(p.grad**2, alpha=1 - beta2)
            with torch.no_grad():
                p.mul_(1 - lr * (decay if p.ndim > 1 else 0.0))
                p.sub_(lr * (first / (1 - beta1**number)) / ((second / (1 - beta2**number)).sqrt() + 1e-8))
            p.grad = None
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            found[name].double(), p, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("form", [{"layout": "channels_last"}, {"weights": "bf16"}, {}])
def test_each_form_is_the_same_training(plain_step, form):
    expected, weights, _ = trained(plain_step, 4)
    precision = "bf16" if form.get("weights") else "fp32"
    losses, found, _ = trained(plain_step, 4, precision, **form)
    assert losses == pytest.approx(expected, rel=0.02)
    assert losses[-1] < losses[0]
    # AdamW's first steps are as long as its rate, whatever the gradient: weights part by a few of them.
    assert all((found[name] - weights[name]).abs().max() <= 4 * 2 * 1.5e-4 for name in weights)
    assert all(p.dtype == torch.float32 for p in found.values())


def test_updates_that_bf16_cannot_hold_are_not_lost(plain_step):
    """A weight near 1 moves by 1.5e-4 a step, 1/26 of bf16's distance there: after some steps the copy moves too."""
    own = nn.Linear(4, 4)
    nn.init.ones_(own.weight)
    copied = plain_step.CopiedWeights(own, torch.bfloat16)
    optimizer = torch.optim.AdamW(own.parameters(), lr=1.5e-4, weight_decay=0.0)
    seen = []
    for _ in range(40):
        copied.model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        copied.take_gradients()
        optimizer.step()
        copied.take_weights()
        seen.append(copied.model.weight[0, 0].item())
    assert own.weight[0, 0].item() == pytest.approx(1 - 40 * 1.5e-4, abs=1e-6)
    assert seen[0] == 1.0
    assert seen[-1] == torch.tensor(1 - 40 * 1.5e-4, dtype=torch.bfloat16).item()


def test_compile_is_asked_of_the_model_that_computes(plain_step, monkeypatch):
    asked = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: asked.append((self.linear.weight.dtype, options)))
    trained(plain_step, 1, "bf16", compile="model", weights="bf16")
    trained(plain_step, 1, "bf16", compile="off")
    assert asked == [(torch.bfloat16, {"dynamic": False})]


PEERS = {"transformers": "transformers_mae", "lightly": "lightly_mae", "stable-pretraining": "stable_mae"}


def build_of(module, name):
    contender = module("contenders").CONTENDERS[name]
    if not contender.installed:
        pytest.skip(f"{name}: {contender.install}")
    return contender, module("contenders").load_peer(contender.peer)


@pytest.mark.slow
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_does_the_work_of_mae(module, plain_step, name):
    """Its own count is the design's for 8 decoder blocks of 512, a quarter of the patches seen; its loss falls."""
    contender, build = build_of(module, name)
    flop_counter = importlib.import_module("ccmim_fast.profile.meter").flop_counter
    torch.manual_seed(0)
    step = build("vit_base_patch16_224", torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8), "fp32")
    with flop_counter() as counter:
        first = step()
    deviation = counter.get_total_flops() / 2 / 1e9 / contender.design["vit_base_patch16_224"] - 1
    assert module("contenders").as_expected(contender, deviation), deviation
    assert step() < first


@pytest.mark.slow
@pytest.mark.parametrize("form", [{"attention": "eager"}, {"layout": "channels_last"}, {"weights": "bf16"}], ids=str)
@pytest.mark.parametrize("name", PEERS)
def test_the_forms_of_a_peer_agree(module, plain_step, name, form):
    _, build = build_of(module, name)
    precision = "bf16" if "weights" in form else "fp32"
    images = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8)

    def losses(precision, **form):
        torch.manual_seed(0)
        step = build("vit_tiny_patch16_224", images, precision, **form)
        torch.manual_seed(1)
        return [step().item() for _ in range(2)]

    assert losses(precision, **form) == pytest.approx(losses("fp32"), rel=0.02 if precision == "bf16" else 1e-3)
