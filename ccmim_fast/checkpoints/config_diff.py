"""The differences between the configuration of a checkpoint and that of the run that goes on with it (fault 14)."""

from typing import Any, NamedTuple

from ccmim_fast.config.keys import settings, show
from ccmim_fast.config.load import difference


class Change(NamedTuple):
    """A setting has another value than before."""

    key: str
    before: object
    now: object
    kind: str  # what a resume allows, `on_resume` of the setting


_WORDS = {"free": "", "shape": "another model", "asked": "needs --allow-change"}


def changes(before: Any, now: Any) -> list[Change]:
    """Return the settings in which two configurations differ, in the schema's order."""
    known = settings(type(now))
    return [Change(key, old, new, known[key].on_resume) for key, old, new in difference(before, now)]


def table(found: list[Change]) -> list[str]:
    """Return the changes, one a line under a head, but for those of the section `run`. None: no line."""
    rows = [(c.key, show(c.before), show(c.now), _WORDS[c.kind]) for c in found if not c.key.startswith("run.")]
    if not rows:
        return []
    rows.insert(0, ("changed since the checkpoint", "then", "now", ""))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
