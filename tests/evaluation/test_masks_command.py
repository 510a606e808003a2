"""`ccmim eval masks`: figures where the answer is known, pictures that hold what they should, mistakes in one line."""

import io as bytes_io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import tiny_config, tiny_model

from ccmim_fast.checkpoints import io
from ccmim_fast.checkpoints.convert import to_flat
from ccmim_fast.cli import main
from ccmim_fast.config.load import from_yaml
from ccmim_fast.data.build import build_source
from ccmim_fast.data.index.indexed import open_images
from ccmim_fast.engine.pretraining import fit
from ccmim_fast.evaluation.masks import scores
from ccmim_fast.evaluation.masks.objects import MaskFolder, object_patches
from ccmim_fast.runs.folder import evaluation_folder

SIZE, GRID, SAMPLES = (32, 48), (4, 6), 24
STRATEGIES = ("random", "block", "importance", "importance_sampling")
LEAKAGES = {f"leakage, {strategy}" for strategy in STRATEGIES}
LOSSES = {f"recons, {strategy}" for strategy in STRATEGIES}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of three epochs of shapes with a score bank; a checkpoint of each."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    return fit(
        tiny_config(
            run={"dir": str(folder), "tensorboard": False, "save_every": 1},
            data={"source": "shapes", "samples": SAMPLES, "image_size": SIZE, "workers": 1},
            train={"epochs": 3, "batch_size": 12, "device": "cpu", "precision": "fp32"},
            score={"source": "bank"},
            optim={"warmup_epochs": 1.0},
        )
    )


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


def looked(place, *options, out=None):
    """What result.json holds, and where it lies."""
    folder = Path(evaluation_folder(str(place), "masks")) if out is None else out
    where = [] if out is None else [f"--run.dir={out}"]
    assert main(["eval", "masks", str(place), *map(str, options), *where, "--train.device=cpu"]) == 0
    return json.loads((folder / "result.json").read_text()), folder


def plant(run, sign):
    """The run's bank scores the very objects highest, or lowest."""
    state = io.load(io.checkpoints(run / "checkpoints")[-1])
    config = from_yaml(state["config"], "x")
    source = build_source(config.data, config.seed)
    masks = torch.stack([torch.from_numpy(source.mask(i).copy()) for i in range(SAMPLES)])[:, None].float()
    cells = F.interpolate(masks, state["maps"].shape[1:], mode="area")[:, 0] - 0.5
    state["maps"] = (sign * 40 * cells).half()
    io.save(run / "checkpoints", 99, state, keep=9)


def test_a_bank_that_knows_the_objects_hides_them(run):
    plant(run, 1)
    result, _ = looked(run)
    assert result["scores"] == "bank"
    assert result["figures"]["auroc"] > 0.97
    assert result["figures"]["leakage, importance"] < 0.05
    assert result["figures"]["leakage, importance_sampling"] < 0.2
    assert result["figures"]["leakage, random"] == pytest.approx(1, abs=0.4)
    assert result["deviations"] == []
    plant(run, -1)
    against, _ = looked(run, "--overwrite")
    assert against["figures"]["auroc"] < 0.03
    assert against["figures"]["leakage, importance"] > 2
    # What is not read from the bank stays.
    assert against["sources"]["all blocks"] == result["sources"]["all blocks"]
    assert against["figures"]["leakage, random"] == result["figures"]["leakage, random"]


def test_scores_that_are_the_objects_have_the_figures_of_perfect_ones(trained, tmp_path, monkeypatch):
    """AUROC 1, no leakage of importance; leakage of random masks is 1 within five of its standard errors."""

    def planted(model, images_BHWC, ids_B, known):
        masks_BHW = torch.stack([torch.from_numpy(source.mask(i).copy()) for i in ids_B.tolist()])
        object_BL = object_patches(masks_BHW, 8)
        return {"all blocks": 30 * object_BL.double(), "block 0": -30 * object_BL.double()}

    monkeypatch.setattr(scores, "_logits", planted)
    settings = ["--data.samples=200", "--score.source=all", "--measure=200"]
    source = build_source(tiny_config(data={"source": "shapes", "samples": 200, "image_size": SIZE}).data, 0)
    result, _ = looked(trained, *settings, out=tmp_path / "out")
    assert result["figures"]["auroc"] == 1
    assert result["figures"]["leakage, importance"] == 0
    assert result["figures"]["leakage, importance_sampling"] < 0.01
    # About 900 object patches, each visible with p = 1/4: relative to 1/4 a standard error of 0.06 at most.
    assert result["figures"]["leakage, random"] == pytest.approx(1, abs=0.3)
    assert result["sources"]["block 0"]["auroc"] == 0
    other, _ = looked(trained, *settings, "--score.source=first", out=tmp_path / "other")
    assert other["scores"] == "block 0"
    assert other["figures"]["auroc"] == 0
    assert other["figures"]["leakage, importance"] > 2


