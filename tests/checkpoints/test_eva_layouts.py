"""Weights of timm's Eva family are recognised, whoever wrote them; tokens stay what that library computes."""

import pytest
import timm
import torch

from ccmim_fast.checkpoints.convert import to_timm
from ccmim_fast.checkpoints.eva import likely_arch
from ccmim_fast.checkpoints.layouts import recognised
from ccmim_fast.checkpoints.published import read_weights
from ccmim_fast.cli import main
from ccmim_fast.config.evaluation import EvalOptimConfig
from ccmim_fast.errors import CheckpointError, ConfigError
from ccmim_fast.evaluation.detection.detector import use_windows_
from ccmim_fast.evaluation.encoders import OUTPUTS, build_encoder, keep_blocks_, maps_of, read_encoder
from ccmim_fast.evaluation.finetune import build_optimizer

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def randomised(model):
    """Return a model whose every weight is random: initial zeros and ones would hide an exchange."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def small(arch, **options):
    return randomised(timm.create_model(arch, **{"num_classes": 0, **SMALL, **options}))


def tokens(place, pixels, arch="", heads=0):
    weights = read_encoder(str(place), arch, heads)
    return weights, build_encoder(weights, tuple(pixels.shape[-2:]), heads).eval().forward_features(pixels)


@pytest.mark.parametrize("saved", ["folder", "memory", "sharded"])
@pytest.mark.parametrize(
    ("more", "arch"),
    [
        ({"num_register_tokens": 4}, "vit_small_patch16_dinov3_qkvb"),
        ({"query_bias": False, "value_bias": False, "num_register_tokens": 4}, "vit_small_patch16_dinov3"),
        ({"use_gated_mlp": True, "hidden_act": "silu", "num_register_tokens": 4}, "vit_small_plus_patch16_dinov3_qkvb"),
        ({}, "vit_small_patch16_dinov3_qkvb"),
    ],
)
def test_transformers_dinov3(transformers, tmp_path, more, arch, saved):
    """A folder tells its heads; a file of the state in memory has other names and is told them."""
    model = randomised(
        transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**SIZES, intermediate_size=128, **more))
    )
    place = tmp_path / "m"
    if saved == "memory":
        place = tmp_path / "m.pth"
        torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, place)
    else:
        model.save_pretrained(place, max_shard_size="20KB" if saved == "sharded" else "5GB")
    pixels = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
        named, heads = ("", 0) if saved != "memory" else (arch, 2)
        weights, found = tokens(place, pixels, named, heads)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (weights.arch, weights.layout.partition(",")[0]) == (arch, "transformers' names of DINOv3")


def dinov3s_own(weights):
    """Rename timm's weights to those of DINOv3's repository, with what its files have beside."""
    own = {"mask_token": torch.zeros(1, 32), "local_cls_norm.bias": torch.zeros(1)}
    own["rope_embed.periods"] = 100.0 ** (torch.arange(4) / 4)
    for name, value in weights.items():
        if name.endswith("attn.q_bias"):
            bias = torch.cat([value, torch.randn(32), weights[name.replace("q_bias", "v_bias")]])
            own[name.replace("q_bias", "qkv.bias")] = bias
            own[name.replace("q_bias", "qkv.bias_mask")] = torch.full((96,), torch.nan)
        elif not name.endswith("attn.v_bias"):
            for theirs, timms in ((".w1.", ".fc1_g."), (".w2.", ".fc1_x."), (".w3.", ".fc2.")):
                name = name.replace(timms, theirs) if "blocks.0.mlp.fc1_g.weight" in weights else name
            name = name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
            own[name.replace("reg_token", "storage_tokens")] = value
    return own


def eva02s_own(weights):
    """Rename timm's weights to those of EVA's repository, with what its files have beside."""
    own = {"mask_token": torch.zeros(1, 1, 32), "lm_head.weight": torch.zeros(2, 32), "rope.freqs_cos": torch.ones(9)}
    for name, value in weights.items():
        for theirs, timms in (
            ("mlp.w1", "mlp.fc1_g"),
            ("mlp.w2", "mlp.fc1_x"),
            ("mlp.w3", "mlp.fc2"),
            ("mlp.ffn_ln", "mlp.norm"),
            ("attn.inner_attn_ln", "attn.norm"),
            ("attn.q_bias", "attn.q_proj.bias"),
            ("attn.v_bias", "attn.v_proj.bias"),
        ):
            name = name.replace(timms, theirs)
        own[name] = value
    return own


FILES = {
    "DINOv3's own": ("vit_small_patch16_dinov3", dinov3s_own, "DINOv3's own names"),
    "with biases": ("vit_small_patch16_dinov3_qkvb", dinov3s_own, "DINOv3's own names"),
    "gated": ("vit_small_plus_patch16_dinov3_qkvb", dinov3s_own, "DINOv3's own names"),
    "timm's DINOv3": ("vit_small_patch16_dinov3_qkvb", dict, "timm's names of its Eva family"),
    "a teacher": (
        "vit_small_patch16_dinov3",
        lambda w: {"teacher": {f"backbone.{k}": v for k, v in w.items()}},
        "timm's names of its Eva family",
    ),
    "EVA-02's own": ("eva02_base_patch16_clip_224", eva02s_own, "timm's names of its Eva family"),
    "timm's EVA-02": ("eva02_small_patch14_224", dict, "timm's names of its Eva family"),
    "timm's EVA": ("eva_giant_patch14_224", dict, "timm's names of its Eva family"),
    "RoPE-ViT's": ("vit_base_patch16_rope_mixed_ape_224", dict, "timm's names of its Eva family"),
    "no [CLS]": ("vit_medium_patch16_rope_reg1_gap_256", dict, "timm's names of its Eva family"),
    "a pooling by attention": ("vit_pe_core_tiny_patch16_384", dict, "timm's names, as of MAE"),
    "no last norm": ("vit_pe_spatial_tiny_patch16_512", dict, "timm's names"),
    "few keys": ("vit_large_patch16_sapiens2", dict, "timm's names of its Eva family"),
}


@pytest.mark.parametrize("kind", FILES)
def test_files(tmp_path, kind):
    """As frozen features are read: the tokens before a norm that stands behind the pooling."""
    arch, theirs, words = FILES[kind]
    if not timm.is_model(arch):
        pytest.skip("an older timm")
    vit, pixels = small(arch, **({"num_kv_heads": 2} if "sapiens2" in arch else {})), torch.randn(2, 3, 32, 32)
    torch.save(theirs(vit.state_dict()), tmp_path / "w.pth")
    with torch.no_grad():
        weights, found = tokens(tmp_path / "w.pth", pixels, arch, 2)
        torch.testing.assert_close(found, vit.forward_features(pixels), rtol=1e-4, atol=1e-5)
    assert weights.layout.startswith(words)


@pytest.mark.parametrize("pool", ["avg", "cls"])
@pytest.mark.parametrize(
    "arch", ["eva02_small_patch14_224", "vit_small_patch16_dinov3", "vit_pe_spatial_tiny_patch16_512"]
)
def test_fine_tuning_has_timms_head(tmp_path, arch, pool):
    """The mean of tokens and a new norm, or [CLS] behind the last norm there is."""
    torch.save(small(arch).state_dict(), tmp_path / "w.pth")
    weights = read_encoder(str(tmp_path / "w.pth"), arch, 2, pretrained_size=(32, 32))
    vit = build_encoder(weights, (48, 32), 2, num_classes=5, pool=pool)
    assert vit(torch.randn(2, 3, 48, 32)).shape == (2, 5)
    assert vit.global_pool == {"avg": "avg", "cls": "token"}[pool]


def test_architectures_that_weights_tell(tmp_path, capsys):
    for arch in ("vit_small_patch16_dinov3", "vit_base_patch16_dinov3_qkvb", "vit_small_plus_patch16_dinov3"):
        with torch.device("meta"):
            weights = timm.create_model(arch, num_classes=0, depth=1).state_dict()
        assert likely_arch(recognised(weights, "w")[0], 0) == arch
    torch.save(small("eva02_small_patch14_224").state_dict(), tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"w\.pth: does not tell its architecture, .* Eva family; add --model\.arch"):
        read_encoder(str(tmp_path / "w.pth"))


def test_shapes_that_do_not_fit_end_in_a_line(tmp_path):
    weights = small("vit_small_patch16_dinov3_qkvb").state_dict()
    for name, value in (("reg_token", torch.zeros(())), ("cls_token", torch.zeros(32))):
        torch.save(weights | {name: value}, tmp_path / "w.pth")
        with pytest.raises(CheckpointError, match=rf"encoder\.{name} is of shape .* must have 3 dimensions"):
            read_weights(str(tmp_path / "w.pth"))
    own = dinov3s_own(weights)
    torch.save(own | {"blocks.0.attn.qkv.bias": torch.zeros(())}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="DINOv3's own names: chunk expects"):
        read_weights(str(tmp_path / "w.pth"))


@pytest.mark.parametrize(
    ("name", "weight", "words"),
    [
        ("layer.0.attention.k_proj.bias", torch.ones(32), r"blocks\.0\.attn\.k has a bias"),
        ("layer.0.attention.q_proj.bias", torch.ones(32), r"blocks\.0\.attn\.q and v: one has a bias alone"),
        ("adapter.weight", torch.ones(32), r"'adapter\.weight' has no place in a DINOv3 of timm's"),
    ],
)
def test_what_timm_has_no_place_for(name, weight, words):
    own = {f"layer.0.attention.{letter}_proj.weight": torch.zeros(32, 32) for letter in "qkv"}
    own |= {"embeddings.patch_embeddings.weight": torch.zeros(32, 3, 8, 8), name: weight}
    with pytest.raises(CheckpointError, match=f"transformers' names of DINOv3: {words}"):
        recognised(own, "w.pth")


@pytest.mark.parametrize("kind", ["transformers", "timm", "DINOv3's own"])
def test_a_dinov3_is_imported(transformers, tmp_path, capsys, kind):
    """A run goes on from it: its weights are timm's, bit for bit, and what was recognised is told in a line."""
    arch, place = "vit_small_patch16_dinov3_qkvb", tmp_path / "w.pth"
    vit = small(arch)
    if kind == "transformers":
        config = transformers.DINOv3ViTConfig(**SIZES, intermediate_size=128, num_register_tokens=4)
        model = randomised(transformers.DINOv3ViTModel(config))
        model.save_pretrained(place := tmp_path / "m")
        vit.load_state_dict(to_timm(read_weights(str(place)).tensors))
    else:
        torch.save(dinov3s_own(vit.state_dict()) if kind == "DINOv3's own" else vit.state_dict(), place)
    command = ["import", str(place), f"--out={tmp_path / 'run'}", "--data.image_size=[32,48]", "--model.num_heads=2"]
    assert main([*command, f"--arch={arch}"]) == 0
    assert f"{place}: " in capsys.readouterr().out
    imported = to_timm(read_weights(str(tmp_path / "run")).tensors)
    torch.testing.assert_close(imported, vit.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "arch", ["eva02_small_patch14_224", "vit_small_patch16_dinov3", "vit_base_patch16_rope_mixed_ape_224"]
)
def test_maps_of_images_of_any_size(tmp_path, arch):
    """Rotations and positions are those of the size that a batch has; windows, which know none, are refused."""
    torch.save(small(arch).state_dict(), tmp_path / "w.pth")
    weights, pixels = (
        read_encoder(str(tmp_path / "w.pth"), arch, 2, pretrained_size=(32, 32)),
        torch.randn(2, 3, 48, 40),
    )
    found = []
    for options in ({"image_size": (32, 32), "any_size": True}, {"image_size": (48, 40)}):
        vit = build_encoder(weights, num_heads=2, plain=True, **options).eval()
        found.append(maps_of(vit, keep_blocks_(vit, OUTPUTS), pixels))
    assert [tuple(one.shape) for one in found[0]] == [(2, 32, 6, 5)] * 4
    torch.testing.assert_close(*found)
    with pytest.raises(ConfigError, match=r"detect\.window=2: rotary positions are of the whole grid"):
        use_windows_(vit, 2, ())


@pytest.mark.parametrize("arch", ["vit_small_patch16_dinov3_qkvb", "vit_base_patch16_rope_mixed_224"])
def test_rates_of_fine_tuning_fall_from_block_to_block(arch):
    """Tokens, patches and learned frequencies (positions) have the lowest; the head and its norm the whole."""
    vit = timm.create_model(arch, **SMALL | {"num_classes": 5, "global_pool": "token", "use_fc_norm": False})
    optimizer = build_optimizer(vit, EvalOptimConfig(layer_decay=0.5, weight_decay=0.1))
    names = {id(parameter): name for name, parameter in vit.named_parameters()}
    rate = {names[id(p)]: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert set(rate) == set(names.values())
    for name, scale in rate.items():
        block = int(name.split(".")[1]) if name.startswith("blocks.") else -1
        expected = 1.0 if name.startswith(("head", "norm")) else 0.5 ** (2 - block)
        assert scale == expected, name
        assert not (decay[name] and (vit.get_parameter(name).ndim == 1 or "token" in name or "freqs" in name)), name
