"""A schema as one flat table: every setting by its dotted key, such as `mask.ratio`. `Config` is pretraining's."""

import difflib
import inspect
import re
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, NamedTuple, get_type_hints

from ccmim_fast.config.schema import Config
from ccmim_fast.errors import ConfigError

# Spellings of the command line alone.
SHORT = {"resume": "run.resume", "overwrite": "run.overwrite", "allow-change": "run.allow_change"}

# Settings of earlier versions: files and checkpoints may still hold them, with any value, and they count for nothing.
_ALWAYS = "the trainer always saves this work; the switch was removed, leave it out"
_SAVINGS = ("fold_input", "visible_gradient", "fold_score", "masked_no_grad", "cls_only", "masked_only", "row_ops")
REMOVED = {f"fast.{name}": _ALWAYS for name in (*_SAVINGS, "onednn_linear")}


class Setting(NamedTuple):
    """One leaf of the schema.

    Attributes:
        kind: its type: int, float, bool, str, a Literal or a tuple.
        default: its default.
        help: its unit and source: the comment behind the field.
    """

    kind: Any
    default: Any
    help: str


@cache
def sections(schema: type = Config) -> dict[str, type]:
    """The sections of a schema (`mask`, `train`, ...) and their dataclasses, in the schema's order."""
    kinds = get_type_hints(schema)
    return {item.name: kinds[item.name] for item in fields(schema) if is_dataclass(kinds[item.name])}


@cache
def settings(schema: type = Config) -> dict[str, Setting]:
    """Every setting by its dotted key, in the schema's order."""
    default = flatten(schema())
    table = {}
    for prefix, owner in [("", schema), *((f"{name}.", owner) for name, owner in sections(schema).items())]:
        comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(owner), re.MULTILINE))
        for name, kind in get_type_hints(owner).items():
            if prefix + name in default:
                table[prefix + name] = Setting(kind, default[prefix + name], comments.get(name, ""))
    return table


def flatten(config: Config) -> dict[str, Any]:
    """The value of every setting of `config`, by its dotted key."""
    flat = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if item.name in sections(type(config)):
            flat |= {f"{item.name}.{leaf.name}": getattr(value, leaf.name) for leaf in fields(value)}
        else:
            flat[item.name] = value
    return flat


def build(values: dict[str, Any], schema: type = Config) -> Any:
    """The inverse of `flatten`. Keys that are missing keep their defaults; an unknown one is a TypeError."""
    parts: dict[str, dict[str, Any]] = {"": {}, **{name: {} for name in sections(schema)}}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        parts[section][name] = value
    return schema(**parts.pop(""), **{name: sections(schema)[name](**part) for name, part in parts.items()})


def nearest(word: str, words: Iterable[str]) -> str:
    """The one of `words` (not empty) that looks most like `word`."""
    word = word[:80]  # no name of ours is as long, and the time that it takes grows with its square
    return max(words, key=lambda candidate: difflib.SequenceMatcher(None, word, candidate).ratio())


def show(value: Any) -> str:
    """`value` as a user writes it, on one line of at most 80 characters: quoted where it needs it, tuples as [a, b]."""
    if isinstance(value, (tuple, list)):
        text = f"[{', '.join(map(str, value))}]"
    elif isinstance(value, bool):
        text = str(value).lower()
    else:
        text = str(value)
    if (isinstance(value, str) and re.search(r"^$|[\s'\"]", text)) or not text.isprintable():
        text = repr(text)
    return text if len(text) <= 80 else f"{text[:77]}..."


def unknown_key(
    key: str, known: Iterable[str], prefix: str = "", source: str = "", schema: type | None = Config
) -> ConfigError:
    """Return the error for a key that is none of `known`: it names the nearest that is, or what a section holds.

    Args:
        key: the dotted key as the user gave it, less `prefix`.
        prefix: the characters before a key where it was given: "--" on a command line.
        source: that place, for the message: " in demo.yaml".
    """
    if key in REMOVED:
        return ConfigError(f"{prefix}{key}: {REMOVED[key]}")
    name = prefix + key if key.isprintable() and len(key) <= 80 else show(key)
    if schema is not None and key in sections(schema):
        leaves = ", ".join(known for known in settings(schema) if known.startswith(f"{key}."))
        return ConfigError(f"{name}: is a section{source}; its keys are {leaves}")
    return ConfigError(f"{name}: unknown key{source}; did you mean {prefix}{nearest(key, known)}?")
