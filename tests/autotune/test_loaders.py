"""The loader that brings more images is taken, if it brings the reference's: the same ids, pixels within two levels."""

from types import SimpleNamespace

import pytest
import torch

from ccmim_fast.autotune import loaders
from ccmim_fast.config.schema import DataConfig
from ccmim_fast.data.source import NOTHING_EXCLUDED
from ccmim_fast.data.stream.batch import Batch

CPU = torch.device("cpu")
SOURCE = type("Source", (), {"excluded_X": NOTHING_EXCLUDED, "__len__": lambda self: 64})()
PIXELS_BHWC = torch.randint(0, 250, (32, 4, 4, 3), dtype=torch.uint8)


class Loader:
    """It takes some seconds of a clock for each batch, and adds to the pixels of the last image and to all ids."""

    clock = 0.0  # of all loaders

    def __init__(self, seconds: float = 0.001, levels: int = 0, ids: int = 0):
        self.seconds, self.levels, self.ids = seconds, levels, ids

    def stream(self, cursor):
        images_BHWC = PIXELS_BHWC.clone()
        images_BHWC[-1] += self.levels
        while True:
            Loader.clock += self.seconds
            yield Batch(images_BHWC, torch.arange(32) + self.ids, torch.zeros(32, dtype=torch.int64))


@pytest.fixture
def decided(monkeypatch):
    """decided(name=loader or error, ...): the decision among them, in this order."""
    monkeypatch.setattr(loaders, "time", SimpleNamespace(perf_counter=lambda: Loader.clock))

    def decide(**given):
        def build(source, data, seed, batch, device):
            if isinstance(given[data.loader], Exception):
                raise given[data.loader]
            return given[data.loader]

        monkeypatch.setattr(loaders, "build_loader", build)
        return loaders.fastest_loader(SOURCE, DataConfig(), list(given), CPU)

    return decide


def test_the_faster_one_is_taken_wherever_it_stands(decided):
    assert decided(dali=Loader(), torch=Loader(0.01)).chosen == "dali"
    found = decided(dali=Loader(0.01), torch=Loader())
    assert found.chosen == "torch"
    assert found.milliseconds["torch"] < found.milliseconds["dali"]


def test_pixels_may_differ_by_two_levels_in_each_image(decided):
    assert decided(dali=Loader(levels=2), torch=Loader(0.01)).chosen == "dali"
    found = decided(dali=Loader(levels=3), torch=Loader(0.01))
    assert found.chosen == "torch"
    assert found.dropped == {"dali": "an image differs by 3 of 255 levels on average, allowed are 2"}


def test_other_images_are_dropped(decided):
    found = decided(dali=Loader(ids=1), torch=Loader(0.01))
    assert (found.chosen, found.milliseconds) == ("torch", {})
    assert found.dropped["dali"] == "its images are others than the reference's, or in another order"


def test_a_loader_that_fails_is_dropped_with_its_reason(decided):
    found = decided(dali=RuntimeError("no\ndriver"), torch=Loader())
    assert (found.chosen, found.dropped) == ("torch", {"dali": "RuntimeError: no driver"})
