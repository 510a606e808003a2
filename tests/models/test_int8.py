"""The teacher in 8 bits: the products, [CLS], hM and the attention that a bank keeps, also where channels differ."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import images, tiny_config, tiny_model, total_loss

from ccmim_fast.build.model import build_model
from ccmim_fast.config.schema import Config, DataConfig
from ccmim_fast.engine import teacher
from ccmim_fast.engine.build import build_step, check_device
from ccmim_fast.engine.dry_run import synthetic_batch
from ccmim_fast.engine.step import teacher_in
from ccmim_fast.errors import ConfigError
from ccmim_fast.models import int8
from ccmim_fast.models.ccmim import CCMIM
from ccmim_fast.models.int8 import Int8Layers, has_int8
from ccmim_fast.ranks.session import Session

HERE = Session(0, 1, torch.device("cpu"))
needs_int8 = pytest.mark.skipif(not has_int8(), reason="this CPU has no AVX-512 VNNI, or this torch no oneDNN")


@pytest.fixture
def draw():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def every_layer(monkeypatch):
    """Layers of few rows too, as the smallest model has."""
    monkeypatch.setattr(Int8Layers.__init__, "__defaults__", (1,))


def in_8_bits(x_RA, weight_DA, bias_D):
    """The specification, in float64 and loops over channels and outputs."""
    x_RA, weight_DA = x_RA.double(), weight_DA.double()
    moved_RA, scaled_DA, bias_D = x_RA.clone(), weight_DA.clone(), bias_D.double().clone()
    for a in range(x_RA.shape[1]):
        shift = (x_RA[:, a].max() + x_RA[:, a].min()) / 2
        divisor = ((x_RA[:, a].max() - shift) / weight_DA[::4, a].abs().max()).sqrt()
        moved_RA[:, a] = (x_RA[:, a] - shift) / divisor
        scaled_DA[:, a] *= divisor
        bias_D += weight_DA[:, a] * shift
    scale = moved_RA.abs().max() / 127
    result_RD = torch.empty(len(x_RA), len(weight_DA), dtype=torch.float64)
    for d, row_A in enumerate(scaled_DA):
        of_row = row_A.abs().max() / 127
        result_RD[:, d] = ((moved_RA / scale).round() @ (row_A / of_row).round()) * scale * of_row + bias_D[d]
    return result_RD


@needs_int8
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(300, 48, 20), (129, 33, 257), (4, 8, 5), (700, 64, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_specification(draw, rows, inputs, outputs, dtype):
    """The same whole numbers, but for a value here and there between two."""
    x_RA = (torch.randn(rows, inputs, generator=draw) * torch.rand(inputs, generator=draw) + 3).to(dtype)
    x_RA[0], x_RA[-1] = x_RA[0] + 0.5, x_RA[-1] - 0.5
    weight_DA, bias_D = torch.randn(outputs, inputs, generator=draw), torch.randn(outputs, generator=draw)
    with torch.no_grad(), Int8Layers(least_rows=1):
        found_RD, without_bias_RD = F.linear(x_RA, weight_DA, bias_D), F.linear(x_RA, weight_DA)  # of one weight
    assert found_RD.dtype == dtype
    expected_RD = in_8_bits(x_RA, weight_DA, bias_D)
    bound = {torch.float32: 2e-3, torch.bfloat16: 1e-2}[dtype] * expected_RD.abs().max()
    assert (found_RD - expected_RD).abs().max() < bound
    assert (without_bias_RD + bias_D - expected_RD).abs().max() < 2 * bound


@needs_int8
def test_error_of_a_layer(draw):
    """About 1 % of the result's norm, wherever its channels lie and however wide they are; bf16 has 0.3 %."""
    weight_DA = torch.randn(256, 192, generator=draw) * 0.05
    plain_RA = torch.randn(8, 64, 192, generator=draw)
    wide_RA, far_RA = plain_RA.clone(), plain_RA.clone()
    wide_RA[..., :3] *= 50
    far_RA[..., :3] += 50
    far_RA[..., 5] = 1e4  # constant
    for x in (plain_RA, wide_RA, far_RA):
        with torch.no_grad(), Int8Layers():
            found = F.linear(x, weight_DA)
        centred = (x - x.flatten(0, 1).mean(0)).double() @ weight_DA.double().T
        # Against what varies, not against what all rows have in common.
        assert (found - x.double() @ weight_DA.double().T).norm() < 0.016 * centred.norm()


