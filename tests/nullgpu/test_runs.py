"""Whole commands run on a CUDA device, from their options to what they write; what they compute is not looked at."""

import json

import numpy as np
import pytest
from nullgpu import commands
from nullgpu.null_device import HERE, Result, end_of, run
from PIL import Image

from ccmim_fast.evaluation.registry import EVALUATIONS

SCRIPT = HERE / "run_commands.py"
RUNS, MORE_RUNS = (list(of(HERE)) for of in (commands.runs, commands.more_runs))
# Of tables that a host reads, no kernel has computed the rows.
ENDS = {
    "knn": (None, "k=10 must be in 1..0, the number of training images"),
    "views": (None, "k=10 must be in 1..0, the number of training images"),
    "segmentation": (3, "no image to test on that has a class can be read any more"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of the quick tests, and images to embed."""
    return with_images(tmp_path_factory.mktemp("runs"))


def with_images(folder):
    (folder / "images").mkdir()
    for index in range(4):
        pixels = np.random.default_rng(index).integers(0, 256, (70, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def quick(folder) -> Result:
    return run(SCRIPT, given=commands.runs(folder))


@pytest.fixture(scope="module")
def more_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("more")


@pytest.fixture(scope="module")
def more(more_folder) -> Result:
    return run(SCRIPT, given=commands.more_runs(more_folder), timeout=1200)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> Result:
    folder = with_images(tmp_path_factory.mktemp("evaluated"))
    trained = {"trained": commands.pretrain(folder, commands.TRAINED)}
    lines = {kind: commands.evaluation(folder, kind) for kind in EVALUATIONS} | {"predict": commands.predict(folder)}
    # Fresh memory is zero, so that a number of boxes, which no kernel has computed, is none.
    return run(SCRIPT, given=trained | lines, timeout=1200, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def ended(result: Result, name: str) -> dict:
    """Return the outcome of a command that ended well, and did work on the device."""
    assert name in result.told, end_of(result)
    found = result.told[name]
    assert (found["code"], found["error"]) == (0, None), found["err"]
    assert found["refused"] == {}
    return found


def steps_of(folder) -> list[int]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize("name", RUNS)
def test_a_command_ends_well(quick, name):
    assert ended(quick, name)["launches"] > 0


def test_a_resumed_run_goes_on_where_it_was(quick, folder):
    first, resumed = (ended(quick, name)["launches"] for name in ("bank on the device", "resumed"))
    assert steps_of(folder / commands.TRAINED) == [2, 4, 5, 6]
    assert resumed < first / 2  # one step of six


def test_a_graph_is_launched_once_a_step(quick, folder):
    graphs = [ended(quick, name)["graphs"] for name in ("graph", "graph, resumed")]
    changed = [quick.told[name]["changed"] for name in ("graph", "graph, resumed")]
    assert (graphs, changed) == ([5, 1], [0, 0])
    assert steps_of(folder / "graph") == [2, 4, 5, 6]


def test_embeddings_have_a_row_for_each_image(quick, folder):
    ended(quick, "embed")
    assert np.load(folder / "rows.npy").shape == (4, 128)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_RUNS)
def test_another_command_ends_well(more, name):
    assert (ended(more, name)["launches"] > 0) == ("export" not in name)


@pytest.mark.slow
@pytest.mark.parametrize("store", ["host", "file"])
def test_a_bank_elsewhere_is_resumed(more, more_folder, store):
    ended(more, f"bank {'on the host' if store == 'host' else 'in a file'}, resumed")
    assert steps_of(more_folder / store) == [2, 4, 5, 6]


@pytest.mark.slow
def test_what_commands_say_and_write(more, more_folder):
    assert "largest micro-batch that fits: 32 images" in ended(more, "find_batch")["out"]
    assert "ccmim_divide_tokens_kernel" in ended(more, "recompute, our kernels")["own kernels"]
    ended(more, "profile")
    assert (more_folder / "profile" / "profile" / "table.md").exists()


@pytest.mark.slow
def test_predictions_come_from_the_device(evaluated):
    found = evaluated.told["predict"]
    assert found["launches"] > 0
    assert (found["code"] in (0, 4), found["error"]) == (True, None), found["err"]  # 4: no kernel made finite weights


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVALUATIONS)
def test_an_evaluation_takes_its_first_step(evaluated, kind):
    assert kind in evaluated.told, end_of(evaluated)
    found = evaluated.told[kind]
    assert found["launches"] > 100, found["err"]
    if kind in ENDS:
        code, words = ENDS[kind]
        assert found["code"] == code
        assert words in (found["error"] or found["err"])
    else:
        assert (found["code"], found["error"]) == (0, None), found["err"]
