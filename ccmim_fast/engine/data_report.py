"""What a run says of its images: which could not be shown, and what it waits for."""

from collections.abc import Callable
from itertools import islice

from ccmim_fast.data.build import Loader
from ccmim_fast.data.throughput import measure_stage_times
from ccmim_fast.runs.metrics import Metrics

WAIT = 0.1  # share of the time waiting for images from which on it is said what they wait for
_IMAGES = 16  # on which that is measured; a moment


class DataReport:
    """Of one rank.

    Args:
        note: prints a line.
        metrics: where each is written too; None on all ranks but the first, which do not advise either.
    """

    def __init__(
        self, loader: Loader, image_size: tuple[int, int], note: Callable[[str], None], metrics: Metrics | None
    ):
        self._loader, self._image_size, self._note, self._metrics = loader, image_size, note, metrics
        self._told, self._advised = 0, False

    def update(self, step: int, waited: float) -> None:
        """Tell what is new since the last time; `waited` is the share of the time spent waiting for images."""
        for sample, reason in islice(self._loader.bad_samples.reasons.items(), self._told, None):
            self._told += 1
            self._note(f"step {step}: sample {sample} is left out: {reason}")
            if self._metrics is not None:
                self._metrics.write("skipped", step, sample=sample, reason=reason)
        if waited > WAIT and not self._advised and self._metrics is not None:
            self._advised = True
            stages = measure_stage_times(self._loader.plan, self._image_size, _IMAGES)
            self._note(f"step {step}: {waited:.0%} of the time goes by waiting for images; {stages.advice()}")

    def close(self) -> None:
        """Sum up."""
        plan, count = self._loader.plan, len(self._loader.bad_samples.reasons)
        if count:
            self._note(
                f"{count} of {len(plan.source)} samples could not be shown; ccmim data verify looks at all of them"
            )