def test_sources_are_read_as_the_method_does(trained, tmp_path):
    result, _ = looked(trained, out=tmp_path / "out")
    assert set(result["sources"]) == {"all blocks", "block 0", "block 1", "block 2", "bank"}
    assert result["scores"] == "bank"
    assert result["figures"].keys() == {"auroc", "entropy", "top quarter", *LEAKAGES, *LOSSES}
    assert {key: result["sources"]["bank"][key] for key in ("auroc", "entropy")} == {
        key: result["figures"][key] for key in ("auroc", "entropy")
    }
    assert result["step"] == 6
    by_block, _ = looked(trained, "--score.source=block", "--score.block=1", out=tmp_path / "block")
    assert by_block["scores"] == "block 1"
    assert by_block["figures"]["auroc"] == result["sources"]["block 1"]["auroc"]
    # Other images: the bank knows nothing of them, and the page says so.
    held_out, _ = looked(trained, "--seed=1", out=tmp_path / "held_out")
    assert held_out["scores"] == "all blocks"
    assert "bank knows nothing" in held_out["deviations"][0]
    mae, _ = looked(trained, "--seed=1", "--mask.strategy=random", out=tmp_path / "mae")
    assert (mae["scores"], mae["deviations"]) == ("all blocks", [])


def test_it_is_the_same_each_time_and_another_with_another_seed(trained, tmp_path):
    first, at = looked(trained, "--moments=2", out=tmp_path / "a")
    again, then = looked(trained, "--moments=2", out=tmp_path / "b")
    assert (first["figures"], first["sources"], first["moments"]) == (
        again["figures"],
        again["sources"],
        again["moments"],
    )
    for name in first["pictures"]:
        assert (at / name).read_bytes() == (then / name).read_bytes()
    _, there = looked(trained, "--seed=3", out=tmp_path / "c")
    assert (there / "masks.png").read_bytes() != (at / "masks.png").read_bytes()
    # Fewer images measured: those drawn are of them.
    assert first["images"].startswith(f"{SAMPLES} images")
    assert looked(trained, "--measure=5", out=tmp_path / "d")[0]["images"].startswith("5 images")


def tiles(path):
    """Rows and columns of pictures on white, and the standard deviation of the pixels of each [rows, columns]."""
    pixels = np.asarray(Image.open(bytes_io.BytesIO(path.read_bytes())).convert("RGB")).astype(float)
    drawn = (pixels < 250).any(axis=2)

    def runs(share):
        (inside,) = np.nonzero(share > 0.6)
        parts = np.split(inside, np.flatnonzero(np.diff(inside) > 8) + 1)  # lines in white are narrower than gaps
        return [(part[0], part[-1] + 1) for part in parts if len(part) > 20]

    rows, columns = runs(drawn.mean(axis=1)), runs(drawn.mean(axis=0))
    return np.array([[pixels[a:b, c:d].std() for c, d in columns] for a, b in rows])


def test_pictures_have_their_rows_and_columns(trained, tmp_path):
    """Image, scores, four strategies, reconstruction; image, four moments, importance at the last. None is blank."""
    result, folder = looked(trained, "--drawn=3", "--moments=3", out=tmp_path / "out")
    assert result["pictures"] == ["masks.png", "moments.png"]
    for name, columns in (("masks.png", 7), ("moments.png", 6)):
        seen = tiles(folder / name)
        assert seen.shape == (3, columns)
        assert (seen > 1).all()
    page = (folder / "result.md").read_text()
    assert "![masks.png](masks.png)" in page
    assert page.count("\n| 3 |") == 1  # the last epoch


