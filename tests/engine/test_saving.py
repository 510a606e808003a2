"""Which checkpoints a run leaves, and what becomes of it where they cannot be written."""

import pytest
from tiny import tiny_config

from ccmim_fast.checkpoints import io
from ccmim_fast.engine.pretraining import fit
from ccmim_fast.errors import CheckpointError


def config_for(tmp_path, max_steps=0, **run):
    """Two steps an epoch."""
    return tiny_config(
        run={"dir": str(tmp_path / "run"), "log_every": 1, "save_every": 1, "tensorboard": False, **run},
        data={"source": "shapes", "samples": 8, "root": str(tmp_path / "shapes"), "loader": "torch"},
        train={"epochs": 6, "batch_size": 4, "device": "cpu", "precision": "fp32", "max_steps": max_steps},
    )


def steps(tmp_path):
    return [int(path.name[5:]) for path in io.checkpoints(tmp_path / "run" / "checkpoints")]


def test_keep_every_keeps_besides_the_newest(tmp_path):
    fit(config_for(tmp_path, keep=1, keep_every=2))
    assert steps(tmp_path) == [4, 8, 12]


def test_keep_every_saves_what_save_every_leaves_out(tmp_path):
    fit(config_for(tmp_path, keep=1, keep_every=3, save_every=100))
    assert steps(tmp_path) == [6, 12]


def test_an_unfinished_epoch_is_not_kept(tmp_path):
    config = config_for(tmp_path, max_steps=3, keep=1, keep_every=2)
    fit(config)
    assert steps(tmp_path) == [3]
    fit(config_for(tmp_path, max_steps=6, keep=1, keep_every=2, resume="auto"))
    assert steps(tmp_path) == [4, 6]


def test_fault_10_training_goes_on(tmp_path, full, capsys):
    full.update((2, 4, 8, 10))
    fit(config_for(tmp_path))
    assert steps(tmp_path) == [6, 12]
    told = [line for line in capsys.readouterr().out.splitlines() if "No space left on device" in line]
    assert [line.split(": ")[0][-8:] for line in told] == ["00000002", "00000004", "00000008", "00000010"]
    assert all(line.endswith("the older checkpoints are intact; training goes on") for line in told)


def test_fault_10_an_error_after_three(tmp_path, full):
    full.update((4, 6, 8))
    with pytest.raises(CheckpointError, match=r"step_00000008: not saved: No space left .* failed 3 times in a row"):
        fit(config_for(tmp_path))
    assert steps(tmp_path) == [2]


def test_a_run_does_not_end_well_without_its_weights(tmp_path, full):
    full.add(12)
    with pytest.raises(CheckpointError, match=r"step_00000012: not saved: No space left on device"):
        fit(config_for(tmp_path))
    assert steps(tmp_path) == [6, 8, 10]
