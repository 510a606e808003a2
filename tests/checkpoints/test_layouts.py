"""Other libraries' files and folders are recognised by their names; tokens stay what that library computes."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from ccmim_fast.checkpoints.convert import to_timm
from ccmim_fast.checkpoints.layouts import recognised
from ccmim_fast.checkpoints.published import Weights, read_weights
from ccmim_fast.cli import main
from ccmim_fast.errors import CheckpointError, ConfigError
from ccmim_fast.evaluation.encoders import Encoder, build_encoder, read_encoder

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def randomised(model):
    """Return a model whose every weight is random: initial zeros and ones would hide an exchange."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def small_vit(**options) -> VisionTransformer:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return randomised(timm.create_model("vit_tiny_patch16_224", **{"num_classes": 0, **sizes, **options}))


def tokens(place, pixels, arch="vit_tiny_patch16_224"):
    return build_encoder(read_encoder(str(place), arch, 2), (32, 32), 2).eval().forward_features(pixels)


@pytest.mark.parametrize("saved", ["folder", "memory", "sharded"])
@pytest.mark.parametrize(
    ("name", "arch", "more"),
    [
        ("ViT", "vit_tiny_patch16_224", {"intermediate_size": 128}),
        ("ViTMAE", "vit_tiny_patch16_224", {"mask_ratio": 0.0, "intermediate_size": 128}),
        ("Dinov2", "vit_small_patch14_dinov2", {}),
        ("Dinov2WithRegisters", "vit_small_patch14_reg4_dinov2", {}),
    ],
)
def test_transformers(transformers, tmp_path, name, arch, more, saved):
    """As its folder, as its state in memory, which has other names since 5, and as a folder of several files."""
    config = getattr(transformers, f"{name}Config")(**SIZES, **more, layer_norm_eps=1e-6)
    model = randomised(getattr(transformers, f"{name}Model")(config))
    if saved == "memory":
        torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "m.pth")
    else:
        model.save_pretrained(tmp_path / "m", max_shard_size="20KB" if saved == "sharded" else "5GB")
    place = tmp_path / ("m.pth" if saved == "memory" else "m")
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        if name == "ViTMAE":  # with a mask ratio of zero its patches are shuffled all the same
            noise = torch.arange(16.0).expand(2, 16)
            expected = model(pixels * 4 - 2, noise=noise).last_hidden_state
        else:
            expected = model(pixels * 4 - 2).last_hidden_state
        found = tokens(place, pixels * 4 - 2, arch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert read_weights(str(place)).layout.startswith("transformers' names")


@pytest.mark.parametrize("saved", ["folder", "memory"])
def test_transformers_mae_with_its_decoder(transformers, tmp_path, saved):
    """Later releases of transformers 5 write the decoder's blocks under other names than the published files have."""
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4}
    config = transformers.ViTMAEConfig(**SIZES, **decoder, intermediate_size=128, decoder_intermediate_size=64)
    model = randomised(transformers.ViTMAEForPreTraining(config))
    if saved == "folder":
        model.save_pretrained(tmp_path / "m")
        place = tmp_path / "m"
    else:
        torch.save(model.state_dict(), place := tmp_path / "m.pth")
    options = ["--arch=vit_tiny_patch16_224", "--decoder.num_heads=4", "--model.num_heads=2"]
    assert main(["import", str(place), *options, f"--out={tmp_path / 'run'}"]) == 0
    ours, theirs = read_weights(str(tmp_path / "run")).tensors, model.state_dict()
    for part, key in (("query", "q_proj"), ("value", "v_proj")):
        third = {"query": 0, "value": 2}[part]
        names = (f"decoder.decoder_layers.0.attention.{name}.weight" for name in (key, f"attention.{part}"))
        expected = next(theirs[name] for name in names if name in theirs)
        assert torch.equal(ours["decoder.blocks.0.attn.qkv.weight"].chunk(3)[third], expected)
    assert torch.equal(ours["decoder.mask_token"], theirs["decoder.mask_token"])
    assert torch.equal(ours["decoder.pred.weight"], theirs["decoder.decoder_pred.weight"])


def wrapped(weights, prefix, **beside):
    return {f"{prefix}{name}": value for name, value in weights.items()} | beside


