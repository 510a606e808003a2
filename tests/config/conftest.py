"""Loading of a file, and of mistakes."""

import pytest

from ccmim_fast.config.load import difference, load_config
from ccmim_fast.config.schema import Config
from ccmim_fast.errors import ConfigError


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads a file `demo.yaml` with the given text, then options: what differs from the defaults, by key."""
    monkeypatch.chdir(tmp_path)

    def run(text: str, *options: str) -> dict:
        (tmp_path / "demo.yaml").write_text(text)
        config = load_config(["--config", "demo.yaml", *options], "ccmim")
        return {key: new for key, _, new in difference(Config(), config)}

    return run


@pytest.fixture
def error_of():
    """The message with which a call is refused, once it is seen to be one line."""

    def run(function, *args) -> str:
        with pytest.raises(ConfigError) as caught:
            function(*args)
        message = str(caught.value)
        assert len(message.splitlines()) == 1
        assert message.isprintable()
        return message

    return run
