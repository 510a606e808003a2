"""`ccmim eval detection` end to end: what is learnt on shapes, going on, COCO's folder, what is refused."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_coco import SIZES, write_coco
from PIL import Image
from ranks_launcher import run_ranks

from ccmim_fast import cli
from ccmim_fast.checkpoints import io
from ccmim_fast.config.evaluation import DetectConfig, EvalConfig, EvalDataConfig, EvalTrainConfig, images_of
from ccmim_fast.data.index.bad_samples import BadSamples
from ccmim_fast.data.stream.plan import Plan
from ccmim_fast.errors import DataError
from ccmim_fast.evaluation.detection import run
from ccmim_fast.evaluation.detection.batches import ObjectLoader
from ccmim_fast.evaluation.detection.instances import ShapesInstances
from ccmim_fast.evaluation.detection.precision import average_precision
from ccmim_fast.evaluation.images import Images
from ccmim_fast.evaluation.loader import samples_to_test
from ccmim_fast.evaluation.protocols import protocol
from ccmim_fast.ranks.session import Session

pytest.importorskip("torchmetrics")
pytest.importorskip("faster_coco_eval")

SHOWN, TRAINED = 50, 300  # images
SMALL = ["--detect.short_sides=[32]", "--detect.width=16", "--detect.proposals=8", "--model.drop_path=0"]
SMALL += [f"--data.test_samples={SHOWN}", "--train.batch_size=20", "--optim.warmup_steps=10", "--run.test_every=100"]
LEARNS = [*SMALL, "--detect.proposals=16", "--optim.base_lr=0.05", "--optim.layer_decay=1", "--train.epochs=6"]
MARGIN = 0.05


PRESETS = {
    "detection": (3e-4, 32, 500, 0.05, 0.75, 0.2, 12 * 117266 // 32, (9 / 12, 11 / 12)),
    "detection_vitdet": (1e-4, 64, 250, 0.1, 0.7, 0.1, 184375, (163889 / 184375, 177546 / 184375)),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_hold_the_figures_of_their_protocols(name):
    of = protocol("detection", name)
    assert of.images == (117266, 5000, 80)
    optim, train = of.config.optim, of.config.train
    rate, batch, warmup, decay, layer_decay, drop_path, steps, milestones = PRESETS[name]
    assert (optim.name, optim.schedule, of.config.data.source) == ("adamw", "steps", "coco")
    assert optim.base_lr * batch / 256 == pytest.approx(rate)
    found = (train.batch_size, optim.warmup_steps, optim.weight_decay, optim.layer_decay)
    assert found == (batch, warmup, decay, layer_decay)
    assert of.config.model.drop_path == drop_path
    assert (train.steps or train.epochs * of.images[0] // batch) == steps
    assert optim.milestones == pytest.approx(milestones, abs=1e-6)


def constant_guess(cache):
    """AP of the mean of all training objects' boxes and masks, found in every image, of each class alike."""
    train, test = (
        ShapesInstances(seed, count, (32, 32), 3, cache_dir=str(cache)) for seed, count in ((0, TRAINED), (1, SHOWN))
    )
    known = [train.instances(i) for i in range(TRAINED)]
    box_14 = torch.from_numpy(np.mean([one.boxes_N4 for one in known], axis=0))
    mask_1HW = torch.from_numpy(np.mean([one.masks_NHW for one in known], axis=0) > 0.5)
    guess = {"boxes": box_14.repeat(3, 1), "masks": mask_1HW.repeat(3, 1, 1)}
    guess |= {"labels": torch.arange(1, 4), "scores": torch.ones(3)}
    return average_precision((guess, test.instances(i)) for i in range(SHOWN))


@pytest.mark.slow
def test_beats_a_constant_guess_and_itself_untrained(evaluated, cache):
    """Found in each of 50 images, the mean object has an AP of 3 %; the first weights have less than 1 %."""
    untrained = evaluated("detection", *LEARNS, "--optim.base_lr=0", "--train.max_steps=1", folder="untrained")
    result = evaluated("detection", *LEARNS)
    constant = constant_guess(cache)
    for figure in ("box AP", "mask AP"):
        chance = max(untrained["figures"][figure], constant[figure])
        assert chance < 0.05
        assert result["figures"][figure] > chance + MARGIN, (figure, chance)
    assert result["chance"] is None
    assert "detect.width: 16 (256)" in result["deviations"]
    assert result["deviations"][1].endswith("(117266 images to train on, 5000 to test on, 80 classes)")