@needs_int8
def test_degenerate_layers(draw):
    """Zeros stay zeros, and what is not finite does not become finite: a step with it is noticed."""
    x, weight_DA = torch.randn(600, 16, generator=draw), torch.randn(8, 16, generator=draw)
    weight_DA[3] = 0
    with torch.no_grad():
        for value in (torch.nan, torch.inf):
            bad = x.clone()
            bad[7, 3] = value
            with Int8Layers():
                assert not F.linear(bad, weight_DA)[7].isfinite().any()
        with Int8Layers():
            assert not F.linear(x, torch.where(torch.arange(16) == 2, torch.nan, weight_DA)).isfinite().any()
        with Int8Layers():
            assert not F.linear(torch.zeros(600, 16), weight_DA).any()
        with Int8Layers():
            assert not F.linear(x, torch.zeros(8, 16)).any()
        with Int8Layers():
            assert not F.linear(x, weight_DA)[:, 3].any()
        with Int8Layers():
            torch.testing.assert_close(F.linear(torch.ones(600, 16), weight_DA)[0], weight_DA.sum(1))


@needs_int8
def test_weights_are_quantised_once(draw, monkeypatch):
    """Later activations, of another range too, meet the same weights; a slice of a weight is another layer."""
    made, quantised = [], int8.quantised
    monkeypatch.setattr(int8, "quantised", lambda weight, *rest: made.append(weight.shape) or quantised(weight, *rest))
    weight_DA = torch.randn(64, 32, generator=draw)
    with torch.no_grad():
        layers = Int8Layers()
        for factor in (1, 3, 1):
            with layers:
                x = factor * torch.randn(600, 32, generator=draw)
                found, part = F.linear(x, weight_DA), F.linear(x, weight_DA[:32])
            for ours, expected in ((found, x @ weight_DA.T), (part, x @ weight_DA[:32].T)):
                assert (ours - expected).norm() < 0.03 * expected.norm()
    assert made == [(64, 32), (32, 32)]


@needs_int8
def test_what_is_left_to_torch(draw):
    """Few rows, other dtypes, passes with a gradient, and everything outside."""
    x, weight_DA = torch.randn(600, 16, generator=draw), torch.randn(8, 16, generator=draw, requires_grad=True)
    exact = F.linear(x, weight_DA)
    with Int8Layers():
        assert torch.equal(F.linear(x, weight_DA), exact)
        with torch.no_grad():
            assert not torch.equal(F.linear(x, weight_DA), exact)
            for few in (x[:511], x[:0], x[0]):
                torch.testing.assert_close(F.linear(few, weight_DA), few @ weight_DA.T)
            torch.testing.assert_close(F.linear(x.double(), weight_DA.double()), x.double() @ weight_DA.double().T)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert F.linear(x, weight_DA).dtype == torch.bfloat16
    assert torch.equal(F.linear(x, weight_DA), exact)


@pytest.fixture(scope="module")
def vit_base():
    """ViT-B of random weights and biases, for images of 112 pixels."""
    torch.manual_seed(0)
    model = build_model(Config(data=DataConfig(image_size=(112, 112))))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def with_outliers(model: CCMIM, kind: str, draw: torch.Generator) -> CCMIM:
    """Return a copy some of whose channels are as in trained ViTs.

    `norm`: large gains of a norm, and weights behind it as much smaller. `stream`: tokens have them from the third
    block on. `hidden`: hidden units and values. `gain`: large gains which nothing makes up for, so attention is steep.
    """
    model = copy.deepcopy(model)
    width = model.encoder.embed_dim
    channels = torch.randperm(width, generator=draw)[:6]
    with torch.no_grad():
        for index, block in enumerate(model.encoder.blocks):
            for norm, layer in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
                if kind in ("norm", "gain"):
                    norm.weight[channels] *= 50 if kind == "norm" else 20
                if kind == "norm":
                    layer.weight[:, channels] /= 50
            if kind == "stream" and index == 2:
                block.mlp.fc2.bias[channels[:2]] += 50
                block.mlp.fc2.weight[channels[2:]] *= 20
            if kind == "hidden":
                hidden = torch.randperm(4 * width, generator=draw)[:8]
                block.mlp.fc1.weight[hidden] *= 20
                block.mlp.fc2.weight[:, hidden] /= 20
                block.attn.qkv.weight[2 * width + channels] *= 20
    return model


