"""Images decoded by NVIDIA DALI, on a GPU resized by it too. The one file that imports DALI.

DALI draws nothing and reads no file: it gets bytes and boxes, so it carries out the same plan as the torch loader and
gives the same pixels up to rounding.
"""

# B batch, H height, W width, C channels

import functools
import importlib.util
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import NamedTuple

import numpy as np
import torch

from ccmim_fast.data.index.bad_samples import Skipped
from ccmim_fast.data.source import encode_pnm
from ccmim_fast.data.stream.batch import Batch, make_batch
from ccmim_fast.data.stream.buffers import Buffers
from ccmim_fast.data.stream.fallback import load_or_substitute
from ccmim_fast.data.stream.plan import MicroBatch, Plan
from ccmim_fast.data.stream.prefetch import prefetch, thread_count
from ccmim_fast.data.stream.torch_loader import resize
from ccmim_fast.errors import ConfigError, DataError, MachineError

_READ_AT_ONCE = 16  # files a thread takes at a time: one by one, handing over takes longer than reading


def is_installed() -> bool:
    """Whether DALI is there, without importing it."""
    # Looking for `nvidia.dali` imports `nvidia`, so that is looked for first.
    return all(importlib.util.find_spec(name) is not None for name in ("nvidia", "nvidia.dali"))


class DaliLoader:
    """Training micro-batches by DALI; a `Loader`.

    DALI cannot leave an image out: one that does not decode ends its pipeline. A new one is made then, and goes on with
    that micro-batch, in which substitutes stand for what Pillow cannot decode either. What Pillow can is handed over
    decoded.

    Args:
        plan: what this rank loads, and from where; images of 1 or 3 channels.
        skipped: keeps account of what cannot be shown.
        image_size: height and width of the crops, pixels.
        workers: threads, both of Python to read files and of DALI to decode; 0: this rank's share of the cores.
        device: where the batches go; DALI works there, on "cuda" the current one.

    Raises:
        MachineError: DALI is not installed or does not load.
        ConfigError: another number of channels.
    """

    def __init__(
        self, plan: Plan, skipped: Skipped, image_size: tuple[int, int], workers: int, device: torch.device
    ) -> None:
        if plan.source.channels not in (1, 3):
            raise ConfigError(
                f"data.loader=dali reads 1 or 3 channels, not {plan.source.channels}; set data.loader=torch"
            )
        try:
            import nvidia.dali.plugin.pytorch as dali_torch
        except (ImportError, OSError) as error:
            raise MachineError(
                f"data.loader=dali needs DALI ({error}); pip install nvidia-dali-cuda130, or set data.loader=torch"
            ) from error
        self._copy = dali_torch.feed_ndarray
        self.plan, self.skipped, self._image_size = plan, skipped, image_size
        self._threads, self._device = thread_count(workers), device
        self._pool = ThreadPoolExecutor(self._threads)  # on a CPU torch resizes, eight times as fast as DALI there

    def stream(self, cursor: int) -> Iterator[Batch]:
        """See `Loader`."""
        source = self.plan.source
        shape = (self.plan.micro_batch_size, *self._image_size, source.channels)
        buffers = Buffers(shape, self._device, held=self.plan.accumulate)
        with closing(self.encoded(cursor)) as feed:
            pipeline = self._build(feed)
            while True:
                try:
                    (images,) = pipeline.run()
                except RuntimeError as error:
                    if not feed.in_flight:
                        raise
                    feed.in_flight[0] = self._repaired(feed.in_flight[0], error)
                    feed.rewind()
                    pipeline = self._build(feed)
                    continue
                batch = feed.in_flight.popleft().batch
                own = buffers.fill(functools.partial(self._take, images, batch))
                yield make_batch(own, batch, source, self._device)

    def _take(self, images, batch: MicroBatch, own_BHWC: torch.Tensor, stream: "torch.cuda.Stream | None") -> None:
        """Bring DALI's output into memory of our own: it will use its buffer again."""
        if stream is not None:
            self._copy(images.as_tensor(), own_BHWC, cuda_stream=stream)
            return
        out_BHWC = own_BHWC.numpy()

        def resize_one(i: int) -> None:
            resized_HWC = resize(images.at(i), self._image_size)
            out_BHWC[i] = resized_HWC[:, ::-1] if batch.flips_B[i] else resized_HWC

        list(self._pool.map(resize_one, range(len(out_BHWC))))

    def encoded(self, cursor: int) -> "_Feed":
        """What DALI is given: for each micro-batch its encoded images, anchors and shapes of the crops, and flips."""
        return _Feed(self._read(cursor), self.plan.flip and self._device.type == "cuda")

    def _read(self, cursor: int) -> Iterator["_Encoded"]:
        def load(sample: MicroBatch) -> tuple[MicroBatch, np.ndarray]:
            return load_or_substitute(self._bytes, sample, self.plan, self.skipped)

        loaded = prefetch(load, self.plan.micro_batches(cursor), self._threads, _READ_AT_ONCE)
        with closing(loaded):
            for batch, files in loaded:
                yield _Encoded(batch, files)

    def _bytes(self, sample: MicroBatch) -> np.ndarray:
        return np.frombuffer(self.plan.source.read(sample.ids_B.item()), dtype=np.uint8)

    def _repaired(self, failed: "_Encoded", error: RuntimeError) -> "_Encoded":
        """The same micro-batch as pixels that Pillow decoded, with substitutes for what it cannot decode."""

        def decoded(sample: MicroBatch) -> np.ndarray:
            return np.frombuffer(encode_pnm(self.plan.source.decode(sample.ids_B.item())), dtype=np.uint8)

        if failed.repaired:
            # DALI's message has many lines, and the cause is none of the first.
            message = " ".join(str(error).split())
            raise DataError(f"DALI fails on decoded pixels; data.loader=torch does without it: {message}") from error
        samples, files = zip(
            *(load_or_substitute(decoded, sample, self.plan, self.skipped) for sample in failed.batch.samples())
        )
        return _Encoded(MicroBatch.join(samples), list(files), repaired=True)

    def _build(self, feed: "_Feed"):
        from nvidia.dali import fn, pipeline_def, types

        on_gpu = self._device.type == "cuda"

        @pipeline_def(
            batch_size=self.plan.micro_batch_size,
            num_threads=self._threads,
            device_id=torch.cuda.current_device() if on_gpu else None,
        )
        def crops():
            inputs = 4 if on_gpu and self.plan.flip else 3
            files, anchors, shapes, *flipped = fn.external_source(
                source=feed,
                num_outputs=inputs,
                dtype=[types.UINT8, types.INT32, types.INT32, types.INT32][:inputs],
                ndim=[1, 1, 1, 0][:inputs],
            )
            # Anchors refer to the image after EXIF rotation (`adjust_orientation`, on by default), as our sizes do.
            # On a GPU `mixed` decodes the box alone, in hardware where there is a decoder for it.
            images = fn.decoders.image_slice(
                files,
                anchors,
                shapes,
                axes=[0, 1],
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB if self.plan.source.channels == 3 else types.GRAY,
            )
            if not on_gpu:
                return images
            images = fn.resize(images, size=list(self._image_size), interp_type=types.INTERP_CUBIC, antialias=True)
            return fn.flip(images, horizontal=flipped[0]) if flipped else images

        pipeline = crops()
        pipeline.build()
        return pipeline


