"""The arithmetic that ours leaves out changes no loss and no gradient, and saves what benchmarks/naive.py says."""

import pytest
import torch
from naive import SAVINGS, without_in_model
from tiny import images, tiny_config, total_loss
from torch.utils.flop_counter import FlopCounterMode

from ccmim_fast.build.model import build_model
from ccmim_fast.config.schema import Config

# No part of the model: tests/models/test_onednn.py, tests/benchmarks/test_naive.py.
OF_STEP = ("onednn_linear", "kernels", "attention", "kept_memory", "fused_adamw")
OF_MODEL = [name for name in SAVINGS if name not in OF_STEP]
IDS = torch.arange(3)


def run(config: Config, pictures: torch.Tensor, without=(), dtype=torch.float64, autocast=False):
    """Losses, every gradient, FLOPs, and the bytes kept for the backward pass."""
    torch.manual_seed(0)
    model = build_model(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    if without:
        without_in_model(model, without)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with FlopCounterMode(display=False) as counter:
        with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = model(pictures, IDS, 0)
        losses = total_loss(model, output, pictures, config)
        losses.total.backward()
    found = {"total": losses.total.detach(), "recons": losses.recons.detach(), "mask": output.partition.mask_BL}
    found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found, counter.get_total_flops(), sum(kept.values())


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("source", ["first", "all", "bank"])
@pytest.mark.parametrize(
    "off", [*([name] for name in OF_MODEL), OF_MODEL], ids=lambda off: off[0] if off[1:] == [] else "all"
)
def test_no_loss_and_no_gradient_depends_on_it(source, off):
    pictures = images(3)
    sections = {"score": {"source": source}}
    expected, _, _ = run(tiny_config(**sections), pictures)
    found, _, _ = run(tiny_config(**sections), pictures, off)
    assert_same(found, expected)


@pytest.mark.parametrize("contrast", ["align", "moco", "none"])
def test_nor_with_another_contrast(contrast):
    pictures, config = images(3), tiny_config(contrast={"loss": contrast}, teacher={"tokens": 0.4})
    expected, _, _ = run(config, pictures)
    assert_same(run(config, pictures, OF_MODEL)[0], expected)


@pytest.mark.parametrize(
    "arch", ["vit_small_patch14_reg4_dinov2", "vit_base_patch16_clip_224", "deit3_small_patch16_224"]
)
def test_nor_with_registers_other_norms_and_biases(arch):
    size = (28, 42) if "14" in arch else (32, 48)
    sections = {"data": {"image_size": size}, "model": {"arch": arch, "patch_size": 0, "embed_dim": 0, "num_heads": 0}}
    pictures = images(3, size)
    expected, _, _ = run(tiny_config(**sections), pictures)
    assert_same(run(tiny_config(**sections), pictures, OF_MODEL)[0], expected)


@pytest.mark.parametrize("source", ["first", "all", "bank"])
def test_each_saves_arithmetic(source):
    """`masked_no_grad` and `row_ops` save memory, `fold_input` a float image; all others save products."""
    pictures = images(3)
    _, fast, _ = run(tiny_config(score={"source": source}), pictures)
    for name in {"visible_gradient", "fold_score", "cls_only", "masked_only"} - (
        set() if source == "first" else {"fold_score"}
    ):
        _, slow, _ = run(tiny_config(score={"source": source}), pictures, [name])
        assert slow > fast, name


def test_scores_from_all_blocks_end_with_the_last_keys():
    """Without a masked branch, so that only the score has a last block to shorten."""
    sections = {"score": {"source": "all"}, "contrast": {"loss": "none"}}
    _, fast, _ = run(tiny_config(**sections), images(3))
    _, slow, _ = run(tiny_config(**sections), images(3), ["cls_only"])
    assert slow > fast


@pytest.mark.parametrize("name", ["masked_no_grad", "visible_gradient"])
def test_some_save_memory(name):
    pictures = images(3)
    _, _, kept = run(tiny_config(), pictures)
    _, _, more = run(tiny_config(), pictures, [name])
    assert more > 1.05 * kept


def test_gradient_of_the_visible_patches_in_bfloat16_is_as_good_as_eager():
    """Error against float64 at most twice that of autograd through all patches."""
    pictures = images(3)
    sections = {"mask": {"strategy": "random"}}
    name = "encoder.patch_embed.proj.weight"
    gold = run(tiny_config(**sections), pictures)[0][name]
    ours = run(tiny_config(**sections), pictures, (), torch.float32, autocast=True)[0][name]
    eager = run(tiny_config(**sections), pictures, ["visible_gradient"], torch.float32, autocast=True)[0][name]
    assert (ours - gold).abs().max() <= 2 * (eager - gold).abs().max()
