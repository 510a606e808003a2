"""Random and mutated files and options give a valid configuration or one line, and never anything else (fault 27)."""

import contextlib
import tempfile
from collections import Counter
from pathlib import Path

from fuzzed import KEYS, SCRAPS, changed
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ccmim_fast.config.keys import settings
from ccmim_fast.config.load import from_yaml, load_config, presets, to_yaml
from ccmim_fast.config.schema import Config
from ccmim_fast.config.validate import validate
from ccmim_fast.errors import ConfigError

ORIGINALS = [*(path.read_text() for path in presets().values()), to_yaml(Config())]
CASES = 1200  # with those of tests/test_cli_fuzz.py 2,000


@st.composite
def pairs(draw):
    """A key and a value, which mostly suits it, so that some cases get far."""
    key = draw(st.sampled_from(KEYS))
    suitable = draw(st.integers(0, 2)) if key in settings() else 0
    if not suitable:
        return key, draw(st.one_of(st.sampled_from(SCRAPS), st.text(max_size=12)))
    default = settings()[key].default
    return key, str(list(default) if isinstance(default, tuple) else default)


def as_yaml(found):
    lines = []
    for (key, value), nested in found:
        section, dot, name = key.partition(".")
        lines += [f"{section}:", f"  {name}: {value}"] if dot and nested else [f"{key}: {value}"]
    return "\n".join(lines)


texts = st.one_of(
    st.lists(st.tuples(pairs(), st.booleans()), max_size=6).map(as_yaml),
    changed(st.sampled_from(ORIGINALS)),
    st.text(max_size=40),
)
files = st.one_of(
    texts.map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.tuples(texts, st.binary(min_size=1, max_size=8)).map(
        lambda parts: parts[1] + parts[0].encode("utf-8", "surrogatepass")
    ),
)
ways = st.sampled_from(["--{}={}", "--{}={}", "--{}={}", "--{} {}", "--{}", "{}={}", "-{} {}", "--{}{}"])
options = st.lists(st.tuples(ways, pairs()).map(lambda given: given[0].format(*given[1]).split(" ", 1)), max_size=4)


def outcome(argv: list[str], tripped: set[Config]) -> str:
    """What `load_config` does: a configuration that validates and survives a round trip, an exit, or one line."""
    try:
        config = load_config(argv, "ccmim")
    except ConfigError as error:
        message = str(error)
        assert len(message.splitlines()) == 1, argv
        assert message.isprintable(), argv
        assert len(message) < 1000, argv
        return "refused"
    except SystemExit as left:
        return "printed" if left.code == 0 else "failed"
    assert isinstance(config, Config)
    validate(config)
    if config not in tripped:
        assert from_yaml(to_yaml(config), "a round trip") == config, argv
        tripped.add(config)
    return "valid"


def test_fault_27_files_and_options(monkeypatch):
    seen, tripped = Counter(), set()

    @hypothesis_settings(max_examples=CASES, deadline=None, derandomize=True, database=None)
    @given(st.none() | files, options)
    def run(content, found):
        argv = [word for words in found for word in words]
        if content is not None:
            Path("fuzz.yaml").write_bytes(content)
            argv += ["--config", "fuzz.yaml"]
        with contextlib.redirect_stdout(None):
            seen[outcome(argv, tripped)] += 1

    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.chdir(folder)
        run()
        assert {path.name for path in Path(folder).iterdir()} <= {"fuzz.yaml"}
        monkeypatch.undo()
    assert seen.total() >= CASES
    assert not seen["failed"]
    assert seen["valid"] >= CASES / 20, f"too few cases got through to mean anything: {seen}"
    assert seen["refused"] >= CASES / 4, seen
    assert len(tripped) >= 10
