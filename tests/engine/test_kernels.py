"""The step with Triton kernels against the step with references, and what the trainer says of both."""

import json

import pytest
import torch
from tiny import images, tiny_config

from ccmim_fast.build.model import build_model, build_objective
from ccmim_fast.data.stream.batch import Batch
from ccmim_fast.engine import build as trainer_build
from ccmim_fast.engine.pretraining import fit
from ccmim_fast.engine.step import TrainStep
from ccmim_fast.errors import ConfigError
from ccmim_fast.models.ccmim import CCMIM
from ccmim_fast.models.precision import choose_precision
from ccmim_fast.optim.optimizer import build_optimizer
from ccmim_kernels import dispatch
from ccmim_kernels.triton_impl.launch import recorded


def losses_of(kernels: str, device: torch.device, steps: int, **sections) -> torch.Tensor:
    """Total, reconstruction and contrast of each step, float64."""
    config = tiny_config(train={"kernels": kernels, "precision": "fp32"}, **sections)
    torch.manual_seed(3)
    model = build_model(config).to(device).train()
    optimizer = build_optimizer("adamw", model, lr=1e-4, weight_decay=0.05, betas=(0.9, 0.95))
    step = TrainStep(model, model, build_objective(config, model), optimizer, choose_precision("fp32", device), config)
    torch.manual_seed(4)
    pictures, ids = images(4).to(device), torch.arange(4, device=device)
    results = [step([Batch(pictures, ids, torch.full_like(ids, epoch))], 1e-4) for epoch in range(steps)]
    return torch.stack([torch.stack(r[:3]) for r in results]).double().cpu()


CASES = {
    "scores of all blocks": {"score": {"source": "all"}},
    "scores of the first block, MoCo's loss": {
        "score": {"source": "first"},
        "contrast": {"loss": "moco"},
        "teacher": {"tokens": 0.4},
        "mask": {"hints": 0.2, "importance": 0.5},
    },
    "MAE": {"mask": {"strategy": "random"}, "contrast": {"loss": "none"}},
    "HOG": {"score": {"source": "first"}, "target": {"kind": "hog"}},
}
STEPS = {"HOG": 3}  # which takes the interpreter 14 seconds a step


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_training_converges_alike(case, device):
    """16 steps with kernels and with references: the same loss curve to 1e-5, falling."""
    steps = STEPS.get(case, 16)
    with recorded(run=True) as launches:
        ours = losses_of("triton", device, steps, **CASES[case])
    reference = losses_of("reference", device, steps, **CASES[case])
    assert launches
    # The loss that is minimised, and its first term; apart the second, where BatchNorm of four rows amplifies rounding.
    torch.testing.assert_close(ours[:, :2], reference[:, :2], rtol=1e-5, atol=0)
    torch.testing.assert_close(ours[:, 2], reference[:, 2], rtol=1e-4, atol=0)
    assert steps < 16 or reference[-4:, 1].mean() < 0.97 * reference[:4, 1].mean()


def test_the_step_runs_every_op_as_a_kernel(device):
    with recorded(run=True) as launches:
        losses_of("triton", device, 1, score={"source": "all"})
    names = {launch.kernel.__name__ for launch in launches}
    assert names >= {
        "ccmim_cls_row_kernel",
        "ccmim_divide_tokens_kernel",
        "ccmim_scatter_tokens_kernel",
        "ccmim_sample_partition_kernel",
        "ccmim_restore_tokens_kernel",
        "ccmim_restore_tokens_gradients_kernel",
        "ccmim_gather_tokens_kernel",
        "ccmim_masked_patch_loss_kernel",
    }
    with recorded(run=True) as launches:
        losses_of("triton", device, 1, score={"source": "first"})
    assert "ccmim_embed_tokens_kernel" in {launch.kernel.__name__ for launch in launches}
    with recorded(run=True) as launches:
        losses_of("reference", device, 1)
    assert not launches


def test_asking_for_triton_on_a_cpu_is_refused_before_anything_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(dispatch, "_interpreted", lambda: False)
    config = tiny_config(
        run={"dir": str(tmp_path / "run")},
        data={"source": "shapes", "samples": 8},
        train={"kernels": "triton", "device": "cpu", "batch_size": 4},
        mask={"block_min": 1},
    )
    with pytest.raises(ConfigError, match=r"^train.kernels=triton needs CUDA, got cpu; use kernels=reference$"):
        fit(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kernels", ["triton", "reference"])
def test_nan_scores_are_reported_with_the_sample(tmp_path, monkeypatch, capsys, kernels):
    """Sample 5's tokens are NaN in one step; the next logged line names it, once."""

    class Poisoned(CCMIM):
        def divide(self, x_BLD, ids_B, epoch, *rest):
            if (torch.as_tensor(epoch) == 1).all():
                x_BLD = torch.where((ids_B == 5)[:, None, None], torch.nan, x_BLD)
            return super().divide(x_BLD, ids_B, epoch, *rest)

    def build(config):
        model = build_model(config)
        model.__class__ = Poisoned
        return model

    monkeypatch.setattr(trainer_build, "build_model", build)
    config = tiny_config(
        run={"dir": str(tmp_path / "run"), "log_every": 1, "tensorboard": False},
        data={"source": "shapes", "samples": 8, "root": str(tmp_path / "data"), "loader": "torch"},
        # The learning rate is zero, so that only one step sees NaN.
        optim={"base_lr": 0.0, "weight_decay": 0.0, "warmup_epochs": 0.0},
        train={"kernels": kernels, "device": "cpu", "precision": "fp32", "batch_size": 8, "epochs": 2},
    )
    fit(config)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [(r["step"], r["sample"]) for r in records if r["kind"] == "nan_scores"]
    assert found == [(2, 5)]
    assert capsys.readouterr().out.count("sample 5") == 1
