"""A protocol says what an evaluation is, by whose figures; a run of it deviates from some of them."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from ccmim_fast.config.evaluation import EvalConfig, protocol_crop
from ccmim_fast.config.keys import flatten, show
from ccmim_fast.config.load import from_yaml, presets
from ccmim_fast.data.source import usable_count
from ccmim_fast.errors import ConfigError
from ccmim_fast.evaluation.encoders import width_and_patch
from ccmim_fast.evaluation.job import Job
from ccmim_fast.evaluation.length import OTHER_UNIT, in_force
from ccmim_fast.evaluation.registry import EVALUATIONS
from ccmim_fast.secrets import without_secrets

FOLDER = "eval"  # of the presets, below configs/
ENCODERS = {"ViT-B/16": (768, 16), "ViT-L/16": (1024, 16), "ViT-H/14": (1280, 14)}  # width, patch in pixels


class Protocol(NamedTuple):
    """A protocol is a preset."""

    name: str  # of the preset
    evaluation: str  # one of `EVALUATIONS`
    config: EvalConfig  # its figures
    source: str  # where they are from
    images: tuple[int, int, int] | None  # train, test and classes; None where the preset names none
    encoder: str  # one of `ENCODERS`, of which the figures are; empty: of any


def protocol(evaluation: str, preset: str = "") -> Protocol:
    """Return the protocol of a preset; empty: the evaluation's own. Raises ConfigError: another evaluation's preset."""
    name = preset or evaluation
    if name not in presets(FOLDER) or not name.startswith(evaluation):
        known = ", ".join(other for other in presets(FOLDER) if other.startswith(evaluation))
        raise ConfigError(f"--config={show(name)}: no preset of ccmim eval {evaluation}; one of {known}, or a file")
    text = presets(FOLDER)[name].read_text()
    head = dict(re.findall(r"^# (Source|Images|Encoder): (.*(?:\n#   .*)*)", text, re.MULTILINE))
    images = re.search(r"(\d+) to train on, (\d+) to test on, (\d+) classes", head.get("Images", ""))
    if "Source" not in head or ("Images" in head and images is None):
        needs = "# Source: ..., and # Images: SET, N to train on, N to test on, N classes"
        raise ConfigError(f"{presets(FOLDER)[name]}: its head must have comments {needs}")
    config = from_yaml(text, f"{name}.yaml", EvalConfig, lambda _: None)
    counts = tuple(map(int, images.groups())) if images else None
    return Protocol(name, evaluation, config, head["Source"].replace("\n#   ", " "), counts, head.get("Encoder", ""))


def deviations(of: Protocol, job: Job) -> list[str]:
    """Return every figure of the protocol that a run does not keep: `what: run's (protocol's)`."""
    asked, given = flatten(of.config), flatten(job.config)
    for figures in (asked, given):
        figures["data.test_crop"] = figures["data.test_crop"] or protocol_crop(job.config.data.image_size)
    asked, given = in_force(asked), in_force(given)
    kept, found = EVALUATIONS[of.evaluation].figures, []
    for key, value in given.items():
        # Of a length in another unit, that of the protocol's: `optim.warmup_epochs: 0.0 (optim.warmup_steps: 1500)`.
        theirs = key if key in asked else OTHER_UNIT[key]
        if key.startswith(kept) and (theirs != key or value != asked[key]):
            found.append(f"{key}: {show(value)} ({'' if theirs == key else f'{theirs}: '}{show(asked[theirs])})")
    here = (usable_count(job.train.source), usable_count(job.test.source), job.train.classes)
    if of.images is not None and here != of.images:
        words = "{} images to train on, {} to test on, {} classes"
        found.insert(0, f"images: {words.format(*here)} ({words.format(*of.images)})")
    if of.encoder and (sizes := width_and_patch(job.weights)) != ENCODERS[of.encoder]:
        found.insert(0, f"encoder: width {sizes[0]}, patch {sizes[1]} ({of.encoder})")
    return found


def write_result(folder: Path, result: dict[str, Any], of: Protocol) -> str:
    """Write result.json and result.md into the run's folder; returns what to print: one line and the box."""
    (folder / "result.json").write_text(without_secrets(json.dumps(result, indent=1)) + "\n")
    chance = {} if result["chance"] is None else {"chance": result["chance"]}
    shares = {name: f"{value:.2%}" for name, value in (result["figures"] | chance).items()}
    line = f"{of.evaluation} of {result['checkpoint']}: " + ", ".join(" ".join(share) for share in shares.items())
    listed = [f"- {deviation}" for deviation in result["deviations"]]
    heading = "Deviations (protocol's figure):" if listed else "Deviations: none."
    boxed = "\n".join(f"> {line}" for line in [f"Protocol {of.name}: {of.source}", heading, *listed])
    rows = "\n".join(f"| {name} | {share} |" for name, share in shares.items())
    where = result["environment"]
    text = f"# {of.evaluation} of {result['checkpoint']}\n\n| measure | share |\n|---|---|\n{rows}\n\n{boxed}\n\n"
    text += f"{result['images']}.{_left_out_words(result['left_out'])} "
    text += f"{where['device']}, torch {where['torch']}, commit {where['commit']}.\n"
    (folder / "result.md").write_text(without_secrets(text))
    return f"{line}\n{boxed}"


def _left_out_words(left_out: dict[str, dict[str, Any]]) -> str:
    told = [(part, why, said) for part, by_reason in left_out.items() for why, said in by_reason.items()]
    return "".join(
        f" Left out: {said['images']} of {said['of']} images to {part} on {why}." for part, why, said in told
    )
