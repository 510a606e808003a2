"""The model divides by the settings of the division, whatever scores its patches, as loops over the patches say."""

import pytest
import torch
from tiny import images, tiny_config, tiny_model, total_loss

from ccmim_fast.build.model import build_model
from ccmim_fast.errors import ConfigError
from ccmim_fast.models.scores import PriorScores

B, L, M = 4, 24, 18
EPOCHS = {"epochs": 5}


def counts(epoch=None, **sections):
    sampling = build_model(tiny_config(train=EPOCHS, **sections), epoch).sampling
    return tuple(sampling[key] for key in ("important", "hints", "temperature", "epochs"))


def test_counts_are_shares_of_the_masked_patches():
    assert counts() == ((M, M), (0, 0), (1.0, 1.0), 5)
    assert counts(mask={"importance": 0.7, "hints": 0.15}) == ((13, 13), (2, 2), (1.0, 1.0), 5)
    scheduled = {
        "mask": {"importance": (0.0, 0.5), "hints": 0.3},
        "score": {"source": "all", "temperature": (4.0, 1.0)},
    }
    assert counts(**scheduled) == ((0, 9), (0, 3), (4.0, 1.0), 5)


@pytest.mark.parametrize(
    ("epoch", "found"), [(0, (0, 0, 4.0)), (1.9, (2, 1, 3.25)), (4, (9, 3, 1.0)), (5, (9, 3, 1.0))]
)
def test_an_opened_run_divides_as_at_its_epoch(epoch, found):
    """9 patches by importance and 3 hints at the end: 2.25 and 0.75 of them after the first of four steps."""
    scheduled = {
        "mask": {"importance": (0.0, 0.5), "hints": 0.3},
        "score": {"source": "all", "temperature": (4.0, 1.0)},
    }
    assert counts(epoch, **scheduled)[:3] == found


def test_more_hints_than_stay_visible_are_refused_whatever_the_architecture():
    """Where the patch is not in the name, when the model is built."""
    config = tiny_config(
        model={"arch": "flexivit_small", "patch_size": 0}, mask={"hints": 0.4}, data={"image_size": (240, 240)}
    )
    with pytest.raises(ConfigError, match=r"^mask\.hints=0\.4: must be at most 56 of the 169 patches by importance"):
        build_model(config)


@pytest.mark.parametrize("source", ["bank", "first", "block", "all"])
@pytest.mark.parametrize("teacher", [1.0, 0.5])
def test_every_source_of_scores(source, teacher):
    """Of the six highest logits (r = 1/3) two are shown; the others and the next two are masked, and any 12."""
    sections = {"score": {"source": source, "block": 1}, "teacher": {"tokens": teacher}}
    mask = {"strategy": "importance", "importance": (1.0, 1 / 3), "hints": 1 / 3}
    model, config = tiny_model(mask=mask, train=EPOCHS, **sections)
    prior = PriorScores(torch.randn(B, L), torch.ones(B, L)) if source == "bank" else None
    pictures = images(B)
    output = model(pictures, torch.arange(B), torch.tensor([4, 4, 9, 4]), prior=prior)
    for logits_L, mask_L in zip(output.logits_BL, output.partition.mask_BL):
        order = logits_L.argsort(descending=True).tolist()
        masked = [patch for patch in range(L) if mask_L[patch]]
        assert len(masked) == M
        assert sum(patch in masked for patch in order[:6]) == 4
        assert set(order[6:8]) <= set(masked)
    losses = total_loss(model, output, pictures, config)
    losses.total.backward()
    assert losses.total.isfinite()
    assert output.partition.ids_teacher_BT.shape == (B, round(M * teacher))
    # In the first epoch all are by importance, and six of them are shown: those 18 masked are of the 24 highest.
    first = model(pictures, torch.arange(B), 0, prior=prior)
    assert torch.equal(first.partition.mask_BL.sum(1), torch.full((B,), M))
    assert not torch.equal(first.partition.mask_BL, output.partition.mask_BL)
