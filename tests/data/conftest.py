"""Tests of `data/` keep their indexes in a temporary cache folder."""

import pytest


@pytest.fixture(autouse=True)
def _indexes_are_temporary(tmp_path_factory, monkeypatch):
    """Set the cache folder to one of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
