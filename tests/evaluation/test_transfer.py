"""`ccmim eval transfer` on miniature iNaturalist and Flowers-102, repeated augmentation, averaged weights.

Chance is 1/3 of 150 test images, with a standard deviation of 0.039. Margins are six of it at least.
"""

import json

import numpy as np
import pytest
import torch
from made_fine_grained import make_flowers, make_inaturalist
from torch import nn

from ccmim_fast import cli
from ccmim_fast.checkpoints import io
from ccmim_fast.config.evaluation import EvalConfig, images_of
from ccmim_fast.config.keys import flatten
from ccmim_fast.errors import DataError
from ccmim_fast.evaluation import finetune
from ccmim_fast.evaluation.protocols import protocol
from ccmim_fast.evaluation.supervised import Supervised
from ccmim_fast.optim.ema import averaged_in, build_ema, update_ema_

CHANCE, MARGIN = 1 / 3, 0.25
SETS = {"inaturalist": make_inaturalist, "flowers": make_flowers}
SHORT = [
    *("--train.batch_size=100", "--optim.warmup_epochs=2", "--run.test_every=100", "--run.log_every=1"),
    *("--optim.base_lr=5e-3", "--augment.auto=", "--augment.erase=0", "--augment.cutmix=0", "--augment.mixup=0.1"),
]


@pytest.fixture(scope="module")
def trees(tmp_path_factory, cache):
    """Each set, of the shapes that the encoder of these tests was told."""
    return {name: make(tmp_path_factory.mktemp(name) / "set", 300, 150, cache=cache) for name, make in SETS.items()}


@pytest.mark.parametrize(("source", "decay", "precision"), [("inaturalist", 0.7, "fp32"), ("flowers", 0.9999, "bf16")])
def test_beats_chance(evaluated, trees, source, decay, precision):
    """So does an average over the last few steps; one that has hardly left the initial weights does not.

    In half precision too, where autocast keeps weights that it has cast.
    """
    more = [f"--data.source={source}", f"--data.root={trees[source]}", "--train.epochs=6", f"--optim.ema={decay}"]
    result = evaluated("transfer", *SHORT, *more, f"--train.precision={precision}")
    found, averaged = result["figures"]["accuracy"], result["figures"]["accuracy, averaged weights"]
    assert found > CHANCE + MARGIN
    assert averaged > CHANCE + MARGIN if decay == 0.7 else averaged < found - MARGIN / 2
    assert result["images"] == "300 images of 3 classes to train on, 150 images of 3 classes to test on"
    assert f"optim.ema: {decay} (0.0)" in result["deviations"]


def test_frozen_features_of_such_sets(evaluated, trees):
    """Whoever reads folders of classes reads these too."""
    settings = ["--data.source=flowers", f"--data.root={trees['flowers']}", "--knn.k=[10]"]
    assert evaluated("knn", *settings)["figures"]["k=10"] > CHANCE + MARGIN


def test_presets():
    images = {
        "transfer": None,
        "transfer_inat2018": (437513, 24426, 8142),
        "transfer_inat2019": (265213, 3030, 1010),
        "transfer_flowers": (2040, 6149, 102),
    }
    sources = {"transfer": "images", "transfer_flowers": "flowers"}
    figures = {
        "model.drop_path": 0.1,
        "head.init_std": 0.02,
        "augment.auto": "rand-m9-mstd0.5-inc1",
        "augment.erase": 0.1,
        "augment.mixup": 0.8,
        "augment.cutmix": 1.0,
        "augment.smoothing": 0.1,
        "augment.repeats": 3,
        "optim.base_lr": 1e-4,
        "optim.min_lr": 1e-5,
        "optim.weight_decay": 0.05,
        "optim.warmup_epochs": 5,
        "train.epochs": 360,
        "train.batch_size": 768,
    }
    for name, numbers in images.items():
        of = protocol("transfer", name)
        assert of.images == numbers
        changed = {key: value for key, value in flatten(of.config).items() if flatten(EvalConfig())[key] != value}
        source = sources.get(name, "inaturalist")
        assert changed == figures | ({} if source == "images" else {"data.source": source})


def repeated(trees, tmp_path, **changes):
    """Training images of one epoch in their order, (images [N, C, H, W], labels [N]), and the ids of their samples."""
    config, job = job_of(trees, tmp_path, **changes)
    batches = finetune.AugmentedLoader(job)
    count = 300 // config.train.batch_size
    stream = batches.stream(0)
    parts = [next(stream) for _ in range(count)]
    shown = batches.plan.micro_batches(0)
    ids = np.concatenate([next(shown).ids_B for _ in range(count)])
    return torch.cat([images for images, _ in parts]), ids


