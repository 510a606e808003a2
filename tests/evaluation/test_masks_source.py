"""`ccmim eval masks` draws masks by the run's own score source, also by one that it does not know by name."""

import torch
from tiny import images, tiny_config, tiny_model

from ccmim_fast import registry
from ccmim_fast.data.stream.batch import Batch
from ccmim_fast.evaluation.masks.scores import score_and_divide
from ccmim_fast.models.scores import ScoreSource


class Rising(ScoreSource):
    """Scores that rise from patch to patch."""

    def logits(self, vit, x_BLD):
        return torch.arange(float(x_BLD.shape[1])).expand(len(x_BLD), -1)


def test_a_source_of_the_registry_draws_its_masks(monkeypatch):
    found = registry.ScoreSource("rising", f"{__name__}:Rising", lambda *_: 0.0)
    monkeypatch.setitem(registry.SCORE_SOURCES, "rising", found)
    load = registry.load
    monkeypatch.setattr(registry, "load", lambda path: Rising if path == found.path else load(path))
    model, _ = tiny_model()
    config = tiny_config(score={"source": "rising"}, mask={"strategy": "importance"})
    with torch.no_grad():
        ids_B = torch.arange(2)
        scored = score_and_divide(model.eval(), config, Batch(images(2), ids_B, torch.zeros_like(ids_B)), None)
    assert scored.source == "rising"
    count = scored.masks["importance"].shape[1]
    assert scored.masks["importance"][0].nonzero().flatten().tolist() == list(range(count - 18, count))
