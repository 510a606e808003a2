"""A configuration is made of a YAML file or preset, and of `--a.b=c` from the command line.

A file is a list of settings like the command line, so both go one way: key checked against the schema, text read in the
setting's type, ranges validated. Whatever is wrong is a ConfigError of one line.
"""

import math
import os
from collections.abc import Callable
from dataclasses import asdict
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
from ccmim_fast.secrets import without_secrets

_LONGEST = 2**18  # bytes of a file of settings; all of them with their values are 4,000


class _Dumper(yaml.SafeDumper):
    """This dumper writes one setting a line, and a list in brackets."""


_Dumper.add_representer(
    tuple, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
)


def load_config(argv: list[str], prog: str, base: Config | None = None) -> Config:
    """Return the configuration that the options `argv` ask for.

    `--config PATH_OR_PRESET` (once at most), `--key=value` or `--key value` for any setting (the last one counts, and
    it counts more than the file), a bare `--key` for true, `--resume X` and `--overwrite` for those of `run`.

    Args:
        argv: the words behind the command, such as ["--config", "demo", "--mask.ratio=0.6"].
        prog: the command as the help text names it, such as "ccmim pretrain".
        base: a configuration whose values stand where nothing is asked for; None: the schema's defaults.

    Raises:
        ConfigError: one line naming the key, the value and the nearest valid one.
        SystemExit: 0, after printing what `--help` or `--print_config` (the resolved configuration) ask for.
    """
    return make_config(settings_parser(prog).parse_args(argv).settings, base=base)


@cache
def settings_parser(prog: str) -> Parser:
    """Return the parser of a command whose options are settings alone."""
    parser = Parser(prog)
    parser.add_settings(presets=presets())
    return parser


def make_config(
    given: dict[str, str], schema: type = Config, check: Callable = validate, folder: str = "", base: Any = None
) -> Any:
    """Return the configuration, a `schema`, that `given` (the `settings` that a Parser read) asks for.

    `check` raises ConfigError for one that cannot run; `folder` below configs/ has the presets; else as `load_config`.
    """
    asked = dict(given)
    printing = asked.pop("print_config", None) is not None
    values = {} if base is None else flatten(base)
    if "config" in asked:
        values |= read_settings(*_read_file(asked.pop("config"), folder), schema)
    values |= {key: read(key, text, schema=schema) for key, text in asked.items()}
    config = build(values, schema)
    check(config)
    if printing:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def presets(below: str = "") -> dict[str, Path]:
    """Return the shipped presets by name, in alphabetic order: those of pretraining, or of a folder `below` theirs."""
    package = Path(__file__).parents[1]
    # An installed package has them as the data of ccmim_fast.configs; in a checkout they lie beside ccmim_fast/.
    folder = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
    return {path.stem: path for path in sorted((folder / below).glob("*.yaml"))}


def to_yaml(config: Any) -> str:
    """Return every setting of `config` as YAML; loading it gives an equal configuration.

    But for passwords, keys and tokens of URLs, which no file of a run holds: a command needs them anew.
    """
    options = {"sort_keys": False, "default_flow_style": False, "allow_unicode": True, "width": math.inf}
    return without_secrets(yaml.dump(asdict(config), Dumper=_Dumper, **options))


def from_yaml(text: str, name: str, schema: type = Config, check: Callable[[Any], None] = validate) -> Any:
    """Return the configuration that `text` holds, such as a checkpoint's; `name` says in messages where it stands."""
    values = read_settings(text, f" in {name}", schema)
    if "model.arch" in values:
        # Runs of earlier versions may have a tag of timm's there, which changed nothing.
        values["model.arch"] = values["model.arch"].partition(".")[0]
    config = build(values, schema)
    check(config)
    return config


def difference(a: Any, b: Any) -> list[tuple[str, Any, Any]]:
    """Return (key, its value in `a`, its value in `b`) for each setting in which they differ, in the schema's order."""
    return [(key, old, new) for (key, old), new in zip(flatten(a).items(), flatten(b).values()) if old != new]


def _read_file(name: str, folder: str) -> tuple[bytes, str]:
    """Return the content of the file or preset that `--config name` means, and its name for messages."""
    path, known = Path(name), presets(folder)
    if os.sep not in name and path.suffix not in (".yaml", ".yml"):
        if name not in known:
            raise ConfigError(f"--config={show(name)}: no such preset; nearest is {nearest(name, known)}")
        path = known[name]
        name = path.name
    try:
        if not path.is_dir() and path.exists() and not path.is_file():
            raise ValueError("is no file")  # a pipe or a device, of which nobody knows if it ends
        with open(path, "rb") as file:
            content = file.read(_LONGEST + 1)
        if len(content) > _LONGEST:
            raise ValueError(f"is longer than {_LONGEST:,} bytes")
        return content, f" in {name if name.isprintable() else show(name)}"
    except (OSError, ValueError) as error:  # ValueError also: a NUL character in the path
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--config={show(name)}: {reason}; nearest preset is {nearest(path.stem, known)}") from None