class _Encoded(NamedTuple):
    """A micro-batch with its B encoded images; `repaired` where they are pixels that are known to be good."""

    batch: MicroBatch
    files: list[np.ndarray]
    repaired: bool = False


class _Feed:
    """Gives DALI its inputs, and keeps each until its images came out.

    Attributes:
        in_flight: what was given and did not come out yet, in order.
    """

    def __init__(self, encoded: Iterator[_Encoded], flip: bool):
        self._encoded, self._flip = encoded, flip
        self.in_flight: deque[_Encoded] = deque()
        self._again: deque[_Encoded] = deque()

    def __iter__(self) -> "_Feed":
        return self

    def __next__(self) -> tuple:
        encoded = self._again.popleft() if self._again else next(self._encoded)
        self.in_flight.append(encoded)
        batch = encoded.batch
        anchors_B2, shapes_B2 = (
            np.ascontiguousarray(part_B2, dtype=np.int32) for part_B2 in np.split(batch.boxes_B4, 2, axis=1)
        )
        flips = (batch.flips_B.astype(np.int32),) if self._flip else ()
        return encoded.files, anchors_B2, shapes_B2, *flips

    def rewind(self) -> None:
        """Give again what did not come out."""
        self._again.extendleft(reversed(self.in_flight))
        self.in_flight.clear()

    def close(self) -> None:
        self._encoded.close()
