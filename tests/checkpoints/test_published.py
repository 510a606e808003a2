"""What timm knows by name: downloaded by timm, loaded whole, with the mean and std of its images.

The hub is stood in for at the one function of timm's that asks it.
"""

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import _builder

from ccmim_fast.checkpoints.convert import to_timm
from ccmim_fast.checkpoints.published import read_weights
from ccmim_fast.cli import main
from ccmim_fast.errors import CheckpointError, ConfigError
from ccmim_fast.evaluation.encoders import IMAGENET, build_encoder, read_encoder
from ccmim_fast.evaluation.masks.subject import read_subject

NAME = "test_vit.r160_in1k"


@pytest.fixture
def hub(monkeypatch):
    """What is on the hub: repository -> weights; anything else is not to be reached."""
    held = {}

    def fetch(repository, **_):
        if repository not in held:
            raise OSError("we cannot find\nthe requested files in the local cache")
        return dict(held[repository])

    monkeypatch.setattr(_builder, "load_state_dict_from_hf", fetch)
    return held


@pytest.fixture
def published(hub):
    """A model on the hub."""
    vit = timm.create_model("test_vit")
    hub[f"timm/{NAME}"] = vit.state_dict()
    return vit.eval()


def test_a_tag_is_the_weights_of_that_tag(published):
    weights = read_encoder(f"timm:{NAME}")
    assert weights.arch == "test_vit"
    assert weights.mean == weights.std == (0.5, 0.5, 0.5)  # not ImageNet's
    pixels = torch.randn(2, 3, 160, 160)
    encoder = build_encoder(weights, (160, 160)).eval()
    torch.testing.assert_close(encoder.forward_features(pixels), published.forward_features(pixels), rtol=0, atol=0)
    tuned = build_encoder(weights, (96, 128), num_classes=5, pool="avg")
    assert tuned(torch.randn(1, 3, 96, 128)).shape == (1, 5)
    torch.testing.assert_close(tuned.blocks[0].attn.qkv.weight, published.blocks[0].attn.qkv.weight)


def test_no_tag_is_initial_weights(hub):
    weights = read_encoder("timm:test_vit")
    assert weights.tensors == {}
    assert (weights.mean, weights.std) == IMAGENET


@pytest.mark.parametrize(
    ("name", "heads"), [("vit_base_patch16_siglip_224.webli", 0), ("vit_small_patch14_reg4_dinov2.lvd142m", 5)]
)
def test_weights_without_cls_and_with_registers(hub, monkeypatch, name, heads):
    """SigLIP pools by attention and has no [CLS]; registers are prefix tokens. Shallow stand-ins of them."""
    arch = name.partition(".")[0]
    small = {"embed_dim": 64, "depth": 1, "num_heads": 2}
    made = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda n, **options: made(n, **small | options))
    vit = timm.create_model(arch, num_classes=0).eval()
    hub[f"timm/{name}"] = vit.state_dict()
    weights = read_encoder(f"timm:{name}")
    size = vit.patch_embed.img_size
    encoder = build_encoder(weights, size).eval()
    pixels = torch.randn(1, 3, *size)
    torch.testing.assert_close(encoder.forward_features(pixels), vit.forward_features(pixels), rtol=0, atol=0)
    assert encoder.num_prefix_tokens == heads
    assert build_encoder(weights, size, num_classes=3, pool="avg")(pixels).shape == (1, 3)
    if not heads:
        with pytest.raises(ConfigError, match=r"model\.pool=cls: timm:.* has no \[CLS\] token; nearest valid is avg"):
            build_encoder(weights, size, num_classes=3, pool="cls")


def test_weights_that_lack_something_are_refused(hub, published):
    """timm loads them strictly: nothing stays initial unnoticed."""
    del hub[f"timm/{NAME}"]["blocks.1.norm1.bias"]
    with pytest.raises(CheckpointError, match=r"timm cannot load it: .*Missing key.*blocks\.1\.norm1\.bias"):
        read_weights(f"timm:{NAME}")


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        (f"timm:{NAME}", 5, f"timm:{NAME}: timm cannot load it: we cannot find the requested files in the local cache"),
        ("timm:vit_base_patch16_224.mea", 2, "timm has no such weights; nearest: timm:vit_base_patch16_224.mae"),
        (
            "timm:vit_base_patch16_223.mae",
            2,
            "model.arch='vit_base_patch16_223': no model of timm; nearest is vit_base",
        ),
        ("timm:vit_tiny_patch16_384.", 2, "timm has no such weights; nearest: timm:vit_tiny_patch16_384.augreg"),
    ],
)
def test_mistakes_are_one_line(hub, tmp_path, monkeypatch, capsys, name, code, words):
    monkeypatch.chdir(tmp_path)
    for command in (["eval", "knn", name], ["import", name, "--out", "run"]):
        assert main(command) == code
        [line] = capsys.readouterr().err.splitlines()
        assert words in line
    assert list(tmp_path.iterdir()) == []


