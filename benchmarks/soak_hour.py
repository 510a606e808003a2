"""This benchmark runs the demo's job for an hour with random faults: it must end complete, and nothing may leak.

    ccmim bench soak --minutes 60 [--seed 0] [--kinds kill,nan,...] [--work DIR] [settings]

Two ranks under torchrun on this CPU carry out the demo's pretraining of ccMIM on 1,280 image files in steps of 32, with
a checkpoint each epoch. In the first 40 % of each third all kinds of faults are drawn, in the rest only those that end
no process, so that some processes live long. When the time is over, the run is asked to end with one more epoch. The
run's folder is on a small disk of its own, which is filled now and then; mounting it needs root, or
`unshare -rm ccmim bench soak ...`.
"""

import json
import random
import shutil
import statistics
import tempfile
import time
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import pages
from PIL import Image
from soak_faults import FAULTS, SIGNS, inject, small_disk
from soak_job import PATIENCE, RANKS, EndedError, Job
from soak_samples import Sampler, lives, plot

from ccmim_fast.checkpoints import io
from ccmim_fast.config.load import load_config
from ccmim_fast.config.schema import Config
from ccmim_fast.data.made.shapes import ShapesSource
from ccmim_fast.errors import ConfigError, MachineError
from ccmim_fast.runs.state import read_state

THIRDS = 3
STORM = 0.4  # first part of each third, in which processes are ended, too
PAUSES = {True: 10.0, False: 25.0}  # seconds between two faults on average, in a storm and after it
DISK_MB = 256  # four checkpoints of 20 MB, captures, event files
EPOCHS_PER_MINUTE = 24  # twice what two cores do (configs/demo.yaml): the time ends the run, not its epochs
LIFE, WARM_UP = 240.0, 120.0  # seconds that a process must live to have a slope; the first of them are left out
GROWS = 20.0  # MB per hour that memory may rise by at most, three standard errors below its slope


def job_settings(given: list[str], work: Path, minutes: float) -> list[str]:
    """Return the settings of the job, without its folder."""
    return [
        # Short epochs: where faults come faster than checkpoints a run gets nowhere.
        *("--config=demo", "--data.samples=1280", "--data.max_bad=0.05", "--train.batch_size=32"),
        *(f"--train.epochs={max(2, round(minutes * EPOCHS_PER_MINUTE))}", *given),
        *("--data.source=images", f"--data.root={work / 'images'}", f"--data.index={work / 'index.arrow'}"),
        *("--data.loader=torch", "--data.workers=1", "--train.device=cpu", "--run.save_every=1", "--run.keep=3"),
        "--run.log_every=10",
    ]


def write_images(folder: Path, config: Config) -> None:
    """Write the demo's pictures as files, a folder for each class, PNG and JPEG in turn."""
    data = config.data
    source = ShapesSource(config.seed, data.samples, data.image_size, data.classes, data.background)
    for i in range(len(source)):
        path = folder / source.class_names[source.labels_N[i]] / f"{i:05d}.{('png', 'jpg')[i % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(source.decode(i)).save(path, quality=95)


def inject_faults(
    job: Job, kinds: list[str], minutes: float, draw: random.Random, start: float
) -> tuple[list[dict[str, Any]], str]:
    """Inject faults until the time is over or the job has ended; return their records, and the fault it failed at."""
    faults, began = [], time.monotonic()
    while (now := time.monotonic() - began) < 60 * minutes:
        storm = now / (60 * minutes) * THIRDS % 1 < STORM
        time.sleep(min(draw.expovariate(1 / PAUSES[storm]), 60 * minutes - now))
        at, kind = time.monotonic() - start, draw.choice(fitting(kinds, storm))
        try:
            faults.append({"at": round(at, 1)} | inject(job, kind, draw))
        except EndedError:
            break
        except MachineError as error:
            job.kill()
            job.codes.append(job.agent.returncode)
            return faults, f"{kind} at {at / 60:.1f} minutes: {error}"
        print(f"{at / 60:5.1f} min, step {faults[-1]['step']}: {words(faults[-1])}", flush=True)
    return faults, ""


def fitting(kinds: list[str], storm: bool) -> list[str]:
    """Return the kinds to draw from: in a storm all, those that end processes twice; else only the others, if any."""
    ends = [kind for kind in kinds if FAULTS[kind].ends]
    return kinds + ends if storm else [kind for kind in kinds if kind not in ends] or kinds


def words(fault: dict[str, Any]) -> str:
    effects = ", ".join(name if count == 1 else f"{count} x {name}" for name, count in fault["led_to"].items())
    return f"{fault['what']}: {effects or 'no effect reported'}; {fault['seconds']:.0f} s until a step"


