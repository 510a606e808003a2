"""Run folders that commit ac1f32c wrote go on and evaluate as they did then; settings of that time still load."""

import json
from pathlib import Path

import old_runs
import pytest
from bit_equality import FIGURES, record_for

from ccmim_fast.cli import main

ASSETS = Path(__file__).parent / "assets" / "runs_ac1f32c"
RECORDS = json.loads((ASSETS / "used.json").read_text())
STEPS = 12


@pytest.fixture(scope="module")
def used():
    """What this code makes of the old folders, as `old_runs.used`; what ac1f32c made; whether bits can be compared."""
    found = old_runs.use(ASSETS)
    record, of_this_kind = record_for(found, RECORDS)
    return found["runs"], record["runs"], of_this_kind


def of(used, name, command):
    found = used[0][name][command]
    assert "error" not in found, found["error"]
    return found


@pytest.mark.parametrize("name", old_runs.RUNS)
def test_goes_on_as_then(used, name):
    """Losses bit for bit; with other libraries or on another kind of processor, those of three steps within 1 %."""
    now, then = of(used, name, "resume"), used[1][name]["resume"]
    assert len(now["loss"]) == STEPS
    if not used[2]:
        few = slice(0, old_runs.STOPPED + 3)
        assert now["recons"][few] == pytest.approx(then["recons"][few], rel=1e-2)
        return
    for figure in FIGURES:
        assert now[figure] == then[figure], f"{figure} of the run {name}, which goes on after step {old_runs.STOPPED}"
    assert now["sha256"] == then["sha256"], f"losses of {name} are as recorded, its last checkpoint is not"


@pytest.mark.parametrize("name", old_runs.RUNS)
def test_settings_are_held_against_those_of_then(used, name):
    """Settings that the code lost since (`fast`, say) do not keep the others in the checkpoint from being read."""
    for command, key, then in (("other_settings", "mask.ratio", "0.75"), ("other_model", "decoder.dim", "8")):
        told = of(used, name, command).splitlines()[-1]
        assert key in told
        assert then in told


@pytest.mark.parametrize("name", old_runs.RUNS)
def test_evaluates_as_then(used, name):
    near = 0 if used[2] else 0.05
    assert of(used, name, "knn") == pytest.approx(used[1][name]["knn"], abs=near)


@pytest.mark.parametrize("name", old_runs.RUNS)
def test_exports_the_same_weights(used, name):
    """The encoder for timm, averaged where the run has averages."""
    assert of(used, name, "timm") == used[1][name]["timm"]


def test_is_looked_at(used):
    result = of(used, "bank", "masks")
    assert result["step"] == old_runs.STOPPED
    assert result["figures"].keys() >= {"auroc", "entropy"}


def test_is_listed_and_reported(used):
    assert " bank " in of(used, "bank", "runs")
    page = of(used, "bank", "report")
    assert "<html" in page
    assert "decoder.dim" in page


@pytest.mark.parametrize("name", old_runs.RUNS)
def test_settings_of_then_load(capsys, name):
    """config.yaml of an old run holds every setting there was, among them the section `fast`."""
    file = ASSETS / name / "config.yaml"
    assert "\nfast:\n" in file.read_text()
    assert "dim: 8" in printed(capsys, file)


@pytest.mark.parametrize("text", ["fast:\n  fold_input: false\n  row_ops: false\n", "fast.onednn_linear: false\n"])
def test_settings_that_are_gone_load(capsys, tmp_path, text):
    """What `fast` held changed no result: wherever the section is read no more, it is passed over, and no mistake."""
    file = tmp_path / "old.yaml"
    file.write_text(f"{text}mask:\n  ratio: 0.6\n")
    assert "ratio: 0.6" in printed(capsys, file)


def printed(capsys, file):
    with pytest.raises(SystemExit) as end:
        main(["pretrain", f"--config={file}", "--print_config"])
    assert not end.value.code
    return capsys.readouterr().out
