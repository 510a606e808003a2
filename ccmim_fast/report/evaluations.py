"""Evaluations that lie in a run folder, as rows of a table."""

import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ccmim_fast.errors import DataError

from .runs import RunView, flatten, read_part


class Evaluation(NamedTuple):
    """One file `RUN/eval/*.json`.

    The file is a JSON object with the keys `name` (text), `metrics` (an object of figures) and `deviations` (a list of
    sentences: in what this evaluation differs from the published protocol). Other keys are not looked at. Without a
    name the file's counts.

    Attributes:
        metrics: each as text, by its name.
    """

    name: str
    metrics: dict[str, str]
    deviations: list[str]


def read_evaluations(run: RunView) -> tuple[list[Evaluation], list[str]]:
    """All evaluations of a run by the names of their files, and a line for each file that is none."""
    parts = [read_part(partial(read_evaluation, path), None) for path in sorted((run.folder / "eval").glob("*.json"))]
    return [part.content for part in parts if part.content], [part.remark for part in parts if part.remark]


def read_evaluation(path: Path) -> Evaluation:
    """Raises DataError naming a file that is damaged or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        metrics, deviations = content["metrics"], content.get("deviations") or []
        if not isinstance(metrics, dict) or not isinstance(deviations, list):
            raise TypeError("`metrics` must be an object and `deviations` a list")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is no evaluation: {type(error).__name__}: {error}") from error
    figures = {key: _shown(text) for key, text in flatten(metrics).items()}
    return Evaluation(str(content.get("name") or path.stem), figures, list(map(str, deviations)))


def _shown(text: str) -> str:
    """Four digits of a number that has more; anything else as it is."""
    try:
        return f"{float(text):.4g}" if "." in text else text
    except ValueError:
        return text
