"""Reads the settings of a YAML document: their types are the schema's matter, not YAML's."""

from collections.abc import Iterator
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from ccmim_fast.config.keys import REMOVED, RENAMED, sections, settings, show, unknown_key
from ccmim_fast.config.schema import Config
from ccmim_fast.config.values import read
from ccmim_fast.errors import ConfigError


class _TextLoader(yaml.BaseLoader):
    """This loader leaves scalars text (`1e-4`, a string in YAML 1.1, and `no` alike). A repeated key is an error."""

    def construct_mapping(self, node, deep=False):
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            names = [key.value for key, _ in node.value]
            twice = next(name for name in names if names.count(name) > 1)
            raise ConstructorError(problem=f"{show(twice)} is given twice", problem_mark=node.start_mark)
        return mapping


def read_settings(content: bytes | str, source: str, schema: type = Config) -> dict[str, Any]:
    """Return the settings that a YAML document holds, by their dotted keys.

    The document is a mapping of sections to mappings of settings; dotted keys work too, and nothing is no settings. In
    messages it is named by `source`: " in demo.yaml". Raises ConfigError, one line: no valid YAML, a key that the
    schema lacks or that comes twice, or a wrong value.
    """
    try:
        document = yaml.load(content, _TextLoader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"not valid YAML{source}{line}: {' '.join(reason.split())}") from None
    given: dict[str, Any] = {}
    for key, value in _leaves(document, source, schema):
        if key in REMOVED and REMOVED[key][0] in (None, value):
            continue
        key = RENAMED.get(key, key)
        if key not in settings(schema):
            raise unknown_key(key, settings(schema), source=source, schema=schema)
        if key in given:
            raise ConfigError(f"{key}: is given twice{source}")
        # A deeper value is not shown: aliases make small files that are endless when printed.
        if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            raise ConfigError(f"{key}: nested value{source}; write one such as {show(settings(schema)[key].default)}")
        given[key] = read(key, value, source, schema)
    return given


def _leaves(document: Any, source: str, schema: type) -> Iterator[tuple[str, Any]]:
    """Yield the settings of a document and their values, down to the schema's two levels."""
    if not isinstance(document or {}, dict):
        raise ConfigError(f"no settings{source}: write lines such as `seed: 0`")
    known = {*sections(schema), *(key.partition(".")[0] for key in REMOVED)}
    for name, value in (document or {}).items():
        if name in known and isinstance(value, dict):
            yield from ((f"{name}.{leaf}", item) for leaf, item in value.items())
        elif name not in known or value not in ("", "null", "~"):  # a section whose keys are commented out is fine
            yield name, value