def smooth_images(count: int, side: int, draw: torch.Generator) -> torch.Tensor:
    noise = torch.randn(count, 3, 7, 7, generator=draw)
    return (120 + 50 * F.interpolate(noise, side, mode="bicubic")).clamp(0, 255).permute(0, 2, 3, 1).byte()


def cosine(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The smallest of the rows."""
    return F.cosine_similarity(found.double(), expected.double(), dim=1).min().item()


@needs_int8
@pytest.mark.parametrize(
    ("kind", "precision"),
    [("plain", "fp32"), ("plain", "bf16"), ("norm", "bf16"), ("stream", "bf16"), ("hidden", "bf16"), ("gain", "bf16")],
)
def test_teacher_of_vit_base(vit_base, every_layer, draw, kind, precision):
    """Cosines of [CLS] and of its attention are 0.999 at least; hM, which BatchNorm blows up, moves as by bf16."""
    model = with_outliers(vit_base, kind, draw)
    inputs, found = [], {}
    model.projector.register_forward_pre_hook(lambda module, given: inputs.append(given[0].float()))
    divided = model.embed_and_divide(smooth_images(8, 112, draw), torch.arange(8), 0)
    for form in ("full", "bf16", "int8"):
        half = form == "bf16" or (form == "int8" and precision == "bf16")
        with torch.autocast("cpu", torch.bfloat16, enabled=half), teacher_in(model, form):
            h_BE, row_BM = model.encode_masked(divided.masked, divided.partition.ids_masked_BM)
        found[form] = inputs[-1], row_BM.exp(), h_BE.float()
    assert not torch.equal(found["int8"][0], found[precision.replace("fp32", "full")][0])
    for ours, full in zip(found["int8"][:2], found["full"][:2], strict=True):
        assert cosine(ours, full) >= 0.999
    errors = {form: (found[form][2] - found["full"][2]).norm().item() for form in ("bf16", "int8")}
    assert errors["int8"] < 4 * errors["bf16"], errors


@needs_int8
@pytest.mark.parametrize("source", ["bank", "all", "first"])
def test_gradients_are_those_of_a_teacher_that_is_a_constant(every_layer, source):
    """Nothing is trained through it, and the student's pass is in full: with its hM and masks given, bit for bit."""
    model, config = tiny_model(torch.float32, score={"source": source})
    pictures, ids = images(), torch.arange(4)
    with teacher_in(model, "int8"):
        partition = model(pictures, ids, 0).partition
        output = model(pictures, ids, 0, partition=partition)
        total_loss(model, output, pictures, config).total.backward()
    given = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    plain = model(pictures, ids, 0, partition=partition)
    assert not output.masked_BE.requires_grad
    assert torch.equal(output.visible_BE, plain.visible_BE)
    assert torch.equal(output.pred_BMP, plain.pred_BMP)
    assert not torch.equal(output.masked_BE, plain.masked_BE)
    total_loss(model, plain._replace(masked_BE=output.masked_BE), pictures, config).total.backward()
    assert given.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(p.grad, given[name]) for name, p in model.named_parameters() if name in given)