def job_of(trees, tmp_path, data_changes=(), **changes):
    from dataclasses import replace

    from ccmim_fast.evaluation.encoders import read_encoder
    from ccmim_fast.evaluation.images import Images, open_both
    from ccmim_fast.evaluation.job import Job
    from ccmim_fast.ranks.session import open_session

    config = protocol("transfer", "transfer_flowers").config
    data = replace(config.data, root=str(trees["flowers"]), image_size=(32, 32), **{"workers": 1, **dict(data_changes)})
    train = replace(config.train, batch_size=60, device="cpu", precision="fp32")
    augment = replace(config.augment, mixup=0.0, cutmix=0.0, **changes)
    config = replace(config, data=data, train=train, augment=augment)
    weights = read_encoder("timm:test_vit")
    of_both = [images_of(data, weights.mean, weights.std, test) for test in (False, True)]
    with open_session("cpu", 1.0) as here:
        return config, Job(config, here, tmp_path, weights, *map(Images, open_both(config, *of_both), of_both))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_image_is_told_as_it_is(trees, tmp_path, monkeypatch, workers):
    """Without the traceback of the process that met it."""
    _, job = job_of(trees, tmp_path, {"workers": workers, "on_error": "error"})

    def decode(index):
        raise DataError("7.png: damaged")

    monkeypatch.setattr(job.train.source, "decode", decode)
    with pytest.raises(DataError, match=r"\A7\.png: damaged; data\.on_error=skip goes on without it\Z"):
        next(finetune.AugmentedLoader(job).stream(0))


def test_every_repeat_is_another_picture(trees, tmp_path):
    images, ids = repeated(trees, tmp_path)
    assert len(ids) == 300
    assert len(set(ids)) == 100
    for group in images.view(100, 3, -1):
        assert not any(torch.equal(group[i], group[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    again, _ = repeated(trees, tmp_path)
    assert torch.equal(images, again)
    _, once = repeated(trees, tmp_path, repeats=1)
    assert len(set(once)) == 300
    assert once[:100].tolist() == ids[::3].tolist()


def test_goes_on_bit_for_bit(evaluated, trees, tmp_path):
    """Stopped within an epoch, and so within the repeats of an image; averaged weights and their tests too."""
    more = [*SHORT, "--data.source=flowers", f"--data.root={trees['flowers']}", "--optim.ema=0.9", "--train.epochs=1"]
    more += ["--optim.warmup_epochs=1"]
    more += ["--train.batch_size=50", "--augment.auto=rand-m3-mstd0.5-inc1", "--augment.erase=0.25"]
    evaluated("transfer", *more, folder="whole")
    evaluated("transfer", *more, "--train.max_steps=4", folder="parts")
    evaluated("transfer", *more, "--resume=auto", folder="parts")
    whole, parts = (io.newest(tmp_path / folder / "checkpoints").state for folder in ("whole", "parts"))
    assert whole["progress"]["step"] == parts["progress"]["step"] == 6
    for key in ("model", "optimizer", "ema"):
        torch.testing.assert_close(parts[key], whole[key], rtol=0, atol=0)
    figures = [json.loads((tmp_path / folder / "result.json").read_text())["figures"] for folder in ("whole", "parts")]
    assert figures[0] == figures[1]


def test_the_average_is_that_of_the_weights_of_all_steps(evaluated, tmp_path, monkeypatch):
    """By hand, in float64, from the weights before the run and after each step."""
    seen, train = [], Supervised.train

    def watched(self, batches, step, count):
        seen.append({name: p.detach().double().clone() for name, p in self.model.named_parameters()})
        return train(self, batches, step, count)

    monkeypatch.setattr(Supervised, "train", watched)
    evaluated("transfer", *SHORT, "--optim.ema=0.6", "--train.epochs=2")
    state = io.newest(tmp_path / "out" / "checkpoints").state
    average, *later = [*seen, {name: state["model"][name].double() for name in seen[0]}]
    for weights in later:
        average = {name: 0.6 * average[name] + 0.4 * value for name, value in weights.items()}
    assert len(later) == 6
    for name, value in average.items():
        found = state["ema"][f"module.{name}"]
        torch.testing.assert_close(found.double(), value, rtol=1e-6, atol=1e-7)
        assert not torch.equal(found, state["model"][name])


def test_a_test_of_the_average_leaves_the_weights_as_they_were():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ema = build_ema(model, 0.5)
    for parameter in model.parameters():
        parameter.data.add_(1.0)
    model(torch.randn(8, 3))
    update_ema_(ema, model, 0.5)
    own, average = ({k: v.clone() for k, v in one.state_dict().items()} for one in (model, ema.module))
    places = [p.data_ptr() for p in model.parameters()]
    with averaged_in(model, ema):
        torch.testing.assert_close(dict(model.state_dict()), average, rtol=0, atol=0)
        assert not torch.equal(model[0].weight, own["0.weight"])
        assert [p.data_ptr() for p in model.parameters()] == places
    torch.testing.assert_close(dict(model.state_dict()), own, rtol=0, atol=0)
    torch.testing.assert_close(dict(ema.module.state_dict()), average, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        (["--data.source=flowers", "--data.root=nowhere"], 3, "data.root='nowhere': No such file or directory"),
        (["--config", "transfer_inat2018", "--data.root=."], 3, "no train2018.json or train2019.json"),
        (["--config", "transfer_flowers", "--data.root=."], 3, "no setid.mat in it; expected jpg/image_00001.jpg"),
        (["--config", "transfer_flowers", "--data.test=x"], 2, "setid.mat says what to test on"),
        (["--config", "finetune"], 2, "no preset of ccmim eval transfer; one of transfer, transfer_flowers"),
        (["--data.source=inaturalst"], 2, "nearest valid is inaturalist"),
        (["--augment.repeats=0"], 2, "augment.repeats=0: must be in [1, 2147483647]"),
        (["--optim.ema=1"], 2, "optim.ema=1.0: must be in [0, 1)"),
    ],
)
def test_mistakes_are_one_line(settings, code, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["eval", "transfer", "timm:test_vit", *settings]) == code
    [line] = capsys.readouterr().err.splitlines()
    assert words in line