def finish(job: Job, config: Config) -> int:
    """Let the job end with one more epoch, if it has not ended; return torchrun's exit code."""
    if job.agent.poll() is None:
        job.end()
        last = int(io.checkpoints(job.folder / "checkpoints")[-1].name.removeprefix("step_"))
        job.start(f"--train.max_steps={last + -(-config.data.samples // config.train.batch_size)}")
    job.codes.append(job.agent.wait(2 * PATIENCE))
    job.follow()
    return job.codes[-1]


def ending(job: Job, log_every: int) -> dict[str, Any]:
    """Return how the run ended, and what it left behind."""
    every, broken = read_records(job.folder / "metrics.jsonl")
    records = [record for record in every if record["kind"] == "train"]
    steps, last = [record["step"] for record in records], records[-1]["step"]
    looks = [record["step"] for record in every if record["kind"] == "features"]
    expected = sorted({*range(log_every, last + 1, log_every), last})
    few = max(1, len(records) // 10)
    newest, state = io.newest(job.folder / "checkpoints"), read_state(job.folder)
    return {
        "exit_code": job.codes[-1],
        "state": state.state if state else None,
        "steps": last,
        "epochs": records[-1]["epoch"],
        "newest_checkpoint": newest.path.name if newest.path else None,
        "records": len(steps),
        "records_missing": sorted(set(expected) - set(steps)),
        "records_twice": sum(len(of) - len(set(of)) for of in (steps, looks)),
        "records_broken": broken,
        "left_over_files": [str(p.relative_to(job.folder)) for p in job.folder.rglob(".*") if p.name != ".lock"],
        "left_over_processes": len(job.left_over()),
        "loss_first": statistics.median(record["loss"] for record in records[:few] if record["loss"] is not None),
        "loss_last": statistics.median(record["loss"] for record in records[-few:] if record["loss"] is not None),
    }


def read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the records of metrics.jsonl, and the number of its lines that are no record."""
    found, broken = [], 0
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            broken += 1
    return found, broken


def verdict(end: dict[str, Any], living: list[dict[str, Any]]) -> dict[str, bool]:
    """Return the conditions for success, each with its result."""
    risen = [life["mb_per_hour"]["rise"] - 3 * life["mb_per_hour"]["error"] for life in living]
    return {
        "ended complete": end["exit_code"] == 0
        and end["state"] == "done"
        and end["newest_checkpoint"] == f"step_{end['steps']:08d}",
        "every record once": not end["records_missing"] and not end["records_twice"] and not end["records_broken"],
        "nothing left over": not end["left_over_files"] and not end["left_over_processes"],
        "the loss fell": end["loss_last"] < end["loss_first"],
        "memory flat": all(rise < GROWS for rise in risen),
        "handles flat": all(life["handles"]["last"] <= life["handles"]["first"] + 2 for life in living),
    }


def measure(options: Namespace, work: Path) -> dict[str, Any]:
    """Run the whole benchmark; return its result with all samples and faults."""
    settings = job_settings(options.settings, work, options.minutes)
    config = load_config(settings, "ccmim bench soak")
    write_images(work / "images", config)
    draw = random.Random(options.seed)
    with small_disk(work / "disk", DISK_MB) as mounted:
        kinds = [kind for kind in options.kinds if mounted or kind != "disk"]
        job, start = Job(work, work / "disk" / "run", settings), time.monotonic()
        sampler = Sampler(job, start)
        try:
            job.start()
            sampler.start()
            job.wait_until(lambda: len(io.checkpoints(job.folder / "checkpoints")) > 1, "two checkpoints")
            faults, failed = inject_faults(job, kinds, options.minutes, draw, start)
            if not failed:
                finish(job, config)
            sampler.stop()
            end = ending(job, config.run.log_every) | {"failed": failed}
        finally:
            job.kill()
            if job.folder.exists():
                shutil.copytree(job.folder, work / "run", ignore=shutil.ignore_patterns("checkpoints"))
    living = lives(sampler.samples, LIFE, WARM_UP)
    return {
        "minutes": (time.monotonic() - start) / 60,
        "kinds": kinds,
        "faults": faults,
        "said": {name: len(job.printed(sign, 0)) for name, sign in SIGNS.items()},
        "tracebacks": len(job.printed("^Traceback", 0)),
        "launches": job.launches,
        "steps_repeated": job.repeated,
        "torchrun_codes": job.codes,
        "disk_bytes": {"max": sampler.disk[0], "last": sampler.disk[1]},
        "end": end,
        "lives": living,
        "verdict": verdict(end, living),
        "samples": sampler.samples,
    }


def main(options: Namespace, arguments: list[str]) -> int:
    unknown = [kind for kind in options.kinds if kind not in FAULTS]
    if unknown:
        raise ConfigError(f"--kinds={unknown[0]!r:.40}: no such fault; choose from {','.join(FAULTS)}")
    options.device, options.precision, options.threads = "cpu", "fp32", 1
    environment = pages.environment("soak", arguments, options)
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        if any(work.iterdir()):
            raise ConfigError(f"--work={work}: not empty; choose another folder")
        result = {"environment": environment, **measure(options, work.absolute())}
    samples, body = result.pop("samples"), report(result)
    result["samples"] = [" ".join(map(str, sample)) for sample in samples]
    prefix = pages.prefix_of("soak-hour", options, environment)
    print(f"\n{body}\n")
    body += f"\n\n![memory, handles and faults]({prefix.name}.png)"
    pages.write(
        result,
        prefix,
        pages.page("An hour of faults", result, NOTE, body),
        lambda path: plot(samples, result["faults"], path),
    )
    return 0 if all(result["verdict"].values()) else 1


NOTE = (
    f"The demo's pretraining of ccMIM by {RANKS} ranks under torchrun, 32 images a step, on image files. Memory is "
    "anonymous memory (heap and stacks), sampled from outside every two seconds; a slope is of least squares, ± its "
    "standard error (corrected for neighbouring samples being alike), the first two minutes of a process left out."
)


def report(result: dict[str, Any]) -> str:
    """Return the tables of the page."""
    return "\n\n".join([_faults(result), _end(result), _lives(result["lives"])])


def _faults(result: dict[str, Any]) -> str:
    rows = []
    for kind in result["kinds"]:
        of_kind = [fault for fault in result["faults"] if fault["kind"] == kind]
        led_to = Counter()
        for fault in of_kind:
            led_to.update(fault["led_to"])
        seconds = f"{statistics.median(fault['seconds'] for fault in of_kind):.0f}" if of_kind else "-"
        rows.append([kind, str(len(of_kind)), seconds, "; ".join(f"{n} x {name}" for name, n in led_to.items())])
    said = "; ".join(f"{count} x {name}" for name, count in result["said"].items() if count)
    rows.append(["all", str(len(result["faults"])), "", f"in the whole output: {said}"])
    return pages.table(rows, ["fault", "times", "seconds until a step (median)", "what the run said until then"])


def _end(result: dict[str, Any]) -> str:
    end, disk = result["end"], result["disk_bytes"]
    facts = {
        "minutes": f"{result['minutes']:.1f}",
        "exit code, state": f"{end['exit_code']}, {end['state']}{end['failed'] and '; '}{end['failed']}",
        "steps, epochs": f"{end['steps']}, {end['epochs']:.1f}",
        "launches of the ranks, steps taken again": f"{result['launches']}, {result['steps_repeated']}",
        "records of steps, missing, twice, broken": f"{end['records']}, {len(end['records_missing'])}, "
        f"{end['records_twice']}, {end['records_broken']}",
        "loss, first and last tenth": f"{end['loss_first']:.4f}, {end['loss_last']:.4f}",
        "files and processes left over": f"{len(end['left_over_files'])}, {end['left_over_processes']}",
        "run folder, MB, most and last": f"{disk['max'] / 1e6:.0f}, {disk['last'] / 1e6:.0f}",
    }
    verdict = [[name, "yes" if so else "**no**"] for name, so in result["verdict"].items()]
    return pages.table([[name, value] for name, value in facts.items()] + verdict, ["the end", ""])


def _lives(living: list[dict[str, Any]]) -> str:
    rows = []
    for life in living:
        hour, steps, memory = life["mb_per_hour"], life["mb_per_1000_steps"], life["anonymous_mb"]
        rows.append(
            [
                f"{life['name']}, from minute {life['from_seconds'] / 60:.0f}",
                f"{life['minutes']:.1f}",
                str(life["steps"]),
                "{first:.1f}, {last:.1f}, {max:.1f}".format(**memory),
                f"{hour['rise']:+.2f} ± {hour['error']:.2f}",
                f"{steps['rise']:+.3f} ± {steps['error']:.3f}" if steps else "-",
                "{first}, {last}, {max}".format(**life["handles"]),
                "{first}, {last}, {max}".format(**life["threads"]),
            ]
        )
    header = ["process", "minutes", "steps", "MB: first, last, most", "MB per hour", "MB per 1,000 steps"]
    return pages.table(rows, [*header, "handles: first, last, most", "threads: first, last, most"])
