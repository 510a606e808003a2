"""This module describes a setting in one place: the field of its dataclass.

    epochs: u.Epochs = setting(800, "passes over the images", "paper, Table 1")

The field's type says unit and range (`units.py`), `setting` the rest. Loading, validation, `--help`, docs/settings.md
and the rules of a resume read it from there.
"""

from collections.abc import Mapping
from dataclasses import MISSING, field
from typing import Any


def setting(default: Any, help: str, source: str, on_resume: str = "") -> Any:
    """Return the field of a setting.

    Args:
        default: its value where nobody asks for another.
        help: for people; the first word names a thing, and a value such as 0 that means something else is explained.
        source: where the default is from; "ours" for a choice of this project.
        on_resume: for a run that goes on with another value: `free` (no result depends on it, but for rounding),
            `asked` (it is another run: `--allow-change`) or `shape` (it is another model or optimizer, whether or not
            the weights of the checkpoint would fit: refused). Empty: as the section says (`section`), else `asked`.
    """
    return field(default=default, metadata={"help": help, "source": source, "on_resume": on_resume})


def like(owner: type, name: str, default: Any = MISSING, source: str = "") -> Any:
    """Return the field of a setting that is described in the section `owner`, with another default if one is given."""
    known = owner.__dataclass_fields__[name]
    metadata = {**known.metadata, "source": source or known.metadata["source"]}
    return field(default=known.default if default is MISSING else default, metadata=metadata)


def section(kind: type, on_resume: str = "") -> Any:
    """Return the field of a section of settings, with what a resume allows where a setting does not say."""
    return field(default_factory=kind, metadata={"on_resume": on_resume})


def labels(registry: Mapping[str, Any]) -> str:
    """Return the names of a registry with their labels, for a help text: "first (first block), all (all blocks)"."""
    return ", ".join(f"{name} ({row.label})" for name, row in registry.items())
