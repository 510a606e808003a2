"""Every name of timm's ViT classes trains, with every source of scores, or a line says why not."""

from importlib.metadata import version
from pathlib import Path

import architectures_page
import pytest
import torch

from ccmim_fast.config.load import load_config
from ccmim_fast.config.validate import patch_size
from ccmim_fast.models.encoder import build_encoder
from ccmim_fast.registry import SCORE_SOURCES

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
BY_METHOD = {name: (f"--score.source={name}", "--score.block=1") for name in SCORE_SOURCES}
BY_METHOD["random"] = ("--mask.strategy=random",)
BY_METHOD["mae"] = ("--mask.strategy=random", "--contrast.loss=none")


@pytest.fixture(scope="module")
def structures():
    return architectures_page.structures()


@pytest.mark.slow
def test_the_page_says_what_trains(structures):
    """`make architectures` writes it; another timm may list other names, of which as many must train."""
    found, text = architectures_page.rows(structures), PAGE.read_text()
    counts = architectures_page.counts(found)
    for kind, least in (("VisionTransformer", 0.95), ("VisionTransformerDistilled", 0.95), ("Eva", 0.9)):
        train, of = counts[kind]
        assert train >= least * of, f"{kind}: {[row for row in found if row.kind == kind and row.trains != 'yes']}"
    for row in found:
        assert row.trains == "yes" or len(row.trains) > 40, row
    if f"timm {version('timm')}." in text:
        assert architectures_page.page(found) == text


@pytest.mark.slow
@pytest.mark.parametrize("method", BY_METHOD)
def test_every_method_trains_every_structure(structures, method):
    for name in (alike[0] for key, alike in structures.items() if "HybridEmbed" not in key[1]):
        assert architectures_page.trained(name, *BY_METHOD[method]) == "yes", name


@pytest.mark.slow
def test_every_structure_builds_at_its_own_width(structures):
    """Width and heads as published, and the patch that a check reads off the name; on no device."""
    for name in (alike[0] for key, alike in structures.items() if "HybridEmbed" not in key[1]):
        patch = patch_size(load_config([f"--model.arch={name}"], "ccmim pretrain")) or 16
        with torch.device("meta"):
            vit = build_encoder(name, image_size=(2 * patch, 2 * patch), channels=3, depth=2)
        assert vit.patch_embed.patch_size[0] == patch, name
