"""A run's own scores against objects whose places are known."""

import numpy as np
import torch
from tiny import tiny_config

from ccmim_fast.ablation.runs import probe_scores
from ccmim_fast.engine.pretraining import fit
from ccmim_fast.evaluation.masks.objects import object_patches, score_auroc

COUNT = 12


def probed(tmp_path, look, **sections):
    """What `look` makes of a run after one epoch."""
    found = []
    config = tiny_config(
        run={"dir": str(tmp_path / "run"), "tensorboard": False},
        data={"source": "shapes", "samples": 16, "root": str(tmp_path / "shapes"), "flip": True},
        train={"batch_size": 8, "epochs": 1, "precision": "fp32", "device": "cpu"},
        **sections,
    )
    fit(config, after_epoch=lambda epoch, run: found.append(look(run)) if epoch else None)
    return found[0]


def test_a_bank_that_knows_the_objects_scores_one(tmp_path):
    """Maps filled with the very objects: AUROC near 1, objects hidden; and with their opposite."""

    def look(run):
        masks = torch.stack([torch.from_numpy(run.source.mask(i).copy()) for i in range(16)])[:, None].float()
        cells = torch.nn.functional.interpolate(masks, (16, 16), mode="area")[:, 0] - 0.5
        before = run.model.state_dict()["encoder.cls_token"].clone()
        run.bank.fill((40 * cells).half())
        right = probe_scores(run, 1, COUNT)
        assert torch.equal(run.bank.contents(), (40 * cells).half())
        assert torch.equal(run.model.state_dict()["encoder.cls_token"], before)
        run.bank.fill((-40 * cells).half())
        return right, probe_scores(run, 1, COUNT)

    right, wrong = probed(tmp_path, look, score={"source": "bank"})
    assert right["auroc"] > 0.97
    assert right["leakage"] < 0.2
    assert wrong["auroc"] < 0.03
    assert wrong["leakage"] > 1.2
    assert right["auroc_all"] == wrong["auroc_all"]


def test_other_scores_are_those_that_divide(tmp_path):
    """The first patches of the next epoch's stream, its crops and masks."""

    def look(run):
        found = probe_scores(run, 1, COUNT)
        shown = next(run.loader.stream(16))
        ids, sizes = shown.ids_B[:COUNT], (32, 48)
        assert shown.epochs_B.tolist() == [1] * 8
        logits = run.model.score(run.model.embed(shown.images_BHWC)).detach()
        return found, ids, logits, sizes

    found, ids, logits, _ = probed(tmp_path, look, score={"source": "all"})
    assert found["auroc"] == found["auroc_all"]
    assert logits.shape == (8, 24)
    assert len(ids) == 8


def test_random_masks_have_no_scores(tmp_path):
    found = probed(tmp_path, lambda run: probe_scores(run, 1, COUNT), mask={"strategy": "random"})
    assert found["auroc"] == 0.5
    assert found["auroc_all"] != 0.5
    assert 0.6 < found["leakage"] < 1.4


def test_objects_are_cropped_and_mirrored_with_their_images(tmp_path):
    """The objects' own pixels are the brightest of images made so: their crops must lie on each other."""

    def look(run):
        # Score = how much of the patch differs from the background, read off the very images the model gets.
        original = run.source.decode

        def painted(index):
            image = np.zeros_like(original(index))
            image[run.source.mask(index)] = 255
            return image

        run.source.decode = painted
        seen = {}
        forward = run.model.forward

        def watched(images_BHWC, *args, **kwargs):
            bright = object_patches(images_BHWC[..., 0] > 127, run.model.patch).float()
            output = forward(images_BHWC, *args, **kwargs)
            seen["bright"] = bright
            return output._replace(logits_BL=bright)

        run.model.forward = watched
        try:
            return probe_scores(run, 1, COUNT)["auroc"]
        finally:
            run.source.decode, run.model.forward = original, forward

    assert probed(tmp_path, look, score={"source": "all"}) == 1.0


def test_of_unknown_objects_the_loss_alone_is_told(tmp_path):
    class Other:
        """A source that is not of shapes."""

        def __init__(self, source):
            self.decode, self.sizes_N2, self.labels_N = source.decode, source.sizes_N2, source.labels_N

    def look(run):
        known = probe_scores(run, 1, COUNT)
        run.source = Other(run.source)
        return known, probe_scores(run, 1, COUNT)

    known, unknown = probed(tmp_path, look)
    assert unknown == {"recons": known["recons"]}


def test_auroc_of_ties_is_a_half():
    assert score_auroc(torch.zeros(1, 4), torch.tensor([[True, False, True, False]])) == 0.5