def test_moments_begin_with_the_weights_that_the_seed_draws(trained, tmp_path):
    from ccmim_fast.build.model import build_model

    result, _ = looked(trained, "--moments=3", out=tmp_path / "out")
    assert [(moment["step"], moment["epoch"]) for moment in result["moments"]] == [(0, 0), (2, 1), (4, 2), (6, 3)]
    assert result["moments"][-1]["figures"] == result["figures"]
    assert len({moment["figures"]["recons, random"] for moment in result["moments"]}) == 4
    # Before the first step, saved as a checkpoint, it is the same again.
    state = io.load(io.checkpoints(trained / "checkpoints")[0])
    config = from_yaml(state["config"], "x")
    torch.manual_seed(config.seed)
    state["model"], state["maps"] = build_model(config).state_dict(), None
    io.save(tmp_path / "initial" / "checkpoints", 0, state, keep=1)
    initial, _ = looked(tmp_path / "initial")
    assert initial["figures"] == result["moments"][0]["figures"]


def photographs(folder, size=(40, 60)):
    """Six images, the left third of each white, in two folders; no two names are equal."""
    masks = {}
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 200, (*size, 3), dtype=np.uint8)
        pixels[:, : size[1] // 3] = 255
        path = folder / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        masks[path] = pixels.min(axis=2) == 255
    return masks


def test_a_folder_without_masks_and_with_them(trained, tmp_path):
    masks = photographs(tmp_path / "photos")
    without, folder = looked(trained, tmp_path / "photos", out=tmp_path / "without")
    assert without["figures"].keys() == {"entropy", "top quarter", *LOSSES}
    assert all(figures.keys() == {"entropy", "top quarter"} for figures in without["sources"].values())
    assert tiles(folder / "masks.png").shape == (4, 7)
    assert "auroc |" not in (folder / "result.md").read_text()
    # Of every kind that holds a mask, in folders as the images or all in one.
    for i, (path, mask_HW) in enumerate(masks.items()):
        image = Image.fromarray(mask_HW.astype(np.uint8) * (1 + i))
        kinds = ["L", "P", "LA", "RGB", "1", "I;16"]
        if kinds[i] == "P":
            image.putpalette([0, 0, 0] * 256)  # all black: the numbers count
        elif kinds[i] == "I;16":
            image = Image.fromarray(mask_HW.astype(np.uint16))
        else:
            image = image.convert(kinds[i]) if kinds[i] != "1" else Image.fromarray(mask_HW)
        place = tmp_path / "objects" / (path.parent.name if i < 3 else "") / f"{path.stem}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        image.save(place)
    given = ("--masks", tmp_path / "objects")
    with_them, _ = looked(trained, tmp_path / "photos", *given, out=tmp_path / "with")
    assert with_them["figures"].keys() == {"auroc", "entropy", "top quarter", *LEAKAGES, *LOSSES}
    assert with_them["sources"]["block 0"]["entropy"] == without["sources"]["block 0"]["entropy"]
    source = open_images(str(tmp_path / "photos"))
    objects = MaskFolder(tmp_path / "objects", str(tmp_path / "photos"), source)
    for i in range(len(source)):
        assert (objects.mask(i) == masks[Path(source.name(i))]).all()


def test_weights_of_others(trained, tmp_path, monkeypatch):
    """MAE's file with its decoder, an encoder alone, timm's initial weights."""
    monkeypatch.chdir(tmp_path)
    photographs(tmp_path / "photos")
    sizes = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    model, _ = tiny_model(
        torch.float32,
        data={"image_size": (32, 32)},
        model=sizes,
        contrast={"loss": "none"},
        mask={"strategy": "random"},
    )
    torch.save({"model": to_flat(model.state_dict())}, tmp_path / "mae.pth")
    encoder = {name.removeprefix("encoder."): value for name, value in model.state_dict().items() if "encoder" in name}
    torch.save(encoder, tmp_path / "encoder.pth")
    settings = ["--model.arch=vit_tiny_patch16_224", "--model.num_heads=3", "--decoder.num_heads=4"]
    mae, folder = looked("mae.pth", "photos", *settings)
    assert folder == Path("runs/eval/masks")
    assert mae["figures"].keys() == {"entropy", "top quarter", *LOSSES}
    assert (mae["scores"], mae["step"]) == ("all blocks", None)
    assert tiles(folder / "masks.png").shape == (4, 7)
    alone, folder = looked("encoder.pth", "photos", *settings[:2], out=tmp_path / "alone")
    assert alone["figures"].keys() == {"entropy", "top quarter"}
    assert alone["sources"] == mae["sources"]
    assert (alone["deviations"], mae["deviations"]) == ([], [])
    assert tiles(folder / "masks.png").shape == (4, 6)
    small = ["--data.image_size=[32,32]", "--model.patch_size=8", "--model.embed_dim=48", "--model.depth=1"]
    initial, _ = looked("timm:vit_tiny_patch16_224", "photos", *small, out=tmp_path / "initial")
    assert set(initial["sources"]) == {"all blocks", "block 0"}


def test_it_lies_in_its_runs_folder(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = io.checkpoints(trained / "checkpoints")[0]
    assert evaluation_folder(str(trained), "knn") == str(trained / "eval" / "knn")
    assert evaluation_folder(str(checkpoint), "knn") == str(trained / "eval" / "knn")
    shutil.copytree(checkpoint, tmp_path / "alone")
    for other in ("alone", "x.pth", "timm:vit_tiny_patch16_224"):
        assert evaluation_folder(other, "knn") == "runs/eval/knn"
    monkeypatch.chdir(checkpoint)
    assert Path(evaluation_folder(".", "knn")).resolve() == trained / "eval" / "knn"


def test_mistakes_are_one_line(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photographs(tmp_path / "photos")
    (tmp_path / "none").mkdir()
    Image.new("L", (9, 8), 1).save(tmp_path / "none" / "5.png")
    here = str(run)
    for argv, code, words in (
        ([], 2, "required: CHECKPOINT"),
        (["nowhere"], 5, "nowhere: cannot be read as weights"),
        (["none"], 5, "none: no complete checkpoint in it"),
        (["timm:vit_tiny"], 2, "no model of timm"),
        (["timm:vit_tiny_patch16_224"], 3, "data.root"),
        ([here, "gone"], 3, "gone"),
        ([here, "--masks=gone"], 3, "--masks=gone: no such folder"),
        ([here, "photos", "--masks=none"], 3, "no 0.png in it"),
        ([here, "photos", "--masks=photos"], 3, "no 0.png in it"),
        ([here, "--drawn=0"], 2, "--drawn: '0' must be a whole number in 1..64"),
        ([here, "--moments=x"], 2, "--moments"),
        (["timm:vit_tiny_patch16_224", "--moments=2"], 2, "needs the folder of a run"),
        ([here, "--optim.base_lr=1"], 2, "--optim.base_lr=1.0: changes nothing here"),
        ([here, "--model.depth=2"], 2, "--model.depth=2: changes nothing here"),
        ([here, "--mask.ration=0.5"], 2, "did you mean --mask.ratio?"),
        ([here, "--mask.ratio=1"], 2, "mask.ratio=1"),
        (
            [here, "--score.source=block", "--score.block=9", "--mask.strategy=random"],
            2,
            "score.block=9 must be in 0..2",
        ),
        ([here, "photos", "extra"], 2, "extra"),
        ([here, "--run.dir=photos"], 2, "not empty"),
    ):
        assert main(["eval", "masks", *argv]) == code, argv
        error = capsys.readouterr().err
        assert error.count("\n") == 1, argv
        assert words in error, argv
    assert not (run / "eval").exists()
    assert main(["eval", "mask"]) == 2
    assert "nearest: masks" in capsys.readouterr().err


def test_masks_of_another_size_or_of_nothing(run, tmp_path, capsys):
    masks = photographs(tmp_path / "photos")
    (tmp_path / "objects").mkdir()
    for path, mask_HW in masks.items():
        Image.fromarray(0 * mask_HW.astype(np.uint8)).save(tmp_path / "objects" / f"{path.stem}.png")
    given = ["eval", "masks", str(run), str(tmp_path / "photos"), f"--masks={tmp_path / 'objects'}"]
    assert main(given) == 3
    assert "none of 6 images has both object and background" in capsys.readouterr().err
    Image.new("L", (50, 40), 1).save(tmp_path / "objects" / "3.png")
    assert main(given) == 3
    assert re.search(r"3\.png: 40 x 50 pixels, its image has 40 x 60\n$", capsys.readouterr().err)
    (tmp_path / "objects" / "3.png").write_bytes(b"none")
    assert main(given) == 3
    assert "3.png: no mask" in capsys.readouterr().err


def test_help_names_its_options(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["eval", "masks", "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("--masks", "--moments", "--drawn", "--measure", "mask.", "CHECKPOINT"))
