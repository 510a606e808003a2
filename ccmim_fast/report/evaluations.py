"""The report shows the evaluations in a run folder: rows of a table, deviations from protocols, pictures."""

import io
import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ccmim_fast.errors import DataError

from .runs import Remarks, RunView, flatten


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
        raise DataError(f"{path} is no evaluation: {type(error).__name__}: {error}") from error
    return Evaluation(path.parent.name, shown, protocol, list(map(str, deviations)), pictures)


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