CONTAINERS = {
    "plain": lambda w: w,
    "MAE": lambda w: {"model": w, "optimizer": {"state": {}}, "epoch": 3},
    "DDP": lambda w: {"state_dict": wrapped(w, "module.")},
    "DINO": lambda w: {
        "student": wrapped({k: v + 1 for k, v in w.items()}, "module.backbone."),
        "teacher": wrapped(w, "backbone.", **{"head.mlp.0.weight": torch.zeros(2)}),
    },
    "MoCo v3": lambda w: {
        "state_dict": wrapped(w, "module.base_encoder.")
        | wrapped(
            {k: v + 1 for k, v in w.items()},
            "module.momentum_encoder.",
            **{"module.predictor.0.weight": w["norm.bias"]},
        )
    },
    "Lightning": lambda w: {
        "state_dict": wrapped(w, "model.backbone.", **{"criterion.center": torch.zeros(1)}),
        "epoch": 1,
    },
    "averaged": lambda w: {"model": {k: v + 1 for k, v in w.items()}, "model_ema": w},
    "compiled": lambda w: wrapped(w, "_orig_mod."),
    "classifier": lambda w: w | {"head.weight": torch.zeros(5, 32), "head.bias": torch.zeros(5)},
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers_and_prefixes(tmp_path, kind):
    vit, pixels = small_vit(), torch.rand(1, 3, 32, 32)
    torch.save(CONTAINERS[kind](vit.state_dict()), tmp_path / "w.pth")
    torch.testing.assert_close(tokens(tmp_path / "w.pth", pixels), vit.forward_features(pixels))


@pytest.mark.parametrize("chunked", [False, True])
def test_dinov2s_own_file_with_registers(tmp_path, chunked):
    """Its [CLS] has a position, its registers have none and come behind it; timm adds the position to [CLS]."""
    vit = small_vit(reg_tokens=4, no_embed_class=True, init_values=0.1)
    own, pixels = vit.state_dict(), torch.rand(1, 3, 32, 32)
    position_11D = torch.randn(1, 1, 32)
    own["pos_embed"] = torch.cat([position_11D, own["pos_embed"]], 1)
    own["cls_token"] = own["cls_token"] - position_11D
    own["register_tokens"], own["mask_token"] = own.pop("reg_token"), torch.zeros(1, 32)
    if chunked:
        own = {f"blocks.0.{k.removeprefix('blocks.')}" if k.startswith("blocks.") else k: v for k, v in own.items()}
    torch.save(own, tmp_path / "reg.pth")
    found = build_encoder(
        read_encoder(str(tmp_path / "reg.pth"), "vit_small_patch14_reg4_dinov2", 2), (32, 32), 2
    ).eval()
    torch.testing.assert_close(found.forward_features(pixels), vit.forward_features(pixels))


@pytest.mark.parametrize("class_token", [True, False])
def test_a_norm_behind_the_pooling(tmp_path, class_token):
    """Features are timm's own: the mean of tokens, then the norm. A fine-tuned [CLS] takes it as its norm."""
    vit = small_vit(global_pool="avg", fc_norm=True, num_classes=5, class_token=class_token)
    torch.save({"model": vit.state_dict(), "epoch": 9}, tmp_path / "w.pth")
    weights = read_encoder(str(tmp_path / "w.pth"), "vit_tiny_patch16_224", 2)
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    encoder = Encoder(build_encoder(weights, (32, 32), 2), (0.0,) * 3, (1.0,) * 3).eval()
    found = encoder.norm(encoder(images)[:, encoder.prefix :].mean(1))
    pixels = images.permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(found, vit.forward_head(vit.forward_features(pixels), pre_logits=True))
    tuned = build_encoder(weights, (32, 32), 2, num_classes=3, pool="avg")
    torch.testing.assert_close(tuned.fc_norm.weight, vit.fc_norm.weight)
    if class_token:
        assert torch.equal(
            build_encoder(weights, (32, 32), 2, num_classes=3, pool="cls").norm.weight, vit.fc_norm.weight
        )
    out = tmp_path / "run"
    assert (
        main(["import", str(tmp_path / "w.pth"), "--arch=vit_tiny_patch16_224", f"--out={out}", "--model.num_heads=2"])
        == 0
    )
    imported = read_weights(str(out)).tensors
    assert torch.equal(imported["encoder.norm.bias"], vit.fc_norm.bias)
    assert torch.equal(imported["encoder.pos_embed"][:, -16:], vit.pos_embed[:, -16:])


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (
            {"conv_proj.weight": torch.zeros(1), "class_token": torch.zeros(1)},
            "no layout that is known: the first name is 'conv_proj",
        ),
        ({"layer1.0.conv1.weight": torch.zeros(1)}, "known are DINOv3's own names"),
        (
            {"embeddings.patch_embeddings.projection.weight": torch.zeros(8, 3, 2, 2)},
            "transformers' names: it has no positions that could be loaded",
        ),
        (
            {
                "embeddings.patch_embeddings.projection.weight": torch.zeros(8, 3, 2, 2),
                "adapter.0.weight": torch.zeros(1),
            },
            "transformers' names: 'adapter.0.weight' has no place",
        ),
        ({"epoch": 3}, "holds no plain dictionary of tensors"),
        ({}, "holds no plain dictionary of tensors"),
    ],
)
def test_other_files_are_refused_by_name(weights, words):
    with pytest.raises(CheckpointError, match=words.replace("(", r"\(")):
        recognised(weights, "w.pth")


