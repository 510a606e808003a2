"""Six views of an image: the same of timm's encoder as of a run's model, and classifiers of each."""

import pytest
import torch
from made_run import make_run
from timm.models.eva import Eva

from ccmim_fast.ablation.runs import measure_features
from ccmim_fast.data.made.shapes import ShapesSource
from ccmim_fast.data.stream.torch_loader import evaluation_batches
from ccmim_fast.errors import ConfigError
from ccmim_fast.evaluation.encoders import Encoder, build_encoder, read_encoder
from ccmim_fast.evaluation.frozen.views import VIEWS, FewPatches, by_view, probes
from ccmim_fast.models.views import random_partition, take_views

SQUARE = {"image_size": (32, 32)}
ENCODERS = {
    "plain": {},
    "registers": {"model": {"registers": 3}},
    "rotary": {"model": {"positions": "rope"}},
    "eva02": {
        "model": {"arch": "eva02_tiny_patch14_224", "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    },
    "mixed": {
        "model": {
            "arch": "vit_small_patch16_rope_mixed_224",
            "patch_size": 8,
            "embed_dim": 48,
            "depth": 2,
            "num_heads": 3,
        }
    },
}


@pytest.mark.parametrize("name", ENCODERS)
def test_timms_encoder_and_the_runs_give_the_same_views(tmp_path, name):
    """Each by a way of its own: timm's places for dropped patches, and the gathered tokens of a step."""
    model, config = make_run(tmp_path, data=SQUARE, mask={"ratio": 0.6}, **ENCODERS[name])
    source = ShapesSource(0, 5, (32, 32), 2)
    [batch] = evaluation_batches(source, (32, 32), 5, torch.device("cpu"))
    ours_BV2D = take_views(model, batch.images_BHWC, batch.ids_B).pooled_BV2D
    weights = read_encoder(str(tmp_path))
    assert weights.mask_ratio == 0.6
    vit = build_encoder(weights, (32, 32), config.model.num_heads).eval()
    assert isinstance(vit, Eva) == (name in ("rotary", "eva02", "mixed"))
    with torch.no_grad():
        theirs = FewPatches(Encoder(vit, weights.mean, weights.std).eval(), weights.mask_ratio)(batch)
    torch.testing.assert_close(theirs.view(ours_BV2D.shape), ours_BV2D, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(ours_BV2D[:, 0], ours_BV2D[:, 1], atol=1e-2)


def test_the_set_of_patches_is_the_samples_own():
    """Whatever the batch; every patch alike."""
    ids_B = torch.arange(4000)
    few_BK = random_partition(ids_B, 4, (4, 4)).ids_visible_BK
    assert torch.equal(random_partition(ids_B[7:9], 4, (4, 4)).ids_visible_BK, few_BK[7:9])
    assert not torch.equal(random_partition(ids_B, 4, (4, 4), 1).ids_visible_BK, few_BK)
    counts_L = few_BK.flatten().bincount(minlength=16)
    assert counts_L.sum() == 16000
    assert (counts_L - 1000).abs().max() < 6 * (4000 * 0.25 * 0.75) ** 0.5


def test_views_by_their_keys():
    pooled_NV2D = torch.randn(5, 2, 2, 3)
    found = by_view(pooled_NV2D)
    assert list(found) == list(VIEWS)
    assert torch.equal(found["_cls"], pooled_NV2D[:, 0, 0])
    assert torch.equal(found[""], pooled_NV2D[:, 0, 1])
    assert torch.equal(found["_visible"], pooled_NV2D[:, 1, 1])
    assert torch.equal(found["_both_visible"], torch.cat([pooled_NV2D[:, 1, 0], pooled_NV2D[:, 1, 1]], dim=1))


@pytest.mark.parametrize("told", [view for view in VIEWS if "both" not in view])
def test_each_probe_is_of_its_own_view(told):
    """The label is in one part of the features alone: in what a view has of that, and in no other."""
    generator, labels_N = torch.Generator().manual_seed(0), torch.arange(200) % 2
    pooled_NV2D = 0.1 * torch.randn(200, 2, 2, 4, generator=generator)
    pooled_NV2D[:, int("visible" in told), int("cls" not in told), 0] += 2 * labels_N - 1
    found = probes(pooled_NV2D[:140], labels_N[:140], pooled_NV2D[140:], labels_N[140:], [5])
    knows = {told, "_both_visible" if "visible" in told else "_both"}
    for view, accuracies in found.items():
        assert accuracies.keys() == {"k=5", "logreg"}
        for accuracy in accuracies.values():
            assert (accuracy > 0.95) if view in knows else (0.25 < accuracy < 0.75), view


def test_of_the_patches_average_the_figures_are_as_ever(tmp_path):
    """`knn` and `logreg` alone, of averaged tokens of whole images."""
    from ccmim_fast.evaluation.frozen.features import extract
    from ccmim_fast.evaluation.frozen.knn import knn_accuracies
    from ccmim_fast.evaluation.frozen.logreg import logreg_accuracy
    from ccmim_fast.models.tokens import tokens_of

    model, config = make_run(tmp_path, data=SQUARE)
    sources = [ShapesSource(seed, 40, (32, 32), 2) for seed in (0, 1)]
    found = measure_features(model, config, *sources)
    assert found.keys() == {f"{name}{view}" for name in ("knn", "logreg") for view in VIEWS}
    parts = []
    for source in sources:
        batches = evaluation_batches(source, (32, 32), 40, torch.device("cpu"))
        parts += extract(tokens_of(model.encoder, model.mean_C, model.std_C), batches, 1)
    assert found["knn"] == knn_accuracies(*parts, [20])[20]
    assert found["logreg"] == logreg_accuracy(*parts)[0]


def test_the_evaluation_has_all_views(evaluated):
    """One pass over each set of images; the patches' average of whole images as `knn` and `logreg` have it."""
    result = evaluated("views", "--knn.k=[10]")
    figures = result["figures"]
    assert list(figures) == [f"{name} {view}" for view in VIEWS.values() for name in ("k=10", "logreg")]
    assert figures["k=10 average"] == evaluated("knn", "--knn.k=[10]", folder="knn")["figures"]["k=10"]
    assert figures["logreg average"] == evaluated("logreg", folder="logreg")["figures"]["accuracy"]
    assert figures["k=10 average"] > 0.6
    assert figures["k=10 average (visible)"] < figures["k=10 average"]
    cls = evaluated("knn", "--knn.k=[10]", "--model.pool=cls", folder="cls")["figures"]["k=10"]
    assert figures["k=10 [CLS]"] == cls
    almost = evaluated("views", "--knn.k=[10]", "--model.mask_ratio=0.01", folder="almost")["figures"]
    assert abs(almost["k=10 average (visible)"] - almost["k=10 average"]) < 0.05


@pytest.mark.parametrize(
    ("checkpoint", "said"),
    [
        ("timm:vit_base_patch16_siglip_224", "has no [CLS] token"),
        ("timm:beit_base_patch16_224", "is a Beit, and takes no few patches; needs VisionTransformer"),
    ],
)
def test_encoders_without_these_views_are_refused(evaluated, checkpoint, said, monkeypatch):
    import timm

    made = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: made(name, **options, depth=1))
    with pytest.raises(ConfigError) as caught:
        evaluated("views", checkpoint=checkpoint)
    assert said in str(caught.value)