def test_goes_on_bit_for_bit(evaluated, tmp_path):
    """Stopped within an epoch, accumulating, with drop path, another size and a flip for each image and epoch."""
    more = [*SMALL, "--data.samples=30", "--data.test_samples=4", "--train.batch_size=10", "--train.accumulate=2"]
    more += ["--train.epochs=2", "--model.drop_path=0.2", "--data.flip=true", "--detect.short_sides=[24,32,40]"]
    more += ["--run.log_every=1", "--optim.warmup_steps=2"]
    evaluated("detection", *more, folder="whole")
    evaluated("detection", *more, "--train.max_steps=2", folder="parts")
    evaluated("detection", *more, "--run.resume=auto", folder="parts")
    whole, parts = (io.newest(tmp_path / folder / "checkpoints").state for folder in ("whole", "parts"))
    assert whole["progress"]["step"] == parts["progress"]["step"] == 6
    for key in ("model", "optimizer"):
        torch.testing.assert_close(parts[key], whole[key], rtol=0, atol=0)
    losses = [
        [r["loss"] for r in map(json.loads, (tmp_path / folder / "metrics.jsonl").open()) if "loss" in r]
        for folder in ("whole", "parts")
    ]
    assert len(losses[0]) == 6
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_two_processes_equal_one(evaluated, encoder, cache, shared_settings, tmp_path):
    """51 test images: one rank has one more. A step of rate 0 trains nothing; losses are those of other draws."""
    more = [*SMALL, "--optim.base_lr=0", "--train.max_steps=1", "--data.test_samples=51"]
    one = evaluated("detection", *more, folder="one")
    settings = [*shared_settings, f"--data.root={cache}", f"--run.dir={tmp_path / 'two'}", *more]
    run_ranks(2, "-m", "ccmim_fast.cli", "eval", "detection", str(encoder), *settings)
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    assert two["ranks"] == 2
    assert one["figures"]["box AP"] > 0
    assert two["figures"] == pytest.approx(one["figures"], abs=1e-4)


@pytest.fixture
def coco(tmp_path):
    (tmp_path / "coco").mkdir()
    return write_coco(tmp_path / "coco")


VITDET = ["--config=detection_vitdet", "--data.image_size=[64,64]", "--detect.window=3", "--optim.warmup_steps=1"]


@pytest.mark.parametrize("recipe", [["--optim.warmup_steps=1"], VITDET], ids=["1x", "vitdet"])
def test_a_folder_of_coco(evaluated, coco, recipe):
    """Images of four sizes; of those to train on two have an object, those to test on are all four."""
    own = ["--data.source=coco", f"--data.root={coco}", "--train.batch_size=2", "--train.steps=2"]
    own += ["--detect.width=16", "--detect.proposals=8", "--detect.short_sides=[40,48]"]
    result = evaluated("detection", *recipe, *own)
    assert result["images"] == "2 images of 3 classes to train on, 4 images of 3 classes to test on"
    assert all(0 <= figure <= 1 for figure in result["figures"].values())


def job_of(root, workers=1, source="shapes"):
    data = EvalDataConfig(source=source, root=str(root), image_size=(32, 32), samples=8, classes=3, workers=workers)
    settings = EvalTrainConfig(batch_size=4, accumulate=2)
    config = EvalConfig(data=data, train=settings, detect=DetectConfig(short_sides=(24, 32, 40)))
    of_both = [images_of(data, (0.5,) * 3, (0.25,) * 3, test) for test in (False, True)]
    train, test = map(Images, run.open_images(config, *of_both), of_both)
    here = Session(0, 1, torch.device("cpu"))
    weights = SimpleNamespace(mean=(0.5,) * 3)
    return SimpleNamespace(config=config, here=here, train=train, test=test, weights=weights)


def test_who_finds_everything_where_it_lies_in_the_original_is_right(coco, monkeypatch):
    """Images of four sizes, shown in others, two of them without an object."""
    job, asked = job_of(coco, source="coco"), []

    def oracle(model, images, sizes):
        answers = []
        for image_CHW, size in zip(images, sizes):
            objects = job.test.source.instances(len(asked))
            asked.append(size)
            assert min(image_CHW.shape[1:]) == 40
            masks_N1HW = torch.from_numpy(objects.masks_NHW)[:, None].float()
            answer = {"boxes": torch.from_numpy(objects.boxes_N4), "masks": masks_N1HW}
            answers.append(
                answer | {"labels": torch.from_numpy(objects.labels_N) + 1, "scores": torch.ones(len(masks_N1HW))}
            )
        return answers

    monkeypatch.setattr(run, "detect", oracle)
    assert set(average_precision(run.found_in_share(None, job)).values()) == {1.0}
    assert asked == [tuple(size) for size in SIZES]