@pytest.mark.parametrize("arch", ["beit_base_patch16_224", "vit_relpos_small_patch16_224", "samvit_base_patch16"])
def test_relative_positions_are_refused_by_name(tmp_path, arch):
    """BEiT has the very names of a DINOv3 but for these."""
    model = timm.create_model(arch, img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=0)
    for wrapped in (model.state_dict(), {"model": {f"module.{k}": v for k, v in model.state_dict().items()}}):
        torch.save(wrapped, tmp_path / "w.pth")
        with pytest.raises(CheckpointError, match=r"w\.pth: '.*rel.*_pos.*' tells relative positions, as of BEiT"):
            read_weights(str(tmp_path / "w.pth"))


def test_networks_that_are_no_encoders_are_named():
    """Each file has some name of an encoder's."""
    tensors = {"layers.0.blocks.0.attn.q_bias": torch.zeros(8), "patch_embed.proj.weight": torch.zeros(8, 3, 4, 4)}
    assert recognised(tensors, "swin")[1] == "timm's names, as of MAE, DINO, DINOv2 and MoCo v3"
    with torch.device("meta"):
        vit = timm.create_model("vit_tiny_patch16_224", depth=1)
    weights = Weights("cait.pth", to_timm(recognised(vit.state_dict(), "")[0]), "cait_xxs24_224")
    with pytest.raises(
        ConfigError, match=r"model\.arch=cait_xxs24_224 is a Cait; it must be timm's VisionTransformer or"
    ):
        build_encoder(weights, (32, 32))


def test_a_folder_that_is_damaged(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    save_file({"patch_embed.proj.weight": torch.zeros(8, 3, 2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        read_weights(str(tmp_path))
    (tmp_path / "config.json").write_text('{"hidden_size": "wide"}')
    with pytest.raises(CheckpointError, match="what it tells of the model is damaged"):
        read_weights(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointError, match="holds no plain dictionary of tensors"):
        read_weights(str(tmp_path))


def test_a_folder_of_older_versions(tmp_path):
    vit, pixels = small_vit(), torch.rand(1, 3, 32, 32)
    timm.models.save_for_hf(vit, tmp_path, model_args={"img_size": 32, "num_heads": 2}, safe_serialization=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "pytorch_model.bin"]
    found = build_encoder(read_encoder(str(tmp_path)), (32, 32)).eval()
    torch.testing.assert_close(found.forward_features(pixels), vit.forward_features(pixels))


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: path.write_text("hello"), r"it is cut short, or no file of torch \(KeyError\)"),
        (lambda path: path.touch(), r"it is cut short, or no file of torch \(EOFError\)"),
        (lambda path: torch.save(torch.nn.Linear(2, 2), path), r"as a whole model; save its state_dict\(\)"),
        (
            lambda path: torch.save({"patch_embed.proj.weight": torch.full((8, 3, 2, 2), torch.nan)}, path),
            "not finite: enc",
        ),
    ],
)
def test_reasons_name_the_cause(tmp_path, write, words, recwarn):
    write(tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=words):
        read_weights(str(tmp_path / "w.pth"))
    assert not recwarn.list
