"""How long a run and its warm-up are, for every protocol that trains, in the unit that the user names."""

import pytest

from ccmim_fast.config.evaluation import EvalConfig, validate_evaluation
from ccmim_fast.config.load import make_config, presets
from ccmim_fast.evaluation.length import in_force, in_units_asked, with_warm_up
from ccmim_fast.evaluation.protocols import protocol
from ccmim_fast.evaluation.registry import EVALUATIONS
from ccmim_fast.evaluation.supervised import Supervised

TRAINED = [name for name in presets("eval") if not name.startswith(("knn", "logreg"))]
SHARES = {"finetune": 5 / 100, "linear": 10 / 90, "segmentation": 1500 / 160000, "detection_vitdet": 250 / 184375}
SHARES |= {"detection": 500 / (12 * 117266 / 32), "transfer": 5 / 360}


def run_of(name, images, **asked):
    """The settings of a run on so many images, as `ccmim eval` makes them."""
    of = protocol(next(one for one in EVALUATIONS if name.startswith(one)), name)
    asked = {key.replace("__", "."): value for key, value in asked.items()}
    config = in_units_asked(make_config({"config": name} | asked, EvalConfig, validate_evaluation, "eval"), asked)
    return with_warm_up(config, of.config, images, of.images[0] if of.images else images)


def shares(config, images):
    """The warm-up as a share of the run."""
    a_step = config.train.batch_size / images
    warm_up = config.optim.warmup_steps * a_step or config.optim.warmup_epochs
    return warm_up / (config.train.steps * a_step or config.train.epochs)


@pytest.mark.parametrize("asked", [{}, {"train__steps": "100"}, {"train__steps": "1"}, {"train__epochs": "1"}])
@pytest.mark.parametrize("name", TRAINED)
def test_a_warm_up_that_nobody_names_fits_every_run(name, asked):
    for images in (24, 96, 5000, 10**6):
        Supervised._check_warm_up(run_of(name, images, **asked), images)


@pytest.mark.parametrize("name", SHARES)
def test_a_short_run_warms_up_for_the_protocols_share(name):
    """An epoch is a step: of 4 epochs all protocols' own warm-ups are longer."""
    config = run_of(name, 96, train__batch_size="96", train__epochs="4")
    assert shares(config, 96) == pytest.approx(SHARES[name])
    assert run_of(name, 96, train__batch_size="96", train__steps="4").optim.warmup_steps == 1


def test_a_warm_up_that_fits_is_the_protocols_own():
    for name in TRAINED:
        of = protocol(next(one for one in EVALUATIONS if name.startswith(one)), name)
        assert run_of(name, 10**7).optim == of.config.optim


def test_of_an_epoch_of_few_steps_one_is_warm_up():
    assert run_of("segmentation", 96, train__steps="100").optim.warmup_steps == 1


def test_the_unit_that_is_named_counts():
    config = run_of("segmentation", 96, train__epochs="3")
    assert (config.train.steps, config.train.epochs) == (0, 3)
    config = run_of("segmentation", 96, optim__warmup_epochs="0")
    assert (config.optim.warmup_steps, config.optim.warmup_epochs) == (0, 0.0)
    config = run_of("segmentation", 96, train__epochs="3", train__steps="7")
    assert config.train.steps == 7
    assert run_of("linear", 10**6, train__steps="999999").optim.warmup_epochs == 10.0


def test_what_is_not_in_force_is_no_figure():
    figures = {"train.steps": 7, "train.epochs": 90, "optim.warmup_steps": 0, "optim.warmup_epochs": 10.0, "seed": 0}
    assert in_force(figures) == {"train.steps": 7, "optim.warmup_epochs": 10.0, "seed": 0}
    assert in_force(figures | {"train.steps": 0, "optim.warmup_steps": 1}) == {
        "train.epochs": 90,
        "optim.warmup_steps": 1,
        "seed": 0,
    }