def test_import_reads_them_too(hub, published, tmp_path):
    """All that timm tells is a setting of the run: sizes, mean and std."""
    assert main(["import", f"timm:{NAME}", "--out", str(tmp_path / "run"), "--decoder.dim=32"]) == 0
    weights = read_encoder(str(tmp_path / "run"))
    assert (weights.arch, weights.mean) == ("test_vit", (0.5, 0.5, 0.5))
    expected = {name: value for name, value in published.state_dict().items() if not name.startswith("head.")}
    assert weights.tensors.keys() == expected.keys()
    assert all(torch.equal(weights.tensors[name], value) for name, value in expected.items())


def test_an_export_tells_its_heads_and_images(tmp_path):
    tensors = {"patch_embed.proj.weight": torch.zeros(8, 3, 2, 2), "blocks.0.attn.qkv.weight": torch.zeros(32, 8)}
    tensors["blocks.0.attn.qkv.bias"] = torch.zeros(32)
    arguments = '{"num_heads": 4, "img_size": [4, 6]}'
    about = {"arch": "test_vit", "timm_arguments": arguments, "mean": "[0.1]", "std": "[0.2]"}
    about |= {"max_value": "[4095]"}
    save_file(tensors, tmp_path / "told.safetensors", metadata=about)
    save_file(tensors, tmp_path / "bare.safetensors")
    told, bare = (read_weights(str(tmp_path / f"{name}.safetensors")) for name in ("told", "bare"))
    assert told[2:9] == ("test_vit", 4, (0.1,), (0.2,), (4, 6), None, (4095.0,))
    assert bare[2:9] == ("", 0, (), (), (), None, ())
    assert to_timm(told.tensors).keys() == tensors.keys()
    for key, value in (
        ("mean", "no"),
        ("mean", "[[1]]"),
        ("timm_arguments", "[]"),
        ("timm_arguments", '{"img_size": 4}'),
        ("std", '{"a": 1}'),
        ("max_value", "[0]"),
    ):
        save_file(tensors, tmp_path / "bad.safetensors", metadata=about | {key: value})
        with pytest.raises(CheckpointError, match="what it tells of itself is damaged"):
            read_weights(str(tmp_path / "bad.safetensors"))


def bare(path, arch, **sizes):
    """A file that tells nothing of itself."""
    vit = timm.create_model(arch, num_classes=0, img_size=32, depth=1, **sizes)
    torch.save(vit.state_dict(), path)


@pytest.mark.parametrize("command", ["knn", "masks"])
def test_heads_are_not_guessed(command, tmp_path, monkeypatch, capsys):
    """ViT-S has 6 heads; the 12 of ViT-B would load, and be another function."""
    monkeypatch.chdir(tmp_path)
    bare("small.pth", "vit_small_patch16_224")
    assert main(["eval", command, "small.pth"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "small.pth: does not tell its architecture and is 384 wide, which vit_base_patch16_224 is not" in line
    assert "nearest is --model.arch=vit_small_patch16_224" in line
    bare("narrow.pth", "vit_tiny_patch16_224", embed_dim=56, num_heads=2)
    with pytest.raises(ConfigError, match=r"is 56 wide.* nearest is --model\.arch=vit_tiny_patch16_224"):
        read_encoder("narrow.pth")


def test_heads_that_are_told_are_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bare("small.pth", "vit_small_patch16_224")
    bare("base.pth", "vit_base_patch16_224")
    for name, arch, heads, expected in (
        ("base.pth", "", 0, "vit_base_patch16_224"),
        ("small.pth", "vit_small_patch16_224", 0, "vit_small_patch16_224"),
        ("small.pth", "", 6, "vit_base_patch16_224"),
    ):
        assert read_encoder(name, arch, heads).arch == expected
        told = [f"--model.arch={arch}"] * bool(arch) + [f"--model.num_heads={heads}"] * bool(heads)
        assert read_subject(name, [*told, "--decoder.depth=1"]).config.model.arch == expected
    preset = ["--config", "ccmim_vit_small", "--decoder.depth=1"]
    assert read_subject("small.pth", preset).config.model.arch == "vit_small_patch16_224"
