"""What config.json tells of weights is read, or refused, or told: never ignored where it changes the result."""

import json

import pytest
import timm
import torch
from timm.models import save_for_hf

from ccmim_fast.checkpoints.layouts import recognised
from ccmim_fast.checkpoints.published import read_weights
from ccmim_fast.checkpoints.run import open_run
from ccmim_fast.cli import main
from ccmim_fast.errors import CheckpointError
from ccmim_fast.evaluation.encoders import build_encoder, read_encoder

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
ARCH = "vit_tiny_patch16_224"
ARCHES = {"ViT": ARCH, "Dinov2": "vit_small_patch14_dinov2", "DINOv3ViT": "vit_small_patch16_dinov3_qkvb"}


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def saved(transformers, folder, name="ViT", kind="Model", **options):
    more = {} if name.startswith("Dinov2") else {"intermediate_size": 128}
    config = getattr(transformers, f"{name}Config")(**{**SIZES, "layer_norm_eps": 1e-6, **more, **options})
    model = getattr(transformers, f"{name}{kind}")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.eval().save_pretrained(folder)
    return model


def imported(folder, out, *options):
    return main(["import", str(folder), "--out", str(out), *options])


def evaluated(folder, arch=ARCH):
    return build_encoder(read_encoder(str(folder), arch), (32, 32)).eval()


def same_tokens(folder, model, arch=ARCH):
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected, found = model(pixels).last_hidden_state, evaluated(folder, arch).forward_features(pixels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ARCHES)
@pytest.mark.parametrize("activation", ["relu", "quick_gelu", "gelu_new", "silu"])
def test_another_activation_is_refused(transformers, tmp_path, capsys, name, activation):
    saved(transformers, tmp_path / "m", name, hidden_act=activation)
    assert imported(tmp_path / "m", tmp_path / "run", f"--arch={ARCHES[name]}") == 5
    assert "its MLP has the activation" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="its MLP has the activation"):
        evaluated(tmp_path / "m", ARCHES[name])


@pytest.mark.parametrize(
    ("activation", "arch"), [("gelu_python", ARCH), ("quick_gelu", "vit_small_patch32_clip_quickgelu_224")]
)
def test_the_activation_of_the_architecture(transformers, tmp_path, activation, arch):
    arch = arch if timm.is_model(arch) else "vit_base_patch32_clip_quickgelu_224"
    saved(transformers, tmp_path / "m", hidden_act=activation)
    if arch == ARCH:
        evaluated(tmp_path / "m", arch)
    else:  # which has a norm before its blocks
        with pytest.raises(CheckpointError, match="norm_pre"):
            evaluated(tmp_path / "m", arch)


@pytest.mark.parametrize(("told", "words"), [({"act_layer": "relu"}, "'relu'"), ({"rope_temperature": 10.0}, "is 10")])
def test_timms_arguments(tmp_path, told, words):
    arch = ARCH if "act_layer" in told else ARCHES["DINOv3ViT"]
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, **told}
    save_for_hf(timm.create_model(arch, num_classes=0, **sizes), tmp_path, model_args=sizes)
    with pytest.raises(CheckpointError, match=words):
        evaluated(tmp_path, "")


def test_an_argument_that_nobody_reads_is_told(tmp_path):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    save_for_hf(timm.create_model(ARCH, num_classes=0, **sizes), tmp_path, model_args=sizes | {"attn_layer": "diff"})
    assert read_weights(str(tmp_path)).layout.endswith('config.json tells what is not read here: attn_layer="diff"')


def test_another_base_of_rotations_is_refused(transformers, tmp_path):
    for base in (10.0, 100.0):
        model = saved(transformers, tmp_path / str(base), "DINOv3ViT", layer_norm_eps=1e-5, rope_theta=base)
    same_tokens(tmp_path / "100.0", model, ARCHES["DINOv3ViT"])
    with pytest.raises(CheckpointError, match=r"rope_theta\) is 10, vit_small_patch16_dinov3_qkvb's is 100"):
        evaluated(tmp_path / "10.0", ARCHES["DINOv3ViT"])


def test_periods_of_dinov3s_own_file():
    names = dict.fromkeys(("storage_tokens", "cls_token"), torch.zeros(1, 1, 8))
    for base in (100.0, 50.0):
        periods = (base ** (torch.arange(16) / 16)).bfloat16()
        weights = names | {"rope_embed.periods": periods, "patch_embed.proj.weight": torch.zeros(8, 3, 2, 2)}
        if base == 100:
            recognised(weights, "w")
        else:
            with pytest.raises(CheckpointError, match=r"rope_embed\.periods, up to .* are not those of base 100"):
                recognised(weights, "w")


