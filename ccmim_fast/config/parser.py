"""Options of a command's own, beside the settings of the schema."""

import argparse
import re
from collections.abc import Callable
from typing import NoReturn

from ccmim_fast.errors import ConfigError


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of an option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default is not False and action.default not in (None, "", [])
        return super()._get_help_string(action) if has_default else action.help


class Parser(argparse.ArgumentParser):
    """One line for a mistake, as everywhere in `ccmim`; an option is written in full, and its default is shown."""

    def __init__(self, prog: str, description: str, **more) -> None:
        more = {"formatter_class": _Help, "allow_abbrev": False, **more}
        super().__init__(prog, description=description.replace("`", ""), **more)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}")


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return a function that reads a whole number in `least..most`, for `add_argument(type=...)`."""
    limits = f"from {least} on" if most is None else f"in {least}..{most}"

    def read(text: str) -> int:
        if re.fullmatch(r"-?[0-9]{1,18}", text) and least <= int(text) <= (int(text) if most is None else most):
            return int(text)
        raise argparse.ArgumentTypeError(f"{text!r:.40} must be a whole number {limits}")

    return read
