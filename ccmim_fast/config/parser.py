"""The one command-line parser: options of a command's own and settings of a schema, side by side.

argparse, because no library that was tried (jsonargparse, tyro, cyclopts) takes the spellings `--key=value`, `--key
value`, a bare `--key` for true and `[32, 64]` for a list, and none answers a mistake with one line.
"""

import argparse
import os
import re
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from ccmim_fast.config.keys import SHORT, sections, settings, show, unknown_key
from ccmim_fast.config.schema import Config
from ccmim_fast.errors import ConfigError


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """This formatter shows the default of an option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default is not False and action.default not in (None, "", [])
        return super()._get_help_string(action) if has_default else action.help


class _Store(argparse.Action):
    """This action keeps the text of a setting in `given.settings`, by its key; the last of several counts."""

    def __call__(self, parser: argparse.ArgumentParser, given: Any, text: Any, option: Any = None) -> None:
        if self.dest == "config" and "config" in given.settings:
            raise ConfigError(f"--config={show(text)}: is given twice; one file is the limit")
        given.settings = {**given.settings, self.dest: text if isinstance(text, str) else ""}


class Parser(argparse.ArgumentParser):
    """This parser answers a mistake with one line (a ConfigError), takes options in full only and shows defaults.

    `prog` is the command as the user writes it, such as "ccmim ablate score"; `more` is what argparse takes besides.
    """

    def __init__(self, prog: str, description: str = "", **more: Any) -> None:
        more = {"formatter_class": _Help, "allow_abbrev": False, **more}
        super().__init__(prog, description=description.replace("`", ""), **more)
        self._schema: type | None = None

    def add_settings(self, schema: type = Config, presets: Iterable[str] = ()) -> None:
        """Add `--config` (of `presets`), `--print_config` and all of `schema`: `settings` then has their text."""
        self._schema = schema
        positional = self._get_positional_actions()
        places = [f"[{one.metavar}]" if one.nargs == "?" else one.metavar for one in positional]
        self.usage = " ".join([self.prog, *places, "[options] [--config PRESET_OR_FILE] [--section.key=value ...]"])
        self.set_defaults(settings={})
        hidden = {"action": _Store, "default": argparse.SUPPRESS}
        named = f"YAML file, or one of the presets {', '.join(presets)}"
        self.add_argument("--config", help=named, metavar="PATH", **hidden).completer = lambda **_: list(presets)
        self.add_argument("--print_config", help="print the resolved configuration and exit", nargs=0, **hidden)
        groups = {name: self.add_argument_group(name) for name in sections(schema)}
        for key, setting in settings(schema).items():
            names = [f"--{name}" for name in (key, *(short for short, long in SHORT.items() if long == key))]
            bare = {"nargs": "?", "const": "true"} if setting.kind is bool else {}
            metavar = f"{{{','.join(setting.choices)}}}" if setting.choices else key.rpartition(".")[2].upper()
            facts = (" ".join(setting.unit).strip(), f"default: {show(setting.default)}", setting.source)
            text = f"{setting.help} [{'; '.join(filter(None, facts))}]".replace("%", "%%")
            owner = groups.get(key.rpartition(".")[0], self)
            action = owner.add_argument(*names, dest=key, help=text, metavar=metavar, **bare, **hidden)
            action.completer = lambda choices=setting.choices, **_: choices

    def add_how(self) -> None:
        """Add the options of a command that shows images to a model."""
        self.add_argument("--batch", type=whole_number(1), default=64, help="images at a time")
        self.add_argument("--workers", type=whole_number(0), default=0, help="decoding threads; 0: one per core")
        devices, precisions = ["auto", "cpu", "cuda"], ["fp32", "bf16", "fp16", "auto"]
        self.add_argument("--device", choices=devices, default="auto", help="auto: a GPU if there is one")
        self.add_argument("--precision", choices=precisions, default="fp32", help="of the model")

    def parse_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:
        """Read all options; while the shell completes a line, print the completions and end instead, as `--help` does.

        Raises ConfigError, one line; for an unknown option it names the nearest.
        """
        if "_ARGCOMPLETE" in os.environ:
            import argcomplete  # not needed otherwise

            os.environ["_ARGCOMPLETE"] = str(len(self.prog.split()))  # words of the line that name the command
            # Not in `parse_known_args`, which argcomplete calls itself.
            argcomplete.autocomplete(self)
        given, rest = self.parse_known_args(args, namespace)
        if rest and not rest[0].startswith("--"):
            hint = "a setting is written --mask.ratio=0.75" if self._schema else f"see {self.prog} --help"
            raise ConfigError(f"{show(rest[0])}: unexpected argument; {hint}")
        if rest:
            options = [option[2:] for option in self._option_string_actions if option.startswith("--")]
            raise unknown_key(rest[0][2:].partition("=")[0], options, "--", schema=self._schema)
        return given

    def error(self, message: str) -> NoReturn:
        """Raise the ConfigError for a mistake that argparse found."""
        name, _, reason = message.removeprefix("argument ").partition(": ")
        if reason == "expected one argument":
            message = f"{name}: its value is missing; write {name.rpartition('/')[2]}=VALUE"
        raise ConfigError(f"{self.prog}: {message:.300}")


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return a function that reads a whole number in `least..most`, for `add_argument(type=...)`."""
    limits = f"from {least} on" if most is None else f"in {least}..{most}"

    def read(text: str) -> int:
        if re.fullmatch(r"-?[0-9]{1,18}", text) and least <= int(text) <= (int(text) if most is None else most):
            return int(text)
        raise argparse.ArgumentTypeError(f"{text!r:.40} must be a whole number {limits}")

    return read


def words(given: dict[str, str]) -> list[str]:
    """Return settings as they stand on a command line, for a command that hands them on."""
    return [f"--{key}" if key == "print_config" else f"--{key}={text}" for key, text in given.items()]
