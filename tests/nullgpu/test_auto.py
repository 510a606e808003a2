"""What runs on a GPU where the settings leave it open: our Triton kernels, and xformers or the next that runs."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from nullgpu.null_device import end_of, run

HERE = Path(__file__).parent
HAS_XFORMERS = importlib.util.find_spec("xformers") is not None
FLASH, CUTLASS = ["fa2F", "fa2B"], ["cutlassF", "cutlassB"]


@pytest.mark.skipif(not HAS_XFORMERS, reason="xformers is not installed")
@pytest.mark.parametrize("capability", [61, 75, 80, 90])
def test_xformers_dispatches_both_passes(capability):
    if capability >= 80 and torch.__version__ < "2.8":
        pytest.skip("xformers 0.0.31 has FlashAttention 3, whose kernels want a driver; it is for Pascal here")
    result = run(HERE / "attend.py", capability=capability)
    assert result.code == 0, end_of(result)
    for dtype, expected in {
        "torch.float32": CUTLASS,
        "torch.float16": FLASH if capability >= 80 else CUTLASS,
        "torch.bfloat16": FLASH if capability >= 80 else None,
    }.items():
        found = result.told[dtype]
        if expected is None:
            assert "bf16 is only supported on A100+ GPUs" in found["refused"]
            continue
        assert [name.partition("@")[0].removesuffix("-pt") for name in found["operators"]] == expected, dtype
        assert found["shapes"] == [[2, 50, 4, 64]] * 4
        for way in ("fwd", "bwd") if expected == FLASH else ("fmha_cutlassF", "fmha_cutlassB"):
            assert any(way in name for name in found["kernels"]), (dtype, way)


def pretrained(folder: Path, capability: int, *settings: str) -> tuple[dict, dict]:
    """Return what a run told, and its table of choices."""
    made = ["--data.source=shapes", f"--data.root={folder / 'shapes'}", "--data.samples=8", "--data.loader=torch"]
    few = ["--train.batch_size=4", "--train.max_steps=1", f"--run.dir={folder / 'run'}", "--run.tensorboard=false"]
    result = run(HERE / "pretrain.py", "--config=ccmim_vit_base", *made, *few, *settings, capability=capability)
    assert result.code == 0, end_of(result)
    assert result.told["code"] == 0, result.out
    if "--train.autotune=fresh" in settings:
        assert "cuda computes nothing, so nothing is measured" in result.out
    return result.told, json.loads((folder / "run" / "autotune.json").read_text())["decisions"]


@pytest.mark.parametrize(
    ("capability", "settings"),
    [(90, ["--train.autotune=fresh"]), (75, ["--model.depth=2", "--train.autotune=off"])],
)
def test_the_default_run_takes_our_kernels_and_fast_attention(tmp_path, capability, settings):
    """The preset as it is, but for the number of images and, for time's sake, torch.compile, which others test."""
    told, decisions = pretrained(tmp_path, capability, "--train.compile=off", *settings)
    ours = {name for name in told["kernels"] if name.startswith("ccmim_")}
    assert {f"ccmim_{op}_kernel" for op in ("cls_row", "divide_tokens", "restore_tokens", "masked_patch_loss")} <= ours
    ops = {name: decision["chosen"] for name, decision in decisions.items() if " " not in name}
    assert len(ops) >= 6
    assert set(ops.values()) == {"triton"}
    attention = {name: decision for name, decision in decisions.items() if name.startswith("attention ")}
    assert list(attention) == ["attention 50 x 12 x 64", "attention 148 x 12 x 64", "attention 197 x 16 x 32"]
    fallback = "flash" if capability >= 80 else "efficient"
    for decision in attention.values():
        assert decision["chosen"] == ("xformers" if HAS_XFORMERS else fallback), decision
    assert any("flash_fwd" in name or "fmha_cutlassF" in name for name in told["kernels"])
    assert any("flash_bwd" in name or "fmha_cutlassB" in name for name in told["kernels"])


def test_what_does_not_compile_is_not_taken(tmp_path):
    """torch 2.15 cannot trace the backward pass of xformers' cutlass operators, which float32 takes."""
    script = """
import sys, torch
from nullgpu.counters import bools_are, tell, without_cudnn
without_cudnn()
from ccmim_fast.engine import choices
from ccmim_fast.engine.build import build_step
from ccmim_fast.ranks.session import Session
from tiny import tiny_config
here = Session(0, 1, torch.device("cuda"))
for compile_ in ("off", "step"):
    config = tiny_config(train={"batch_size": 4, "precision": "fp32", "compile": compile_, "autotune": "off"})
    with bools_are(True):
        step = build_step(config, here)
    tell(compile_, choices.choose(step, 4, here, 10**9).chosen())
"""
    result = run(script)
    assert result.code == 0, end_of(result)
    taken = {how: result.told[how]["attention 25 x 4 x 8"] for how in ("off", "step")}
    assert taken == {"off": "xformers" if HAS_XFORMERS else "efficient", "step": "efficient"}


def test_a_measurement_goes_through_on_a_gpu(tmp_path):
    """Its times mean nothing here, but all candidates are made, compared, timed; and both forms of the step."""
    script = """
import torch
from nullgpu.counters import bools_are, tell, without_cudnn
without_cudnn()
from ccmim_fast.engine import choices
from ccmim_fast.engine.build import build_step
from ccmim_fast.engine.compile import compile_step, compiled_as, warm_up
from ccmim_fast.ranks.session import Session
from tiny import tiny_config
choices._computes = lambda device: True
choices.SECONDS, choices._FORM_SECONDS["cuda"] = 120.0, 60.0
here = Session(0, 1, torch.device("cuda"))
config = tiny_config(train={"batch_size": 4, "precision": "bf16", "autotune": "fresh"})
with bools_are(True):
    step = build_step(config, here)
table = choices.choose(step, 4, here, 10**9)
choices.apply(table, step)
compile_step(step, "step", backend="eager")
warm_up(step, 4, 1)
table = choices.choose_form(table, step, 4, here)
tell("decisions", {name: decision._asdict() for name, decision in table.decisions.items()})
tell("compiled", compiled_as(step))
"""
    result = run(script)
    assert result.code == 0, end_of(result)
    decisions = result.told["decisions"]
    form = decisions.pop("compile")
    assert form["milliseconds"].keys() == {"step", "off"}
    assert result.told["compiled"] == form["chosen"]
    # What a kernel that does nothing leaves in memory that is not zero differs from the reference; others are timed.
    timed = {name for name, decision in decisions.items() if len(decision["milliseconds"]) > 1}
    assert len(timed) >= 8
    attention = [decision for name, decision in decisions.items() if name.startswith("attention ")]
    assert len(attention) == 4
    for decision in attention:
        assert {"flash", "efficient", "sdpa"} <= decision["milliseconds"].keys()
        assert all(why.startswith("RuntimeError: cuDNN") for why in decision["dropped"].values())
