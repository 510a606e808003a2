"""Random and mutated files and command lines give a valid configuration or one line, and never anything else."""

import contextlib
import random

import pytest

from ccmim_fast.config.keys import settings
from ccmim_fast.config.load import from_yaml, load_config, presets, to_yaml
from ccmim_fast.config.schema import Config
from ccmim_fast.config.validate import validate
from ccmim_fast.errors import ConfigError

SCRAPS = [
    *(
        "",
        "0",
        "1",
        "-1",
        "2",
        "16",
        "0.5",
        "1.5",
        "1e3",
        "1e999",
        "-0.0",
        ".nan",
        "-.inf",
        "nan",
        "0x1f",
        "0b1",
        "1_0",
    ),
    *("9" * 30, "9" * 5000, "0x" + "f" * 5000, "1:30", "007", "true", "yes", "off", "null", "~", "auto", "never"),
    *("[]", "[1]", "[1, 2]", "[0.5, 0.5, 0.5]", "[a]", "[[1], 2]", "[224, 224]", "{}", "{a: 1}", "{ratio: 2}", "*a"),
    *("&a [*a]", "!!int ''", "!!bool x", "!!binary x", "!!python/name:os.system", "2024-13-45", "'", '"', "- a", "? b"),
    *(
        "a: b",
        "a\nb",
        "a\tb",
        "\0",
        "\x85",
        "\u2028",
        "\ud800",
        "\U0001f600",
        "%",
        "@",
        "`",
        "|",
        ">",
        "#",
        "--",
        "---",
    ),
    *(
        "random",
        "block",
        "importance",
        "vit_base_patch16_224",
        "vit_huge_patch14_224",
        "resnet50",
        "cpu",
        "fp16",
        "hog",
    ),
    *("[" * 3000, "{" * 3000, "x" * 3000, "a.b.c.d", "mask.ratio", "../../x", "/", "${HOME}", "$(id)", "\x1b[31m"),
]
KEYS = [
    *settings(),
    "mask",
    "run",
    "data",
    "train",
    "ratio",
    "mask.rato",
    "config",
    "resume",
    "overwrite",
    "print_config",
]


def random_value(rng: random.Random, key: str) -> str:
    """Mostly what suits the key, so that some cases get far."""
    if key in settings() and rng.random() < 0.5:
        default = settings()[key].default
        return str(list(default) if isinstance(default, tuple) else default)
    return rng.choice(SCRAPS)


def random_yaml(rng: random.Random) -> str:
    lines = []
    for _ in range(rng.randint(0, 6)):
        key = rng.choice(KEYS)
        section, dot, name = key.partition(".")
        value = random_value(rng, key)
        lines += [f"{section}:", f"  {name}: {value}"] if dot and rng.random() < 0.7 else [f"{key}: {value}"]
    return "\n".join(lines)


def mutated(rng: random.Random, text: str) -> str:
    for _ in range(rng.randint(1, 4)):
        start = rng.randint(0, len(text))
        end = min(len(text), start + rng.choice([0, 1, 1, 5, 40]))
        text = text[:start] + rng.choice([*SCRAPS, "\n", " ", ":", ""]) + text[end:]
    return text


def random_argv(rng: random.Random) -> list[str]:
    argv = []
    for _ in range(rng.randint(0, 5)):
        key = rng.choice(KEYS)
        value = random_value(rng, key)
        option = rng.choice(["--{}={}", "--{} {}", "--{}", "{}={}", "-{} {}", "--{}{}", "--{}={}", "--{}={}"])
        argv += option.format(key, value).split(" ", 1)
    return argv


def outcome(argv: list[str]) -> str:
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
    hash(config)
    assert from_yaml(to_yaml(config), "a round trip") == config, argv
    return "valid"


@pytest.mark.parametrize("seed", range(4))
def test_fuzz(seed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(seed)
    originals = [*(path.read_text() for path in presets().values()), to_yaml(Config())]
    seen = []
    for _ in range(120):
        argv = random_argv(rng) if rng.random() < 0.6 else []
        kind = rng.choice(["none", "random", "mutated", "bytes"])
        if kind != "none":
            text = random_yaml(rng) if kind == "random" else mutated(rng, rng.choice(originals))
            content = text.encode("utf-8", "surrogatepass")
            if kind == "bytes":
                at = rng.randrange(max(1, len(content)))
                content = content[:at] + rng.randbytes(rng.randint(0, 8)) + content[at:]
            (tmp_path / "fuzz.yaml").write_bytes(content)
            argv += ["--config", "fuzz.yaml"]
        with contextlib.redirect_stdout(None):
            seen.append(outcome(argv))
    assert "failed" not in seen
    assert seen.count("valid") >= 10, "too few cases got through to mean anything"
    assert seen.count("refused") >= 30
    assert {path.name for path in tmp_path.iterdir()} <= {"fuzz.yaml"}
