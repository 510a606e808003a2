"""What a set of images leaves out: one notion, with the reason, the count and the first names, and its lines."""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ccmim_fast.errors import printable

LOST = "lost"  # may have been meant as samples: counts towards data.max_bad
UNREAD = "unread"  # the same, could not be read at that moment: the next run looks at it again
MEANT = "meant"  # left out by a rule that the documentation states: it is told and does not count
OTHER = "other"  # no image by its ending, as READMEs are: `ccmim data index` tells
_PATHS = {LOST: 20, MEANT: 20, OTHER: 20, UNREAD: 1000}  # kept by name; of what was not read all are tried again
_LINES = 8  # that a run begins with
# How errors name a sample: `cannot decode 'a.jpg': `, `'a.jpg' `.
_NAME = re.compile(r"""^(?:cannot (?:read|decode) )?(['"])(?:\\.|(?!\1).)*\1:? """)


class Note(NamedTuple):
    """A note says that `count` places, the first `paths` among them, give no sample, and why."""

    reason: str
    kind: str
    count: int
    paths: tuple[str, ...]
    container: str = ""  # the tar or table that they are members of, "" if they are in none


class Notes:
    """This class collects what is left out, by reason; `prefix` stands before each name that is added."""

    def __init__(self, prefix: str = "", container: str = ""):
        self._prefix, self._container, self._found = prefix, container, {}

    def add(self, name: str, reason: str, kind: str = LOST) -> None:
        """Note that a name is left out; "": the container itself."""
        note = self._found.get((reason, kind))
        if note is None:
            note = self._found[reason, kind] = [0, []]
        note[0] += 1
        if len(note[1]) < _PATHS[kind]:
            note[1].append(self._prefix + name if name else self._container or self._prefix)

    def __iter__(self) -> Iterator[Note]:
        for (reason, kind), (count, paths) in self._found.items():
            yield Note(reason, kind, count, tuple(paths), self._container)


def merged(notes: Iterable[Note]) -> list[Note]:
    """Return the notes with those of one reason added up, what may be a loss first and the most frequent of it."""
    found: dict[tuple[str, str], Note] = {}
    for note in notes:
        before = found.get((note.reason, note.kind), note._replace(count=0, paths=()))
        paths = (*before.paths, *note.paths)[: _PATHS[note.kind]]
        found[note.reason, note.kind] = before._replace(count=before.count + note.count, paths=paths)
    return sorted(found.values(), key=lambda note: (note.kind in (MEANT, OTHER), note.kind == OTHER, -note.count))


def lost(notes: Iterable[Note]) -> int:
    """Count what counts towards `data.max_bad`."""
    return sum(note.count for note in notes if note.kind in (LOST, UNREAD))


def told(source: object, samples: bool = True) -> list[Note]:
    """Return what a run is told of: the notes of a source's index and, with `samples`, those it cannot use, by kind."""
    notes, index = Notes(), getattr(source, "index", None)
    if samples and index is None:
        for sample in source.excluded_X.tolist():
            notes.add(source.name(sample), "of no use here")
    elif samples:
        for sample in index.excluded_X.tolist():
            notes.add(source.name(sample), kind_of(index.reason(sample)))
    return [note for note in merged([*(() if index is None else index.notes), *notes]) if note.kind != OTHER]


def left_out_lines(source: object, samples: bool = True) -> list[str]:
    """Return the lines that tell what a source of images leaves out: one for each reason, the largest first.

    `pretrain`, `embed`, `eval` and the commands of `ccmim data` print them first. Nothing left out: no line. For
    `samples` see `told`.
    """
    return note_lines(told(source, samples))


def note_lines(notes: list[Note]) -> list[str]:
    """Return a line for each of the first notes, with the name of the first place, and one for those behind them."""
    lines = [
        f"{note.count:,} {'not taken' if note.kind == MEANT else 'left out'}: "
        f"{printable(note.reason)}; the first {note.paths[0]!r}"
        for note in notes[:_LINES]
    ]
    more = notes[_LINES:]
    if more:
        lines.append(f"{sum(note.count for note in more):,} more for {len(more)} other reasons: see ccmim data index")
    return lines


def without_name(reason: str) -> str:
    """Return a reason without the sample's name before it."""
    return _NAME.sub("", reason)


def kind_of(reason: str) -> str:
    """Return a reason without what differs from sample to sample: without the name, and with N for every number."""
    return re.sub(r"\d+(?:[.,]\d+)*", "N", without_name(reason))