def test_bad_images_and_masks_are_left_out(evaluated, coco, tmp_path, capsys):
    """One image is cut, the runs of another's mask do not cover it, and a training image is of another size."""
    whole = (coco / "val2017" / "0.png").read_bytes()
    (coco / "val2017" / "0.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (30, 20)).save(coco / "train2017" / "1.png")
    file = coco / "annotations" / "instances_val2017.json"
    said = json.loads(file.read_text())
    said["annotations"][4]["segmentation"]["counts"] = "ooooooo0"
    file.write_text(json.dumps(said))
    own = ["--data.source=coco", f"--data.root={coco}", "--train.batch_size=2", "--train.steps=2", "--detect.width=16"]
    own += ["--optim.warmup_steps=1", "--detect.proposals=8", "--detect.short_sides=[40,48]"]
    with pytest.raises(DataError, match=r"1 of 4 samples cannot be used, .*max_bad=0.01, the last .*0.png"):
        evaluated("detection", *own)
    assert not (tmp_path / "out").exists()
    result = evaluated("detection", *own, "--data.max_bad=0.5")
    assert result["left_out"]["test"]["that cannot be read"]["images"] == 2
    assert result["left_out"]["train"]["without an object to train on"]["images"] == 2
    assert all(0 <= figure <= 1 for figure in result["figures"].values())
    assert "1.png: 20 x 30 pixels; its annotations are of 60 x 40" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_image_is_left_out_and_told_as_it_is(coco, workers):
    """Without the traceback of the process that met it; the others are tested on."""
    Image.new("RGB", (30, 20)).save(coco / "val2017" / "2.png")
    job = job_of(coco, workers, source="coco")
    job.test.bad = BadSamples(job.test.source, "skip", max_bad=0.25)
    assert [len(shown) for shown in samples_to_test(job, job.test.source.sample)] == [2, 1]
    [reason] = job.test.bad.reasons.values()
    assert re.fullmatch(r"\S+2\.png: 20 x 30 pixels; its annotations are of 48 x 48", reason)
    job.test.bad = BadSamples(job.test.source, "skip", max_bad=0.2)
    with pytest.raises(
        DataError, match=r"1 of 4 samples cannot be used, more than data.max_bad=0.2, the last \S+2.png"
    ):
        list(samples_to_test(job, job.test.source.sample))


@pytest.mark.parametrize("workers", [1, 2])
def test_draws_are_of_seed_epoch_and_image(cache, workers):
    """Not of the place the stream is taken up at, nor of the process that prepares the image."""
    job = job_of(cache)
    stream = ObjectLoader(job).stream(0)
    whole = [next(stream) for _ in range(8)]
    later = ObjectLoader(job_of(cache, workers)).stream(4)
    for expected in whole[2:]:
        got = next(later)
        for one, other in zip(expected[0], got[0]):
            assert torch.equal(one, other)
        torch.testing.assert_close(got[1], expected[1], rtol=0, atol=0)
    plan = Plan(job.train.source, 0, 4, 2, 0, 1).micro_batches(0)
    ids = [next(plan).ids_B.tolist() for _ in range(8)]
    shown = {}
    for of_ids, batch in zip(ids, whole):
        for index, image in zip(of_ids, batch[0]):
            shown.setdefault(index, []).append(image)
    assert all(len(images) == 2 for images in shown.values())  # two epochs
    assert not all(torch.equal(*images) for images in shown.values() if images[0].shape == images[1].shape)


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        (["--optim.name=sgd"], 2, "optim.name=sgd: detection has adamw; nearest valid is adamw"),
        (["--detect.window=4"], 2, "detect.window=4: needs images of one size; use detect.resize=jitter"),
        (["--detect.resize=jitter", "--data.image_size=[32,48]"], 2, "four patches; nearest valid is [32, 32]"),
        (["--detect.resize=jitter", "--detect.jitter=[2,1]"], 2, "detect.jitter=[2.0, 1.0]: must be from small to"),
        (["--detect.short_sides=[]"], 2, "detect.short_sides=[]: must be a list of one number at least"),
        (
            ["--optim.milestones=[0.5,1]"],
            2,
            "optim.milestones=[0.5, 1.0]: must be in (0, 1); nearest valid is [0.5, 0.5]",
        ),
        (["--data.mean=[0.5]", "--data.std=[0.2]"], 2, "detection has RGB, three values of each"),
        (["--data.source=images"], 2, "data.source=images: detection has coco, shapes; nearest valid is "),
        (["--data.source=coco", "--data.root=nowhere"], 3, "instances_train2017.json: No such file or directory"),
    ],
)
def test_mistakes_are_one_line(encoder, shared_settings, tmp_path, monkeypatch, capsys, settings, code, words):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["eval", "detection", str(encoder), *shared_settings, "--data.samples=20", *settings]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error


def test_patches_that_are_no_multiple_of_four_are_refused(encoder, shared_settings, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = [*shared_settings, "--data.image_size=[28,28]", "--data.samples=20", "--train.batch_size=4"]
    assert cli.main(["eval", "detection", "timm:vit_small_patch14_dinov2", *settings]) == 2
    assert "patches of 14 pixels; the pyramid needs a multiple of 4" in capsys.readouterr().err


def test_a_missing_library_is_named_with_its_command(encoder, shared_settings, tmp_path, monkeypatch, capsys):
    import importlib.util

    there = importlib.util.find_spec
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torchmetrics" else there(name))
    assert cli.main(["eval", "detection", str(encoder), *shared_settings]) == 6
    assert capsys.readouterr().err.endswith("needs torchmetrics: pip install 'ccmim_fast[detection]'\n")


def test_other_evaluations_do_without_its_libraries():
    code = (
        "import sys; import ccmim_fast.evaluation.run;"
        "assert not {'torchmetrics', 'faster_coco_eval', 'ccmim_fast.evaluation.detection.detector'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
