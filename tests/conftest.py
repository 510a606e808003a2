"""Every test runs with poisoned memory, a fixed seed and no default device."""

import pytest
import torch


def pytest_configure(config):
    # Memory from torch.empty is filled with NaN, so that reading what nobody wrote shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
