"""What a verification keeps of each stage, and the report that it becomes."""

import argparse
import datetime
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from stages import Stage

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import pages  # noqa: E402 (its folder is no package)

MOST_LINES = 60  # of what a stage printed: the last ones


class Outcome(NamedTuple):
    """How a stage ended: `passed`, `FAILED`, `too slow`, or `not run`, and then why."""

    name: str
    ended: str
    why: str
    seconds: float


def facts(dry: bool) -> dict[str, str]:
    """Return device, driver, versions and commit: what makes a stage worth doing anew when it changes."""
    from ccmim_fast.runs.folder import environment

    found = environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    del found["command"], found["system"]
    found["driver"] = _driver()
    return found | {"dry run": "yes"} if dry else found


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.split("\n")[0] or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def load(folder: Path, here: dict[str, str]) -> dict[str, Outcome]:
    """Return the outcomes that an earlier call left for the same commit and device; nothing where it left none."""
    try:
        kept = json.loads((folder / "outcomes.json").read_text())
    except (OSError, ValueError):
        return {}
    return {name: Outcome(*found) for name, found in kept["outcomes"].items()} if kept["facts"] == here else {}


def save(folder: Path, here: dict[str, str], done: dict[str, Outcome]) -> None:
    new = folder / "outcomes.new"
    new.write_text(json.dumps({"facts": here, "outcomes": done}, indent=1) + "\n")
    new.replace(folder / "outcomes.json")


def tidy(printed: str) -> str:
    """Return the last lines of what a stage printed, without colours, and without the paths of this machine."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", printed).replace("```", "'''")
    for path, name in ((sys.prefix, "<python>"), (str(ROOT), "."), (str(Path.home()), "~")):
        text = text.replace(path, name)
    return "\n".join(line.rstrip()[:200] for line in text.strip().splitlines()[-MOST_LINES:])


def write_report(
    options: argparse.Namespace, here: dict[str, str], asked: list[Stage], done: dict[str, Outcome]
) -> Path:
    """Write the page; it is written over at the next call of the same day on the same device."""
    today = datetime.date.today().isoformat()
    device = re.sub(r"[^a-z0-9]+", "-", here["device"].lower()).strip("-")
    out = options.out or pages.RESULTS / f"verify-{today}-{device}"
    if options.dry_run and options.out is None:
        out = options.folder / "report"
    rows = []
    for stage in asked:
        outcome = done.get(stage.name, Outcome(stage.name, "left", "the next call does it", 0.0))
        rows.append([stage.name, stage.question, f"{outcome.ended} {outcome.why}".strip(), f"{outcome.seconds:.0f}"])
    notes = "What the code did on this device. Each stage is a command of its own; its last lines are below."
    if options.dry_run:
        notes = "A dry run: every stage started, on a device that computes nothing. No figure here means anything."
    parts = [pages.table(rows, ["stage", "question", "answer", "seconds"])]
    for stage in asked:
        printed = options.folder / f"{stage.name}.txt"
        if stage.name in done and printed.exists():
            parts.append(f"## {stage.name}\n\n```\n{tidy(printed.read_text(errors='replace'))}\n```")
    path = out.with_name(out.name + ".md")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(pages.page("Verification on a GPU", {"environment": here}, notes, "\n\n".join(parts)))
    return path
