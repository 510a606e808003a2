"""The report reads run folders here, and the evaluations in them: whatever is missing is left out."""

import io
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from PIL import Image

from ccmim_fast.errors import DataError
from ccmim_fast.secrets import without_secrets

from .curves import read_metrics
from .pictures import Snapshot


class RunView(NamedTuple):
    """This tuple is a run folder under the name that the report shows."""

    name: str  # plain text
    folder: Path  # may hold config.yaml, environment.json, metrics.jsonl, eval/*/result.json and snapshots/epoch_*.npz

    def config(self) -> dict[str, str]:
        """Read the settings as text by dotted keys; {} where there are none. Raises DataError for a damaged file."""
        return _read(self.folder / "config.yaml", yaml.safe_load)

    def environment(self) -> dict[str, str]:
        """Read versions, device, commit and so on, as `config`."""
        return _read(self.folder / "environment.json", json.loads)

    def metrics(self, kind: str = "train") -> list[dict]:
        """Read the lines of one kind, see `read_metrics`."""
        return read_metrics(self.folder / "metrics.jsonl", kind)

    def snapshots(self) -> list[Snapshot]:
        """Read all snapshots by epoch. Raises DataError for a damaged one."""
        paths = (self.folder / "snapshots").glob("epoch_*.npz")
        return sorted(map(Snapshot.load, paths), key=lambda snapshot: snapshot.epoch)


class Remarks(list[str]):
    """These lines name the parts of run folders that cannot be read: a page tells of them, and shows the rest."""

    def read(self, read: Callable[[], Any], nothing: Any) -> Any:
        """Return what `read` returns; where the file is damaged, note that and return `nothing`."""
        try:
            return read()
        except DataError as error:
            self.append(shareable(str(error)))
            return nothing


class Comparison(NamedTuple):
    """This table has texts of several runs side by side."""

    names: list[str]  # headings of the columns of values
    rows: list[tuple[str, list[str]]]  # (key, one value a column); "" where a run lacks the key


def compare(names: Sequence[str], tables: Sequence[dict[str, str]]) -> Comparison:
    """Set dictionaries side by side, keys in the order they first appear. Runs with an empty one are left out."""
    kept = [(name, table) for name, table in zip(names, tables) if table]
    keys = dict.fromkeys(key for _, table in kept for key in table)
    rows = [(key, [table.get(key, "") for _, table in kept]) for key in keys]
    return Comparison([name for name, _ in kept], rows)


def differences(comparison: Comparison) -> Comparison:
    """Keep the rows in which the runs differ."""
    return comparison._replace(rows=[(key, values) for key, values in comparison.rows if len(set(values)) > 1])


def against(table: dict[str, str], name: str, comparison: Comparison) -> Comparison:
    """Put `table` first, as a column `name`; keep the rows of its keys in which another one differs."""
    rows = [(key, [table[key], *values]) for key, values in comparison.rows if key in table]
    return differences(Comparison([name, *comparison.names], rows))


def merge_equal(comparison: Comparison) -> Comparison:
    """Make one column, "every run", of runs that differ in nothing."""
    if len(comparison.names) < 2 or differences(comparison).rows:
        return comparison
    return Comparison(["every run"], [(key, values[:1]) for key, values in comparison.rows])


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Turn {"a": {"b": [1, 2]}} into {"a.b": "[1, 2]"}."""
    if not isinstance(value, dict):
        return {prefix: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)}
    flat = {}
    for key, inner in value.items():
        flat |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _read(path: Path, parse: Callable[[str], Any]) -> dict[str, str]:
    if not path.exists():
        return {}
    try:
        parsed = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise DataError(f"{path.parent.name}/{path.name} cannot be read: {error}") from error
    if not isinstance(parsed, dict):
        raise DataError(f"{path.parent.name}/{path.name} must hold a mapping, got {type(parsed).__name__}")
    return {key: shareable(text) for key, text in flatten(parsed).items()}


def shareable(text: str) -> str:
    """Return a text without passwords of URLs and without folders: of an absolute path the last name is left."""
    return _FOLDERS.sub(".../", without_secrets(text))


# Of an absolute path what stands before its last name. Names may hold spaces where the text is nothing but a path.
_FOLDERS = re.compile(r"^/(?:[^/\n]+/)*(?=[^/\n]*$)|(?<![\w/.*~:)-])~?/(?:[^/\s'\",:=\[\]]+/)*(?=[^/\s'\",:=\[\]])")


class Evaluation(NamedTuple):
    """This tuple is the content of a folder `RUN/eval/NAME`, as `ccmim eval` leaves it.

    Its result.json is a JSON object: `figures` by name; `deviations`, a list of sentences; `protocol` and `source`,
    what they deviate from; `chance`, a share or null; `step`, of the checkpoint, or null; `pictures`, a list of PNG
    files in the folder. Each but `figures` may be missing; other keys are ignored.
    """

    name: str  # of the folder
    figures: dict[str, str]  # each as text, by its name; chance and step among them
    protocol: str  # a sentence, or nothing
    deviations: list[str]
    pictures: dict[str, bytes]  # PNG, by the names of their files


def read_evaluations(run: RunView, remarks: Remarks) -> list[Evaluation]:
    """Read all evaluations of a run, by name; those under way are left out, `remarks` names those that are damaged."""
    paths = sorted((run.folder / "eval").glob("*/result.json"))
    return list(filter(None, (remarks.read(partial(read_evaluation, path), None) for path in paths)))


def read_evaluation(path: Path) -> Evaluation:
    """Read one result.json; raises DataError naming a file that is damaged or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        figures, deviations, names = content["figures"], content.get("deviations") or [], content.get("pictures") or []
        if not isinstance(figures, dict) or not isinstance(deviations, list) or not isinstance(names, list):
            raise TypeError("`figures` must be an object, `deviations` and `pictures` lists")
        beside = {key: content[key] for key in ("chance", "step") if content.get(key) is not None}
        shown = {key: _shown(text) for key, text in flatten(figures | beside).items()}
        protocol = ": ".join(str(content[key]) for key in ("protocol", "source") if content.get(key))
        pictures = {Path(name).name: _picture(path.with_name(Path(name).name)) for name in names}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path.parent.name}/{path.name} is no evaluation: {type(error).__name__}: {error}") from error
    told = [shareable(str(deviation)) for deviation in deviations]
    return Evaluation(path.parent.name, shown, shareable(protocol), told, pictures)


def _picture(path: Path) -> bytes:
    """Read a PNG file that decodes; raises OSError or ValueError for another one."""
    png = path.read_bytes()
    try:
        Image.open(io.BytesIO(png), formats=["PNG"]).load()
    except Exception as error:  # Pillow's plugins raise whatever a damaged file leads them to
        raise ValueError(f"{path.name}: {error}") from error
    return png


def _shown(text: str) -> str:
    """Return four digits of a number that has more; anything else as it is."""
    try:
        return f"{float(text):.4g}" if "." in text else text
    except ValueError:
        return text
