"""Each test's indexes lie in a folder of its own."""

import pytest


@pytest.fixture(autouse=True)
def _indexes_are_temporary(tmp_path_factory, monkeypatch):
    """Indexes are put in a folder of the test's own, never in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
