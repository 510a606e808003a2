"""The value of one setting: read from text in the setting's type, and held against its range."""

import re
from typing import Any, Literal, NoReturn, get_args, get_origin

from ccmim_fast.config.keys import Setting, flatten, nearest, settings, show
from ccmim_fast.config.schema import Config
from ccmim_fast.config.units import Scheduled
from ccmim_fast.errors import ConfigError

_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}  # YAML 1.1's words
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def read(key: str, raw: str | list[str], source: str = "", schema: type = Config) -> Any:
    """Return the value that `raw` writes, in the type of the setting `key`; `source` is its place: " in demo.yaml".

    Raises ConfigError where the text is none of that type; one line with the nearest valid value.
    """
    setting = settings(schema)[key]
    # A list that is empty where nobody asks for one may be null, or one value without brackets.
    bare = setting.default == () and isinstance(raw, str) and not raw.strip().startswith("[")
    try:
        return _parse(setting.kind, [word for word in [raw] if word not in ("", "null", "~")] if bare else raw)
    except (ValueError, KeyError):
        expected, near = _expected(setting, raw)
        raise ConfigError(f"{key}={show(raw)}{source}: expected {expected}; nearest valid is {show(near)}") from None


def _parse(kind: Any, raw: str | list[str]) -> Any:
    """Return the value of the type `kind` that `raw` writes; raises ValueError or KeyError where it writes none."""
    if kind == Scheduled:
        kind = tuple[float, float] if isinstance(raw, list) or raw.strip().startswith("[") else float
    if get_origin(kind) is tuple:
        item, *others = get_args(kind)
        if isinstance(raw, str):
            text = raw.strip()
            if not (text.startswith("[") and text.endswith("]")):
                raise ValueError(raw)
            raw = text[1:-1].split(",") if text[1:-1].strip() else []
        if others != [...] and len(raw) != 1 + len(others):
            raise ValueError(raw)
        return tuple(_parse(item, part) for part in raw)
    if isinstance(raw, list):
        raise ValueError(raw)
    if get_origin(kind) is Literal:
        return {choice: choice for choice in get_args(kind)}[raw]
    return _BOOLS[raw.lower()] if kind is bool else kind(raw)


def _expected(setting: Setting, raw: str | list[str]) -> tuple[str, Any]:
    """Return which values a setting takes, in words, and the one nearest to `raw`; else its default."""
    kind = setting.kind
    if get_origin(kind) is Literal:
        return f"one of {', '.join(setting.choices)}", nearest(str(raw), setting.choices)
    if kind == Scheduled:
        return "a number, or a list of 2 numbers", setting.default
    if get_origin(kind) is tuple:
        item, *others = get_args(kind)
        count = "" if others == [...] else f"{len(others) + 1} "
        return f"a list of {count}{_KINDS[item].removeprefix('a ')}s", setting.default
    try:
        return _KINDS[kind], round(float(raw)) if kind is int else setting.default
    except (ValueError, TypeError, OverflowError):
        return _KINDS[kind], setting.default


def refuse(key: str, value: Any, must: str, near: Any) -> NoReturn:
    """Raise the ConfigError for a value that the setting `key` cannot have."""
    raise ConfigError(f"{key}={show(value)}: must be {must}; nearest valid is {show(near)}")


def check_values(config: Any) -> None:
    """Refuse a number beyond its range, and text that no file name can hold."""
    known = settings(type(config))
    for key, value in flatten(config).items():
        within = known[key].unit.within
        if isinstance(value, str):
            # Halves of UTF-16 pairs, which YAML can write, but for those that stand for a file name's bytes.
            possible = re.sub("[\0\ud800-\udc7f\udd00-\udfff]", "", value)
            if value != possible:
                refuse(key, value, "text that a file name can hold", possible)
        elif within:
            numbers, defaults = ((x if isinstance(x, tuple) else (x,)) for x in (value, known[key].default))
            near = tuple(_clamp(n, within, defaults[i:] or defaults[-1:]) for i, n in enumerate(numbers))
            if near != numbers:
                refuse(key, value, f"in {within}", near if isinstance(value, tuple) else near[0])


def _clamp(number: float, within: str, defaults: tuple[float, ...]) -> float:
    """Return `number` if it is in the interval, else the end it is beyond; the default if that end is left out."""
    low, high = map(float, within[1:-1].split(", "))
    default = defaults[0] if defaults else (low + min(high, 1.0)) / 2
    if low < number < high or (number == low and within[0] == "[") or (number == high and within[-1] == "]"):
        return number
    if number <= low and within[0] == "[":
        return type(default)(low)
    return type(default)(high) if number >= high and within[-1] == "]" else default  # so for nan
