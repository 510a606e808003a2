"""Positions of imported weights: those that are all zero are told, and the file's own tokens are counted."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from ccmim_fast.checkpoints.published import read_weights
from ccmim_fast.cli import main

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
HEADS = ["--model.num_heads=2", "--decoder.num_heads=2"]


def test_an_untrained_vitmae_of_transformers_is_told(tmp_path, capsys):
    """transformers 5 leaves both tables of fixed positions zero; one of them may be filled."""
    transformers = pytest.importorskip("transformers")
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    config = transformers.ViTMAEConfig(**SIZES, **decoder, intermediate_size=128, decoder_intermediate_size=64)
    model = transformers.ViTMAEForPreTraining(config)
    with torch.no_grad():
        for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
            table.zero_()  # whatever its version does
    for name, words in (("neither", "encoder.pos_embed and decoder.pos_embed"), ("one", "encoder.pos_embed"), ("", "")):
        model.save_pretrained(tmp_path / f"m{name}")
        command = ["import", str(tmp_path / f"m{name}"), "--arch=vit_tiny_patch16_224", *HEADS]
        assert main([*command, f"--out={tmp_path / name}run"]) == 0
        said = [line for line in capsys.readouterr().out.splitlines() if "all zero" in line]
        if not words:
            assert not said
            continue
        (line,) = said
        assert f"transformers' names, under 'vit'; {words} all zero, so that it knows no places, as" in line
        with torch.no_grad():
            model.decoder.decoder_pos_embed.normal_()
            if name == "one":
                model.vit.embeddings.position_embeddings.normal_()


def saved(path, arch, **options):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 0}
    vit = timm.create_model(arch, **sizes, **options)
    save_file(vit.state_dict(), path)
    return vit


def test_the_files_own_tokens_are_counted(tmp_path):
    """Registers of a file are none of its patches, though the architecture named has none: a setting."""
    vit = saved(tmp_path / "w.safetensors", "vit_tiny_patch16_224", reg_tokens=4)
    command = ["import", str(tmp_path / "w.safetensors"), "--arch=vit_tiny_patch16_224", *HEADS]
    assert main([*command, f"--out={tmp_path / 'run'}"]) == 0
    found = read_weights(str(tmp_path / "run")).tensors
    assert torch.equal(found["encoder.reg_token"], vit.reg_token)
    assert torch.equal(found["encoder.pos_embed"], vit.pos_embed)


def test_registers_without_cls_get_one(tmp_path):
    """The positions of a file of registers and patches stay theirs; [CLS] starts anew, without a position."""
    arch = "vit_so150m_patch16_reg4_gap_256"
    vit = saved(tmp_path / "w.safetensors", arch)
    command = ["import", str(tmp_path / "w.safetensors"), f"--arch={arch}", *HEADS, f"--out={tmp_path / 'run'}"]
    assert main(command) == 0
    found = read_weights(str(tmp_path / "run")).tensors["encoder.pos_embed"]
    assert torch.equal(found[:, 1:], vit.pos_embed)
    assert not found[:, 0].any()
