"""Where an evaluation may be written."""

import pytest

from ccmim_fast.errors import ConfigError
from ccmim_fast.runs.folder import check_apart, evaluation_folder


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "mine"
    (folder / "checkpoints" / "step_00000008").mkdir(parents=True)
    (folder / "checkpoints" / "step_00000008" / "manifest.json").touch()
    return folder


@pytest.mark.parametrize("place", [".", "..", "../..", "checkpoints", "checkpoints/step_00000008"])
@pytest.mark.parametrize("checkpoint", [".", "checkpoints/step_00000008"])
def test_no_evaluation_is_written_over_what_it_evaluates(run, place, checkpoint):
    """An --overwrite would remove it."""
    with pytest.raises(ConfigError, match=r"^run\.dir=.*: holds .*, or lies in it; choose another folder$"):
        check_apart(str(run / place), str(run / checkpoint))


def test_its_own_folder_and_others_are_free(run, tmp_path):
    for folder in (
        evaluation_folder(str(run), "knn"),
        run / "eval",
        tmp_path / "runs" / "other",
        tmp_path / "elsewhere",
    ):
        check_apart(str(folder), str(run))
    file = tmp_path / "weights" / "mae.pth"
    check_apart(str(tmp_path / "runs"), str(file))
    check_apart("runs/eval/knn", "timm:vit_base_patch16_224")
    with pytest.raises(ConfigError):
        check_apart(str(tmp_path / "weights"), str(file))
