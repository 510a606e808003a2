"""Steps that are not finite, signals, and what ranks tell each other of them (faults 16 and 20)."""

import json
import os
import signal
from unittest.mock import patch

import pytest
import torch
from faulty import not_finite, signalled
from ranks_launcher import FAULTY, run_ranks, torchrun
from small_run import run_settings
from tiny import tiny_config

from ccmim_fast.checkpoints import io
from ccmim_fast.engine.health import Spikes, is_collapsed, spread
from ccmim_fast.engine.pretraining import Pretraining, fit
from ccmim_fast.errors import NumericsError, StoppedError
from ccmim_fast.ranks.signals import StopSignals
from ccmim_fast.runs.state import read_state


@pytest.fixture(autouse=True)
def no_counting(monkeypatch):
    """The FLOP counter takes a pass of its own before the run."""
    monkeypatch.setattr("ccmim_fast.engine.pretraining.count_flops", lambda step: {})


def config_for(folder, **sections):
    """Two steps an epoch, saved each epoch."""
    sections = {
        "run": {"dir": str(folder / "run"), "log_every": 1, "save_every": 1, "keep": 9, "tensorboard": False},
        "data": {"source": "shapes", "samples": 16, "root": str(folder / "shapes")},
        "train": {"batch_size": 8, "epochs": 6, "precision": "fp32", "device": "cpu"},
        "optim": {"warmup_epochs": 1.0, "base_lr": 1e-2},
        **sections,
    }
    return tiny_config(**sections)


def records(folder, kind):
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def weights_at(folder, step):
    return io.load(folder / "run" / "checkpoints" / f"step_{step:08d}")["model"]


