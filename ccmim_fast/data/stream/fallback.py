"""What is shown in the place of an image that cannot be."""

from collections.abc import Callable
from typing import TypeVar

from ccmim_fast.data.index.bad_samples import Skipped
from ccmim_fast.data.source import UnreadableError
from ccmim_fast.data.stream.plan import MicroBatch, Plan
from ccmim_fast.errors import DataError

_ATTEMPTS = 100  # each fails with the share of bad samples, which `data.max_bad` keeps small

Result = TypeVar("Result")


def load_or_substitute(
    load: Callable[[MicroBatch], Result], sample: MicroBatch, plan: Plan, skipped: Skipped
) -> tuple[MicroBatch, Result]:
    """What `load` makes of one sample, or of the first of its substitutes that it can load, and which one that is.

    The substitutes are drawn by (seed, epoch, sample id): the same in every run, on every rank, with either loader.

    Args:
        load: raises DataError for an image that cannot be shown.
        sample: a micro-batch of one.
        skipped: keeps account of what failed.

    Raises:
        DataError: no substitute can be loaded either, or `skipped` allows no more.
    """
    index, epoch = sample.ids_B.item(), sample.epochs_B.item()
    for attempt in range(_ATTEMPTS):
        asked = sample.ids_B.item()
        reason, lasting = skipped.known.get(asked), True
        if reason is None:
            try:
                return sample, load(sample)
            except DataError as error:
                reason, lasting = str(error), not isinstance(error, UnreadableError)
        skipped.add(asked, reason, lasting)
        sample = plan.substitute(index, epoch, attempt)
    raise DataError(f"{reason}; and {_ATTEMPTS - 1} samples drawn in its place cannot be shown either")
