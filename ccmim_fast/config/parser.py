"""The one command-line parser: options of a command's own and settings of a schema, side by side.

argparse, because no library that was tried (jsonargparse, tyro, cyclopts) takes the spellings `--key=value`, `--key
value`, a bare `--key` for true and `[32, 64]` for a list, and none answers a mistake with one line.
"""

import argparse
import os
import re
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, get_args, get_origin

from ccmim_fast.config.keys import SHORT, sections, settings, show, unknown_key
from ccmim_fast.config.schema import Config
from ccmim_fast.errors import ConfigError


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """This formatter shows the default of an option that has one, and keeps settings out of the usage line."""

    def add_usage(self, usage: str | None, actions: Iterable[argparse.Action], groups: Any, prefix: Any = None) -> None:
        named = [action for action in actions if not isinstance(action, _Store) or action.dest == "config"]
        settings = argparse.Action([], "settings", nargs="*", metavar="--section.key=value")
        some = any(isinstance(action, _Store) for action in named)
        super().add_usage(usage, [*named, settings] if some else named, groups, prefix)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default is not False and action.default not in (None, "", [])
        return super()._get_help_string(action) if has_default else action.help


class _Store(argparse.Action):
    """This action keeps the text of a setting in `namespace.settings`, by its key; the last of several counts."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, text: Any, option: Any = None) -> None:
        if self.dest == "config" and "config" in namespace.settings:
            raise ConfigError(f"--config={show(text)}: is given twice; one file is the limit")
        namespace.settings = {**namespace.settings, self.dest: text if isinstance(text, str) else ""}


class Parser(argparse.ArgumentParser):
    """This parser answers a mistake with one line (a ConfigError), takes options in full only and shows defaults.

    Args:
        prog: the command as the user writes it, such as "ccmim ablate score".
        description: for `--help`; backquotes are left out.
        more: what argparse takes besides.
    """

    def __init__(self, prog: str, description: str = "", **more: Any) -> None:
        more = {"formatter_class": _Help, "allow_abbrev": False, **more}
        super().__init__(prog, description=description.replace("`", ""), **more)
        self._schema: type | None = None

    def add_settings(self, schema: type = Config, presets: Iterable[str] = ()) -> None:
        """Add `--config`, `--print_config` and every setting of `schema`; `parse_args(...).settings` has their text.

        Args:
            schema: the configuration's dataclass.
            presets: the names that `--config` takes, for the help.
        """
        self._schema = schema
        self.set_defaults(settings={})
        named = f"YAML file, or one of the presets {', '.join(presets)}"
        self._add(self, "config", [], named, metavar="PATH").completer = lambda **_: list(presets)
        self._add(self, "print_config", [], "print the resolved configuration and exit", nargs=0)
        groups = {name: self.add_argument_group(name) for name in sections(schema)}
        for key, setting in settings(schema).items():
            owner = groups.get(key.rpartition(".")[0], self)
            short = [name for name, long in SHORT.items() if long == key]
            how = {"nargs": "?", "const": "true"} if setting.kind is bool else {}
            choices = get_args(setting.kind) if get_origin(setting.kind) not in (None, tuple) else ()
            metavar = f"{{{','.join(choices)}}}" if choices else key.rpartition(".")[2].upper()
            text = f"{setting.help} (default: {show(setting.default)})"
            action = self._add(owner, key, short, text, metavar=metavar, **how)
            action.completer = lambda choices=choices, **_: choices

    @staticmethod
    def _add(owner: Any, key: str, short: list[str], help: str, **how: Any) -> argparse.Action:
        names = [f"--{name}" for name in (key, *short)]
        help = help.replace("%", "%%")
        return owner.add_argument(*names, action=_Store, dest=key, default=argparse.SUPPRESS, help=help, **how)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        """Read what is known, as argparse does; while the shell completes a line, print the completions and end."""
        if "_ARGCOMPLETE" in os.environ:
            import argcomplete  # not needed otherwise

            os.environ["_ARGCOMPLETE"] = str(len(self.prog.split()))  # words of the line that name the command
            argcomplete.autocomplete(self)
        return super().parse_known_args(args, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:
        """Read all options.

        Raises:
            ConfigError: one line; for an unknown option it names the nearest.
            SystemExit: 0, after printing what `--help` asks for.
        """
        given, rest = self.parse_known_args(args, namespace)
        if not rest:
            return given
        if not rest[0].startswith("--"):
            hint = "a setting is written --mask.ratio=0.75" if self._schema else f"see {self.prog} --help"
            raise ConfigError(f"{show(rest[0])}: unexpected argument; {hint}")
        options = [option[2:] for option in self._option_string_actions if option.startswith("--")]
        raise unknown_key(rest[0][2:].partition("=")[0], options, "--", schema=self._schema)

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