@needs_int8
@pytest.mark.parametrize(("score", "precision"), [("bank", "bf16"), ("all", "fp32")])
def test_a_step_trains(every_layer, monkeypatch, score, precision):
    """The loss falls as it does without; the micro-batches of a step share weights, and each step has its own."""
    losses, made, quantised = {}, [], int8.quantised
    monkeypatch.setattr(int8, "quantised", lambda weight, *rest: made.append(weight.shape) or quantised(weight, *rest))
    for form in ("same", "int8"):
        config = tiny_config(
            score={"source": score},
            train={"batch_size": 4, "precision": precision},
            teacher={"precision": form},
        )
        step = build_step(config, HERE)
        pictures = smooth_images(8, 48, torch.Generator().manual_seed(0))[:, :32]
        found = [step([batch(step, pictures[:4]), batch(step, pictures[4:])], 2e-3).total.item() for _ in range(10)]
        losses[form] = found
        counted = len(made)
        step([batch(step, pictures[:4])], 2e-3)  # of one micro-batch, as many as of two
        assert len(made) - counted == counted / 10
        assert bool(counted) == (form == "int8")
        assert step.model.without_gradient is None
        assert found[-1] < 0.9 * found[0]
    assert losses["int8"] != losses["same"]


def batch(step, pictures):
    return synthetic_batch(step, len(pictures))._replace(images_BHWC=pictures)


@needs_int8
def test_scores_of_all_blocks(every_layer, draw):
    model, _ = tiny_model(torch.float32, score={"source": "all"})
    x_BLD = model.embed(images())
    expected = model.score(x_BLD)
    with teacher_in(model, "int8"):
        found = model.score(x_BLD)
    assert not torch.equal(found, expected)
    assert cosine(found.softmax(1), expected.softmax(1)) >= 0.999


@needs_int8
@pytest.mark.parametrize("arch", ["eva02_tiny_patch14_224", "vit_small_patch16_18x2_224"])
def test_blocks_of_other_classes(every_layer, arch):
    """Eva's gated MLP and rotations, and timm's parallel blocks, whose attention is watched."""
    sizes = {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
    model, _ = tiny_model(torch.float32, score={"source": "bank"}, model={"arch": arch, **sizes})
    divided = model.embed_and_divide(images(), torch.arange(4), 0)
    found = {}
    for form in ("same", "int8"):
        with teacher_in(model, form):
            h_BE, row_BM = model.encode_masked(divided.masked, divided.partition.ids_masked_BM)
        found[form] = h_BE, row_BM.exp()
    assert not torch.equal(*(h_BE for h_BE, _ in found.values()))
    for ours, full in zip(found["int8"], found["same"], strict=True):
        assert cosine(ours, full) >= 0.99


@pytest.mark.parametrize(
    ("train", "ranks", "why"),
    [
        ({"compile": "blocks"}, 1, "cannot be compiled, as train.compile=blocks does"),
        ({"compile": "step"}, 1, "cannot be compiled, as train.compile=step does"),
        ({"parallel": "fsdp"}, 2, "needs whole weights, and train.parallel=fsdp divides them"),
    ],
)
def test_where_there_are_no_8_bits(monkeypatch, train, ranks, why):
    """It is refused in a line that names what to do; with `auto` the run goes on."""
    monkeypatch.setattr(teacher, "has_int8", lambda: True)
    here, train = Session(0, ranks, torch.device("cpu")), {"batch_size": 4, "precision": "fp32", **train}
    with pytest.raises(ConfigError, match=rf"^teacher\.precision=int8: {why}; use teacher\.precision=same$"):
        check_device(tiny_config(teacher={"precision": "int8"}, train=train), here)
    check_device(tiny_config(train=train), here)


def test_devices_without_8_bits(monkeypatch):
    config = tiny_config(teacher={"precision": "int8"}, train={"batch_size": 4})
    with pytest.raises(ConfigError, match=r"^teacher\.precision=int8: needs a CPU, got cuda; use"):
        check_device(config, Session(0, 1, torch.device("cuda")))
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(
        ConfigError, match=r"^teacher\.precision=int8: needs products of 8-bit integers \(AVX-512 VNNI\)"
    ):
        check_device(config, HERE)
    assert (
        teacher.choose_teacher(build_step(tiny_config(train={"batch_size": 4}, teacher={"precision": "auto"}), HERE), 4)
        is None
    )
