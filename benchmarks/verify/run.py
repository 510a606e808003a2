"""Verify the GPU path on this machine's GPU, and write one report: `make verify-gpu`, 25 minutes.

    ccmim bench verify [--minutes 25] [--only STAGE ...] [--folder runs/verify-gpu] [--dry-run]

Each stage of `stages.py` is a command in a process of its own. What a stage printed and how it ended is kept in the
folder, so a run that was stopped, or whose minutes are over, goes on where it was when it is called again; stages of
another commit or GPU are done anew. The report is benchmarks/results/verify-<date>-<device>.md: it holds the device,
versions, commit and what was printed, and no name of the machine, of a user or a folder.
Exit status 1: a stage failed; 3: stages are left, so call it again.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from record import Outcome, facts, load, save, write_report
from stages import CANNOT, STAGES, Stage

ROOT = Path(__file__).resolve().parents[2]
LEFT = 3  # exit status where the minutes are over


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("ccmim bench verify", description=__doc__.split("\n")[0])
    # One line for a mistake, as everywhere in `ccmim`.
    parser.error = lambda message: parser.exit(2, f"ccmim: {parser.prog}: {message}\n")
    names = [stage.name for stage in STAGES]
    parser.add_argument("--minutes", type=float, default=25.0, help="of this call; the next goes on")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STAGE", help=", ".join(names))
    parser.add_argument("--folder", type=Path, default=Path("runs/verify-gpu"), help="of what each stage printed")
    parser.add_argument("--device", choices=["cuda"], default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="path of the report, without a suffix")
    parser.add_argument(
        "--dry-run", action="store_true", help="small, and no figure is held: for a machine without GPU"
    )
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; `ccmim doctor` says why")
    return options


def missing(stage: Stage) -> str:
    """Return why a stage cannot run here, or nothing."""
    if not stage.needs or shutil.which(stage.needs):
        return ""
    package = stage.needs.partition(".")[0]
    if "." in stage.needs and importlib.util.find_spec(package) and importlib.util.find_spec(stage.needs):
        return ""
    return f"{stage.needs} is not installed"


def run_stage(stage: Stage, folder: Path, seconds: float, dry: bool) -> Outcome:
    """Run one stage, at most `seconds` long; what it prints goes to a file in `folder`."""
    if why := "" if dry else missing(stage):
        return Outcome(stage.name, "not run", why, 0.0)
    command = (stage.dry if dry and stage.dry is not None else stage.command) or ()
    command = [word.format(out=folder / stage.name) if "{out}" in word else word for word in command]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **dict(stage.environment)}
    start = time.monotonic()
    with (folder / f"{stage.name}.txt").open("w") as printed:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            stop(process)
            return Outcome(stage.name, "too slow", f"stopped after {seconds:.0f} s", time.monotonic() - start)
        except BaseException:
            stop(process)
            raise
    ended = {0: "passed", CANNOT: "not run"}.get(code, "FAILED")
    return Outcome(stage.name, ended, "" if ended == "passed" else f"exit status {code}", time.monotonic() - start)


def stop(process: subprocess.Popen) -> None:
    """End a stage and what it started."""
    os.killpg(process.pid, 9)
    process.wait()


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    options.folder = options.folder.resolve()
    options.folder.mkdir(parents=True, exist_ok=True)
    here = facts(options.dry_run)
    done = load(options.folder, here)
    asked = [stage for stage in STAGES if stage.name in options.only]
    end, started = time.monotonic() + 60 * options.minutes, 0
    for stage in asked:
        # The first one of a call always fits: every call brings the report further.
        if stage.name in done or (started and time.monotonic() + 60 * stage.limit > end):
            continue
        started += 1
        print(f"{stage.name}: {stage.question}", flush=True)
        done[stage.name] = outcome = run_stage(stage, options.folder, 60 * stage.limit, options.dry_run)
        print(f"    {outcome.ended} {outcome.why} ({outcome.seconds:.0f} s)", flush=True)
        save(options.folder, here, done)
    report = write_report(options, here, asked, done)
    print(f"\n{report}")
    if any(outcome.ended in ("FAILED", "too slow") for outcome in done.values()):
        return 1
    return 0 if all(stage.name in done for stage in asked) else LEFT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
