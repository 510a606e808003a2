"""This module makes a configuration of a YAML file or preset, and of `--a.b=c` from the command line.

A file is a list of settings like the command line, so both go one way: key checked against the schema, text typed,
ranges validated. Whatever is wrong is a ConfigError of one line.
"""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ccmim_fast.config.keys import build, flatten, nearest, show
from ccmim_fast.config.parser import Parser
from ccmim_fast.config.schema import Config
from ccmim_fast.config.validate import validate
from ccmim_fast.config.values import read
from ccmim_fast.config.yaml_file import read_settings
from ccmim_fast.errors import ConfigError


class _Dumper(yaml.SafeDumper):
    """One setting a line: lists in brackets."""

    def represent_sequence(self, tag, sequence, flow_style=None):
        return super().represent_sequence(tag, sequence, flow_style=True)


def load_config(
    argv: list[str],
    prog: str,
    schema: type = Config,
    check: Callable[[Any], None] = validate,
    folder: str = "",
    base: Any = None,
) -> Any:
    """The configuration that the options `argv` ask for, a `schema`.

    `--config PATH_OR_PRESET` (once at most), `--key=value` or `--key value` for any setting (the last one counts, and
    it counts more than the file), a bare `--key` for true, `--resume X` and `--overwrite` for those of `run`.

    Args:
        argv: what stands behind the command, such as ["--config", "demo", "--mask.ratio=0.6"].
        prog: the command as the help text names it, such as "ccmim pretrain".
        check: raises ConfigError for one that cannot run.
        folder: below configs/, that has the presets.
        base: whose settings stand where nothing is asked for, such as a checkpoint's; None: the schema's defaults.

    Raises:
        ConfigError: one line naming the key, the value and the nearest valid one.
        SystemExit: 0, after printing what `--help` or `--print_config` (the resolved configuration) ask for.
    """
    return make_config(_parser(prog, schema, folder).parse_args(argv).settings, schema, check, folder, base)


@cache
def _parser(prog: str, schema: type, folder: str) -> Parser:
    parser = Parser(prog)
    parser.add_settings(schema, presets(folder))
    return parser


def make_config(
    given: dict[str, str],
    schema: type = Config,
    check: Callable[[Any], None] = validate,
    folder: str = "",
    base: Any = None,
) -> Any:
    """Return the configuration that `given` asks for: what `Parser.parse_args(...).settings` holds.

    The other arguments and the errors are those of `load_config`.
    """
    values = {} if base is None else flatten(base)
    asked = dict(given)
    printing = asked.pop("print_config", None) is not None
    if "config" in asked:
        content, source = _read_file(asked.pop("config"), folder)
        values |= _values(content, source, schema)
    values |= {key: read(key, text, schema=schema) for key, text in asked.items()}
    config = build(values, schema)
    check(config)
    if printing:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def on_preset(name: str, argv: list[str]) -> list[str]:
    """Return the settings `argv`, on top of the preset `name` where they name no file or preset themselves."""
    return argv if any(word.startswith("--config") for word in argv) else ["--config", name, *argv]


def presets(below: str = "") -> dict[str, Path]:
    """The shipped presets by name, in alphabetic order; those of pretraining, or in a folder `below` theirs."""
    package = Path(__file__).parents[1]
    # An installed package has them as the data of ccmim_fast.configs; in a checkout they lie beside ccmim_fast/.
    folder = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
    return {path.stem: path for path in sorted((folder / below).glob("*.yaml"))}


def to_yaml(config: Config) -> str:
    """Every setting of `config` as YAML; loading it gives an equal Config."""
    nested: dict[str, Any] = {}
    for key, value in flatten(config).items():
        section, _, name = key.rpartition(".")
        owner = nested.setdefault(section, {}) if section else nested
        owner[name] = list(value) if isinstance(value, tuple) else value
    return yaml.dump(nested, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True)


def from_yaml(text: str, name: str, schema: type = Config, check: Callable[[Any], None] = validate) -> Any:
    """Return the configuration that `text` holds, such as a checkpoint's; `name` says in messages where it stands.

    Raises:
        ConfigError: as `load_config`.
    """
    config = build(_values(text, f" in {name}", schema), schema)
    check(config)
    return config


def difference(a: Config, b: Config) -> list[tuple[str, Any, Any]]:
    """(key, its value in `a`, its value in `b`) for each setting in which they differ, in the schema's order."""
    return [(key, old, new) for (key, old), new in zip(flatten(a).items(), flatten(b).values()) if old != new]


def _read_file(name: str, folder: str) -> tuple[bytes, str]:
    """The content of the file or preset that `--config name` means, and how messages name it."""
    path = Path(name)
    if os.sep not in name and path.suffix not in (".yaml", ".yml"):
        known = presets(folder)
        if name not in known:
            raise ConfigError(f"--config={show(name)}: no such preset; nearest is {nearest(name, known)}")
        path = known[name]
        name = path.name
    try:
        return path.read_bytes(), f" in {name if name.isprintable() else show(name)}"
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        reason = getattr(error, "strerror", None) or error
        hint = nearest(path.stem, presets(folder))
        raise ConfigError(f"--config={show(name)}: {reason}; nearest preset is {hint}") from None


def _values(content: bytes | str, source: str, schema: type) -> dict[str, Any]:
    return {key: read(key, raw, source, schema) for key, raw in read_settings(content, source, schema).items()}