def test_another_eps_is_told(transformers, tmp_path):
    saved(transformers, tmp_path, layer_norm_eps=1e-5)
    assert (
        "its norms have an eps of 1e-05, and those of vit_tiny_patch16_224 1e-06"
        in read_encoder(str(tmp_path), ARCH).layout
    )


@pytest.mark.parametrize(
    "name", ["ViT", "ViTMAE", "DeiT", "Dinov2", "Dinov2WithRegisters", "DINOv3ViT", "IJepa", "ViTMSN", "Beit"]
)
def test_whatever_transformers_writes_is_known(transformers, tmp_path, name):
    """A new release may add a name: it is read, or put among those that change nothing."""
    from ccmim_fast.checkpoints.told import of_transformers

    getattr(transformers, f"{name}Config")().save_pretrained(tmp_path)
    assert of_transformers(json.loads((tmp_path / "config.json").read_text()), {}).unread == ""


@pytest.mark.parametrize("norm_pix", [False, True])
def test_a_decoder_keeps_its_heads_and_its_target(transformers, tmp_path, norm_pix):
    """Of their folder, and of our export of it, as a folder or a file in our names."""
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4}
    decoder |= {"decoder_intermediate_size": 64, "norm_pix_loss": norm_pix}
    saved(transformers, tmp_path / "m", "ViTMAE", "ForPreTraining", **decoder)
    assert imported(tmp_path / "m", tmp_path / "run", f"--arch={ARCH}") == 0
    for target, out in (("hf-vitmae", "mae"), ("safetensors", "ours"), ("safetensors", "ours.safetensors")):
        assert main(["export", target, str(tmp_path / "run"), str(tmp_path / out)]) == 0
        back = tmp_path / f"{out}, back in"
        assert imported(tmp_path / out, back) == 0
        config = open_run(str(back)).config
        assert (config.decoder.num_heads, config.target.norm_pix) == (4, norm_pix)


def test_no_biases_of_queries_are_zeros(transformers, tmp_path):
    model = saved(transformers, tmp_path, qkv_bias=False)
    same_tokens(tmp_path, model)
    assert "its queries, keys and values have no bias: 0 here" in read_encoder(str(tmp_path), ARCH).layout


def test_registers_without_positions(transformers, tmp_path):
    """To an architecture without registers, and whose registers have positions."""
    model = saved(transformers, tmp_path / "m", "Dinov2WithRegisters", num_register_tokens=3)
    same_tokens(tmp_path / "m", model, "vit_small_patch14_dinov2")
    assert imported(tmp_path / "m", tmp_path / "run", "--arch=vit_small_patch14_dinov2") == 0
    same_tokens(tmp_path / "run", model, "")


@pytest.mark.parametrize("theirs", [True, False])
def test_cls_with_and_without_a_position(tmp_path, theirs):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 0}
    vit = timm.create_model(ARCH, no_embed_class=theirs, reg_tokens=2, **sizes).eval()
    torch.save(vit.state_dict(), tmp_path / "w.pth")
    arch = ARCH if theirs else "vit_small_patch14_reg4_dinov2"
    weights = read_encoder(str(tmp_path / "w.pth"), arch, 2, pretrained_size=(32, 32))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = build_encoder(weights, (32, 32), 2).eval().forward_features(pixels)
        torch.testing.assert_close(found, vit.forward_features(pixels), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mlp_ratio": 2}, "the MLP of its encoder has 64 channels, the model's 128"),
        ({"pre_norm": True}, "the file alone has a norm before the blocks"),
        ({"final_norm": False}, "the model alone has a norm behind the blocks"),
        ({"norm_layer": "rmsnorm"}, "the model alone has norms with a bias"),
        ({"patch_size": (8, 4)}, "patches of 8 x 4 pixels; here they are square"),
    ],
)
def test_an_obstacle_is_named(tmp_path, capsys, options, words):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 0}
    torch.save(timm.create_model(ARCH, **sizes | options).state_dict(), tmp_path / "w.pth")
    command = [f"--arch={ARCH}", "--model.num_heads=2", "--data.image_size=[32,32]"]
    assert imported(tmp_path / "w.pth", tmp_path / "run", *command) == 5
    assert words in capsys.readouterr().err


def test_another_methods_decoder_is_left_out(transformers, tmp_path):
    saved(transformers, tmp_path, kind="ForMaskedImageModeling")
    evaluated(tmp_path)


def test_an_index_of_files_names_its_folder(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tells which files hold the weights; name its folder"):
        read_weights(str(tmp_path / "model.safetensors.index.json"))
