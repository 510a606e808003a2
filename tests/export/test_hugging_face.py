"""The transformers targets: every weight is found under its name, and features and loss are ours."""

import pytest
import torch
from made_run import make_run
from PIL import Image
from tiny import images, total_loss

from ccmim_fast.cli import main
from ccmim_fast.models.tokens import tokens_of

transformers = pytest.importorskip("transformers")

from ccmim_fast.export.hugging_face import obstacles  # noqa: E402

NEAR = {"rtol": 0, "atol": 1e-5}
SQUARE = {"image_size": (32, 32)}


def loaded(kind, folder, **options):
    model, said = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), said
    return model.eval()


def prepared(folder, pictures):
    """Through the image processor, from what a user has: pictures."""
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    given = [Image.fromarray(picture.numpy()) for picture in pictures]
    return processor(given, return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "deit3_small_patch16_224"])
def test_vit_gives_our_features(tmp_path, arch):
    """The second has layer scale, and no position for [CLS]."""
    changes = {"arch": arch, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
    model, _ = make_run(tmp_path / "run", model=changes)
    assert main(["export", "hf-vit", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    target = loaded(transformers.AutoModel, tmp_path / "out", add_pooling_layer=False)
    assert type(target) is transformers.ViTModel
    pictures = images()
    with torch.no_grad():
        tokens = target(prepared(tmp_path / "out", pictures)).last_hidden_state
        expected = tokens_of(model.encoder, model.mean_C, model.std_C)(pictures)
    torch.testing.assert_close(tokens, expected, **NEAR)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_vitmae_gives_our_loss_on_our_mask(tmp_path, norm_pix):
    model, config = make_run(tmp_path / "run", data=SQUARE, target={"norm_pix": norm_pix}, mask={"ratio": 0.6})
    assert main(["export", "hf-vitmae", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    target = loaded(transformers.ViTMAEForPreTraining, tmp_path / "out")
    pictures = images(size=(32, 32))
    with torch.no_grad():
        output = model(pictures, torch.arange(4), 0)
        expected = total_loss(model, output, pictures, config).recons
        # Sorting by the place in the shuffled sequence gives that sequence.
        noise = output.partition.ids_restore_BL.float()
        found = target(prepared(tmp_path / "out", pictures), noise=noise)
    assert torch.equal(found.mask.bool(), output.partition.mask_BL.bool())
    torch.testing.assert_close(found.loss, expected, **NEAR)


@pytest.mark.parametrize(
    ("target", "sections", "words"),
    [
        ("hf-vit", {"model": {"arch": "vit_medium_patch16_reg4_gap_256"}}, "the weights reg_token"),
        ("hf-vit", {"model": {"arch": "vit_base_patch16_clip_224"}}, "the weights norm_pre.bias, norm_pre.weight"),
        ("hf-vitmae", {}, "images that are not square (data.image_size=[32, 48])"),
        ("hf-vitmae", {"data": SQUARE, "target": {"kind": "hog"}}, "a target other than pixels (target.kind=hog)"),
    ],
)
def test_what_cannot_be_expressed_is_named(tmp_path, capsys, target, sections, words):
    make_run(tmp_path / "run", **sections)
    assert main(["export", target, str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not [*tmp_path.glob("out*")]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"qk_norm": True}, ["the weights blocks.*.attn.k_norm.bias, blocks.*.attn.k_norm.weight, "]),
        ({"act_layer": "gelu_tanh"}, ["an activation other than GELU"]),
        (
            {"norm_layer": "rmsnorm"},
            ["an encoder without blocks.*.norm1.bias, ", "norms other than LayerNorm"],
        ),
        ({}, []),
    ],
)
def test_parts_of_a_vit(options, words):
    import timm
    from timm.models.vision_transformer import ParallelScalingBlock

    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 48, "depth": 1, "num_heads": 3}
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes, **options)
    found = obstacles(vit)
    assert len(found) == len(words)
    assert all(one.startswith(word) for one, word in zip(found, words))
    other = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1, block_fn=ParallelScalingBlock)
    assert obstacles(other) == ["blocks that are not timm's standard one"]


def test_wide_pixels_have_the_runs_white(tmp_path):
    """One for all channels, or one for each: pixels that were stored become the values of training."""
    for number, white in enumerate([(4095.0,), (4095.0, 1000.0, 500.0)]):
        _, config = make_run(tmp_path / f"run{number}", data={"max_value": white})
        out = tmp_path / f"out{number}"
        assert main(["export", "hf-vit", str(tmp_path / f"run{number}"), str(out)]) == 0
        stored = torch.rand(32, 48, 3) * torch.tensor(white)
        processor = transformers.AutoImageProcessor.from_pretrained(out, backend="torchvision")
        found = processor(stored.numpy(), return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        mean, std = torch.tensor(config.data.mean), torch.tensor(config.data.std)
        torch.testing.assert_close(found[0].permute(1, 2, 0), (stored / torch.tensor(white) - mean) / std, **NEAR)
        card = (out / "README.md").read_text()
        said = ", ".join(f"{one:g}" for one in white)
        assert f"In the stored pixels {said} is white (`data.max_value`). `rescale_factor` is 1 / 4095: give" in card
        assert 'backend="torchvision")' in card
    make_run(tmp_path / "bytes")
    assert main(["export", "hf-vit", str(tmp_path / "bytes"), str(tmp_path / "out")]) == 0
    assert "The processor takes 255 for white, as in images of 8 bits" in (tmp_path / "out" / "README.md").read_text()