def same(a, b):
    """But for BatchNorm's counts of batches, which nothing reads."""
    return all(torch.equal(a[name], b[name]) for name in a if not name.endswith("num_batches_tracked"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, value, clip):
    """Steps 3 and 4, all of the second epoch: weights and statistics after it are those before it."""
    weights = []
    look = lambda epoch, run: weights.append({k: v.clone() for k, v in run.model.state_dict().items()})  # noqa: E731
    with not_finite({3, 4}, value):
        fit(config_for(tmp_path, optim={"clip_grad": clip, "warmup_epochs": 0.0}, score={"source": "bank"}), look)
    assert [record["at"] for record in records(tmp_path, "skipped_step")] == [3, 4]
    assert same(weights[1], weights[2])
    assert not same(weights[0], weights[1])
    assert not same(weights[2], weights[3])
    assert len(records(tmp_path, "train")) == 12
    assert not records(tmp_path, "went_back")
    assert not (tmp_path / "run" / "captures").exists()


def test_after_three_in_a_row_the_run_goes_on_from_the_last_checkpoint_past_their_samples(tmp_path, capsys):
    """Steps 6, 7, 8: weights of step 4, as none is saved after a bad step, and samples of step 9."""
    with not_finite({6, 7, 8}):
        fit(config_for(tmp_path))
    (went,) = records(tmp_path, "went_back")
    assert (went["step"], went["to"]) == (8, 4)
    assert same(weights_at(tmp_path, 4), weights_at(tmp_path, 8))
    assert not same(weights_at(tmp_path, 8), weights_at(tmp_path, 10))
    assert [record["step"] for record in records(tmp_path, "train")] == list(range(1, 13))
    assert "goes on with the weights of step 4, past these samples" in capsys.readouterr().out
    captured = torch.load(tmp_path / "run" / "captures" / "step_00000008_rank_0.pt", weights_only=True)
    (batch,) = captured["micro_batches"]
    assert (captured["step"], captured["seed"]) == (8, 0)
    assert sorted(batch["ids"].tolist()) == sorted(set(batch["ids"].tolist()))
    assert batch["masks"].shape == (8, 24)
    assert bool((batch["masks"].sum(1) == 18).all())
    assert batch["outputs"]["decoder, call 1"]["finite"] == 1
    assert captured["weights"]["encoder.cls_token"]["largest"] > 0


def test_spoiled_weights_are_left_behind(tmp_path):
    """The cause is in the weights from step 6 on; and the optimizer's moments are not those of the spoiled run."""
    train = Pretraining.train

    def spoiling(self, batches, step, seen):
        if step + 1 == 6:
            with torch.no_grad():
                self.model.encoder.blocks[0].mlp.fc1.weight[0, 0] = float("nan")
                for state in self.train_step.optimizer.state.values():
                    state["exp_avg"].fill_(1e9)
        return train(self, batches, step, seen)

    with patch.object(Pretraining, "train", spoiling):
        fit(config_for(tmp_path))
    assert [record["to"] for record in records(tmp_path, "went_back")] == [4]
    assert [record["at"] for record in records(tmp_path, "skipped_step")] == [6, 7, 8]
    ended = io.load(tmp_path / "run" / "checkpoints" / "step_00000012")
    assert all(bool(weight.isfinite().all()) for weight in ended["model"].values())
    assert all(float(state["exp_avg"].abs().max()) < 1e6 for state in ended["optimizer"]["state"].values())
    captured = torch.load(tmp_path / "run" / "captures" / "step_00000008_rank_0.pt", weights_only=True)
    outputs = captured["micro_batches"][0]["outputs"]
    first = next(name for name, figures in outputs.items() if figures["finite"] < 1)
    assert first.startswith("encoder.blocks.0.mlp.fc1")
    assert captured["weights"]["encoder.blocks.0.mlp.fc1.weight"]["finite"] < 1


def test_masks_of_the_capture_are_those_of_the_step(tmp_path):
    """The last forward pass before the capture's own had them."""
    masks = []
    from ccmim_fast.models.ccmim import CCMIM

    forward = CCMIM.forward

    def kept(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        masks.append((kwargs.get("partition"), output.partition))
        return output

    with not_finite({3, 4, 5}), patch.object(CCMIM, "forward", kept):
        fit(config_for(tmp_path, teacher={"tokens": 0.4}))
    again = next(i for i, (partition, _) in enumerate(masks) if partition is not None)
    assert torch.equal(masks[again][1].mask_BL, masks[again - 1][1].mask_BL)
    assert torch.equal(masks[again][1].ids_teacher_BT, masks[again - 1][1].ids_teacher_BT)


def test_without_another_checkpoint_the_run_ends_with_a_capture(tmp_path):
    with not_finite(set(range(1, 99))), pytest.raises(NumericsError, match=r"step 3: 3 steps in a row .* see .*rank_0"):
        fit(config_for(tmp_path, run={"dir": str(tmp_path / "run"), "save_every": 5, "tensorboard": False}))
    assert (tmp_path / "run" / "captures" / "step_00000003_rank_0.pt").exists()
    assert read_state(tmp_path / "run").state == "failed"
    assert read_state(tmp_path / "run").exit_code == 4


def test_a_run_goes_back_to_the_same_checkpoint_once(tmp_path):
    config = config_for(tmp_path, run={"dir": str(tmp_path / "run"), "save_every": 5, "tensorboard": False})
    with not_finite({11, *range(12, 99)}), pytest.raises(NumericsError, match="no other checkpoint to go back to"):
        fit(tiny_config(**{**vars(config), "train": {**vars(config.train), "epochs": 12}}))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_with_everything_saved(tmp_path, number):
    """In the middle of an epoch; and gone on with, it is the run that was never stopped, bit for bit."""
    with signalled(5, number), pytest.raises(StoppedError, match=rf"stopped by {number.name} after step 5") as caught:
        fit(config_for(tmp_path))
    assert caught.value.exit_code == 143
    assert read_state(tmp_path / "run").state == "stopped"
    config = config_for(tmp_path)
    fit(tiny_config(**{**vars(config), "run": {**vars(config.run), "resume": "auto"}}))
    (tmp_path / "whole").mkdir()
    fit(config_for(tmp_path / "whole"))
    assert same(weights_at(tmp_path, 12), weights_at(tmp_path / "whole", 12))


def test_a_second_interrupt_is_one_at_once():
    before = signal.getsignal(signal.SIGINT)
    with StopSignals() as signals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
            assert signals.name == number.name
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_after_an_error_of_several_ranks_signals_stay_requests():
    """The launcher ends the remaining ranks, by SIGTERM; they still write a diagnosis."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        for keep in (False, True):
            with pytest.raises(ValueError, match="lost"), StopSignals(keep) as signals:
                raise ValueError("lost")
            assert (signal.getsignal(signal.SIGTERM) == signals._handle) == keep
        with StopSignals(keep_after_error=True):
            pass
        assert signal.getsignal(signal.SIGTERM) == signals._handle
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def two_ranks(folder, fault, at, *settings):
    """The words after `python`: two steps an epoch, of three; the second rank has the fault."""
    more = ["--data.samples=16", "--train.batch_size=8", "--train.epochs=3", "--run.save_every=1", "--run.keep=9"]
    return FAULTY, fault, at, "1", *run_settings(folder), *more, *settings


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_all_ranks_agree_on_a_step_that_is_not_finite_on_one(tmp_path, parallel):
    run_ranks(2, *two_ranks(tmp_path, "nan", "4,5,6", f"--train.parallel={parallel}"))
    assert [record["at"] for record in records(tmp_path, "skipped_step")] == [4, 5, 6]
    assert [record["to"] for record in records(tmp_path, "went_back")] == [2]
    assert same(weights_at(tmp_path, 2), weights_at(tmp_path, 6))
    assert {p.name for p in (tmp_path / "run" / "captures").iterdir()} == {
        f"step_00000006_rank_{rank}.pt" for rank in (0, 1)
    }


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all(tmp_path):
    done = torchrun(2, *two_ranks(tmp_path, "term", "5"))
    assert "stopped by a signal to another rank after step 5" in done.stderr
    assert "stopped by SIGTERM after step 5" in done.stderr
    assert "StoppedError" not in done.stderr
    assert io.newest(tmp_path / "run" / "checkpoints").path.name == "step_00000005"
    assert read_state(tmp_path / "run").state == "stopped"


def test_spread_of_known_rows():
    """Rows all over the sphere, along one line, and all one."""
    torch.manual_seed(0)
    std, rank = spread(torch.randn(4096, 16))
    assert float(std) == pytest.approx(1, abs=0.01)
    assert float(rank) == pytest.approx(16, abs=0.1)
    signs = torch.tensor([1.0, -1.0]).repeat(32)
    line = signs[:, None] * torch.ones(64, 16)
    assert float(spread(line)[1]) == pytest.approx(1, abs=1e-3)
    std, rank = spread(torch.ones(64, 16))
    assert float(std) == pytest.approx(0, abs=1e-6)
    assert float(rank) == 0
    # Fewer rows than dimensions: the other Gram matrix.
    wide = torch.randn(8, 64)
    centred = torch.nn.functional.normalize(wide) - torch.nn.functional.normalize(wide).mean(0)
    share = torch.linalg.svdvals(centred.double())
    share = share / share.sum()
    assert float(spread(wide)[1]) == pytest.approx(float(torch.special.entr(share).sum().exp()), rel=1e-4)
    assert not float(spread(torch.full((4, 4), torch.nan))[0]) >= 0


@pytest.mark.parametrize(
    ("figures", "collapsed"),
    [
        ((1.0, 60.0, 1024, 256), False),
        ((0.02, 60.0, 1024, 256), True),
        ((0.9, 2.0, 1024, 256), True),
        ((1.0, 1.0, 2, 16), False),
    ],
)
def test_collapse(figures, collapsed):
    assert is_collapsed(*figures) == collapsed


def test_spikes():
    spikes = Spikes(10.0)
    assert not any(spikes.is_spike(1 + 0.01 * (i % 7)) for i in range(40))
    assert not spikes.is_spike(float("nan"))
    assert spikes.is_spike(2.0)
    assert not spikes.is_spike(1.05)
    silent = Spikes(0.0)
    assert not any(silent.is_spike(value) for value in [1.0] * 40 + [99.0])


def test_a_full_disk_ends_neither_the_records_nor_the_going_back(tmp_path, capsys):
    """Captures have no room; the run goes back all the same."""

    def full(*args):
        raise OSError(28, "No space left on device")

    with not_finite({6, 7, 8}), patch("ccmim_fast.engine.pretraining.write_capture", full):
        fit(config_for(tmp_path))
    assert [record["to"] for record in records(tmp_path, "went_back")] == [4]
    assert "no capture: [Errno 28] No space left on device" in capsys.readouterr().out
