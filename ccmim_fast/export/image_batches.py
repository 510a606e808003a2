"""The images of any folder are shown to a model, batch by batch; what cannot be used is told and counted."""

# B batch

import sys
from collections.abc import Iterator

import torch

from ccmim_fast.data.index.bad_samples import BadSamples
from ccmim_fast.data.index.indexed import open_images
from ccmim_fast.data.index.left_out import left_out_lines
from ccmim_fast.data.progress import progress_bar
from ccmim_fast.data.source import usable_count
from ccmim_fast.data.stream.batch import Batch
from ccmim_fast.data.stream.torch_loader import evaluation_batches
from ccmim_fast.errors import DataError, MachineError, as_text


def chosen_device(name: str) -> torch.device:
    """Return the device of `--device`: auto, cpu or cuda. Raises MachineError where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise MachineError("--device=cuda: there is no CUDA device; use --device=cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


class ImageBatches:
    """This class opens all that `data.root` may name; `source` has the images, `count` of which look usable.

    What the index leaves out is told on standard error. For `image_key`, `max_value` and the errors see `open_images`.
    """

    def __init__(self, folder: str, channels: int, image_key: str = "", max_value: tuple[float, ...] = ()):
        self.source = open_images(folder, channels, quiet=False, image_key=image_key, max_value=max_value)
        for line in left_out_lines(self.source):
            print(line, file=sys.stderr)
        self.count, self._bad = usable_count(self.source), BadSamples(self.source, "skip", max_bad=1.0)

    def iterate(
        self,
        doing: str,
        image_size: tuple[int, int],
        size: int,
        device: torch.device,
        workers: int,
        central: float = 0.0,
    ) -> Iterator[tuple[list[str], Batch]]:
        """Yield each batch with the names of its images, in the order of the index; see `evaluation_batches`.

        An image that does not decode is left out. `doing` stands before the progress. Raises DataError: none can be
        read.
        """
        done = 0
        with progress_bar(doing) as report:
            for batch in evaluation_batches(
                self.source, image_size, size, device, workers, central=central, bad_samples=self._bad
            ):
                numbers = batch.host_ids_B.tolist()
                yield [as_text(self.source.name(number)) for number in numbers], batch
                done += len(numbers)
                report(done, self.count)
        if not done:
            raise DataError(f"none of {self.count} images can be read: {self.reason}")

    @property
    def made(self) -> int:
        """Return how many images were shown."""
        return self.count - len(self._bad.reasons)

    @property
    def left_out(self) -> int:
        """Return how many images of the index were not shown."""
        return len(self.source) - self.made

    @property
    def reason(self) -> str:
        """Return why the first image that does not decode does not; empty if all that the index has do."""
        return next(iter(self._bad.reasons.values()), "")


def left_out_words(count: int, reason: str) -> str:
    """Say behind a command's last line how many images cannot be used; empty for none."""
    words = f"; {count} images cannot be used" if count else ""
    return words + (f", the first that does not decode: {reason}" if reason else "")
