"""A schema as one flat table: every setting by its dotted key, such as `mask.ratio`. `Config` is pretraining's."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from functools import cache
from operator import attrgetter
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from ccmim_fast.config.schema import Config
from ccmim_fast.config.units import Unit
from ccmim_fast.errors import ConfigError

# Spellings of the command line alone.
SHORT = {"resume": "run.resume", "overwrite": "run.overwrite", "allow-change": "run.allow_change"}

_SAVINGS = ("fold_input", "visible_gradient", "fold_score", "masked_no_grad", "cls_only", "masked_only", "row_ops")
# Settings of earlier versions: the value that files and checkpoints may still hold (None: any), and why each is gone.
REMOVED = {f"fast.{name}": (None, "this work is always saved") for name in (*_SAVINGS, "onednn_linear")} | {
    "target.hog_bins": ("9", "HOG has 9 orientations, as in MaskFeat"),
    "optim.trust": ("0.001", "LARS has MAE's coefficient, 0.001"),
}
RENAMED = {"train.timeout": "watch.timeout"}  # likewise, of evaluations


class Setting(NamedTuple):
    """One leaf of a schema; `help`, `source` and `on_resume` are what `setting.setting` was given."""

    kind: Any  # int, float, bool, str, a Literal or a tuple
    default: Any
    unit: Unit  # of a number, of each one in a tuple, or of text; empty for others
    choices: tuple[str, ...]  # the values of a Literal, or true and false
    help: str
    source: str
    on_resume: str


@cache
def sections(schema: type = Config) -> dict[str, type]:
    """Return the sections of a schema (`mask`, `train`, ...) and their dataclasses, in the schema's order."""
    kinds = get_type_hints(schema)
    return {item.name: kinds[item.name] for item in fields(schema) if is_dataclass(kinds[item.name])}


@cache
def settings(schema: type = Config) -> dict[str, Setting]:
    """Return every setting by its dotted key, in the schema's order."""
    table = {}
    for item in fields(schema):
        owner = sections(schema).get(item.name)
        kinds, with_units = (get_type_hints(owner or schema, include_extras=extras) for extras in (False, True))
        for leaf in fields(owner) if owner else [item]:
            kind, annotated = kinds[leaf.name], with_units[leaf.name]
            if get_origin(kind) is tuple:
                annotated = get_args(annotated)[0]
            unit = getattr(annotated, "__metadata__", [Unit("")])[0]
            choices = get_args(kind) if get_origin(kind) is Literal else ("true", "false") if kind is bool else ()
            about = {**leaf.metadata, "on_resume": leaf.metadata["on_resume"] or item.metadata["on_resume"] or "asked"}
            key = f"{item.name}.{leaf.name}" if owner else item.name
            table[key] = Setting(kind, leaf.default, unit, choices, **about)
    return table


def flatten(config: Any) -> dict[str, Any]:
    """Return the value of every setting of `config`, by its dotted key."""
    return {key: attrgetter(key)(config) for key in settings(type(config))}


def build(values: dict[str, Any], schema: type = Config) -> Any:
    """Invert `flatten`. Keys that are missing keep their defaults; an unknown one is a TypeError."""
    parts: dict[str, dict[str, Any]] = {"": {}, **{name: {} for name in sections(schema)}}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        parts[section][name] = value
    return schema(**parts.pop(""), **{name: sections(schema)[name](**part) for name, part in parts.items()})


def nearest(word: str, words: Iterable[str]) -> str:
    """Return the one of `words` (not empty) that looks most like `word`."""
    word = word[:80]  # no name of ours is as long, and the time that it takes grows with its square
    return max(words, key=lambda candidate: difflib.SequenceMatcher(None, word, candidate).ratio())


def show(value: Any) -> str:
    """Return `value` as a user writes it, in at most 80 characters: quoted where it needs it, tuples as [a, b]."""
    text = f"[{', '.join(map(str, value))}]" if isinstance(value, (tuple, list)) else str(value)
    if isinstance(value, bool):
        text = text.lower()
    if (isinstance(value, str) and re.search(r"^$|[\s'\"]", text)) or not text.isprintable():
        text = repr(text)
    return text if len(text) <= 80 else f"{text[:77]}..."


def unknown_key(
    key: str, known: Iterable[str], prefix: str = "", source: str = "", schema: type | None = Config
) -> ConfigError:
    """Return the error for a key that is none of `known`: it names the nearest that is, or what a section holds.

    The user gave `prefix + key` (the prefix is "--" on a command line) in the place `source`, such as " in demo.yaml".
    """
    if key in REMOVED:
        return ConfigError(f"{prefix}{key}: this setting was removed ({REMOVED[key][1]}); leave it out")
    name = prefix + key if key.isprintable() and len(key) <= 80 else show(key)
    if schema is not None and key in sections(schema):
        leaves = ", ".join(known for known in settings(schema) if known.startswith(f"{key}."))
        return ConfigError(f"{name}: is a section{source}; its keys are {leaves}")
    return ConfigError(f"{name}: unknown key{source}; did you mean {prefix}{nearest(key, known)}?")
