"""Chooses the form in which a peer is fastest: `best(job)` starts a process, which is this file as a script.

What there is to choose is the peer's to say, see the head of throughput.py. The default form comes first. Each keyword
argument is then asked in turn: all its values, the others as they are by then, take steps in turns, and the fastest in
the median stays. A value that fails, or whose losses are others, is dropped with a line.
"""

import functools
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from contenders import Step, load_peer
from measure import WARM_UP, Job, answer, in_own_process, random_images

from ccmim_fast.autotune.check import failure
from ccmim_fast.profile.meter import seconds_of

ROUNDS = 3  # of steps in turns, for each question: products of ViT-B differ by a few per cent from step to step
# Relative difference of the losses of the first steps, from the same weights. The masks may be others, as compiled code
# draws other random numbers. Seen with ViT-Ti, batch 4, three steps: 0.2 % between bf16's forms.
TOLERANCE = 0.02


class Best(NamedTuple):
    """The form that is fastest, and how that was found.

    Attributes:
        form: keyword arguments of the peer; empty where there is nothing to choose.
        milliseconds: the median step of each value that was tried, by `name=value`, of its own question's turns.
        dropped: by `name=value`, why it was out.
        seconds: that the search took.
    """

    form: dict[str, str]
    milliseconds: dict[str, dict[str, float]]
    dropped: dict[str, str]
    seconds: float

    def line(self) -> str:
        """`weights=bf16, attention=eager (sdpa 310 ms, eager 250 ms)`: what was chosen, and of what."""
        said = []
        for name, value in self.form.items():
            times = [f"{tried} {ms:.0f} ms" for tried, ms in self.milliseconds.get(name, {}).items()]
            said.append(f"{name}={value}" + (f" ({', '.join(times)})" if times else ""))
        said += [f"not {which}: {why}" for which, why in self.dropped.items()]
        return "; ".join(said)


def best(job: Job) -> Best | str:
    """What a process finds for the peer of `job`, or one line that says why there is nothing.

    Raises:
        CcmimError: the job itself is a mistake.
    """
    said = in_own_process(Path(__file__).name, job)
    return said if isinstance(said, str) else Best(**said)


def search(job: Job) -> Best:
    """The fastest form of the peer of `job`, found in this process."""
    start, device = time.perf_counter(), torch.device(job.device)
    torch.set_num_threads(job.threads)
    build = load_peer(job.peer)
    # The names of the peer's own file.
    offered = build.__globals__.get("forms", lambda precision: {})(job.precision)
    found = Best({name: values[0] for name, values in offered.items()}, {}, {}, 0.0)
    if not any(values[1:] for values in offered.values()):
        return found
    images_BHWC = random_images(job.batch, job.image_size, device)
    begin = functools.partial(_begun, build, job, images_BHWC)
    step, expected = begin(found.form)
    for name, values in offered.items():
        steps = {values[0]: step}
        for value in values[1:]:
            try:
                steps[value], losses = begin({**found.form, name: value})
                if why := _differs(losses, expected):
                    found.dropped[f"{name}={value}"] = why
                    del steps[value]
            except Exception as error:
                found.dropped[f"{name}={value}"] = failure(error)
        if len(steps) > 1:
            found.milliseconds[name] = _medians(steps, device)
            found.form[name] = min(found.milliseconds[name], key=found.milliseconds[name].get)
        step = steps[found.form[name]]
    return found._replace(seconds=round(time.perf_counter() - start, 1))


def _begun(build, job: Job, images_BHWC: torch.Tensor, form: dict[str, str]) -> tuple[Step, list[float]]:
    """The step in this form, warm, and its first losses: from the same weights and random numbers in each form."""
    torch.manual_seed(0)
    step = build(job.arch, images_BHWC, job.precision, **form)
    torch.manual_seed(1)
    return step, [step().item() for _ in range(WARM_UP[images_BHWC.device.type])]


def _differs(losses: list[float], expected: list[float]) -> str:
    """Why these losses are not the expected ones; empty where they are. Written so that NaN differs."""
    for number, (loss, other) in enumerate(zip(losses, expected, strict=True), start=1):
        if not abs(loss - other) <= TOLERANCE * abs(other):
            return f"the loss of step {number} is {loss:.4g}, of the default form {other:.4g}"
    return ""


def _medians(steps: dict[str, Step], device: torch.device) -> dict[str, float]:
    """The median step of each in milliseconds; they take turns."""
    turns = [{value: seconds_of(step, device) for value, step in steps.items()} for _ in range(ROUNDS)]
    return {value: round(1e3 * statistics.median(turn[value] for turn in turns), 3) for value in steps}


if __name__ == "__main__":
    sys.exit(answer(search))
