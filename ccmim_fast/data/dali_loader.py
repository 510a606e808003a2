"""Images decoded, cropped and resized by NVIDIA DALI: on the GPU where there is one. The one file that imports DALI.

DALI draws nothing and reads no file: it gets bytes and boxes, so it carries out the same plan as the torch loader and
gives the same pixels up to rounding.
"""

# B batch, H height, W width, C channels

import importlib.util
from collections import deque
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import torch

from ccmim_fast.data.batch import Batch, make_batch
from ccmim_fast.data.plan import MicroBatch, Plan
from ccmim_fast.data.prefetch import prefetch, thread_count
from ccmim_fast.data.source import Source
from ccmim_fast.errors import ConfigError, DataError, MachineError


def is_installed() -> bool:
    """Whether DALI is there, without importing it."""
    # Looking for `nvidia.dali` imports `nvidia`, so that is looked for first.
    return all(importlib.util.find_spec(name) is not None for name in ("nvidia", "nvidia.dali"))


class DaliLoader:
    """Training micro-batches by DALI; a `Loader`.

    Args:
        source: the images, of 1 or 3 channels.
        plan: what this rank loads.
        image_size: height and width of the crops, pixels.
        workers: threads, both of Python to read files and of DALI to decode; 0: one per core.
        device: where the batches go; DALI works there, on "cuda" the current one.

    Raises:
        MachineError: DALI is not installed or does not load.
        ConfigError: another number of channels.
    """

    def __init__(
        self, source: Source, plan: Plan, image_size: tuple[int, int], workers: int, device: torch.device
    ) -> None:
        if source.channels not in (1, 3):
            raise ConfigError(f"data.loader=dali reads 1 or 3 channels, not {source.channels}; set data.loader=torch")
        try:
            import nvidia.dali.plugin.pytorch as dali_torch
        except (ImportError, OSError) as error:
            raise MachineError(
                f"data.loader=dali needs DALI ({error}); pip install nvidia-dali-cuda130, or set data.loader=torch"
            ) from error
        self._copy = dali_torch.feed_ndarray
        self._source, self._plan, self._image_size = source, plan, image_size
        self._threads, self._device = thread_count(workers), device

    @property
    def steps_per_epoch(self) -> int:
        return self._plan.steps_per_epoch

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """See `Loader`."""
        in_flight: deque[MicroBatch] = deque()
        # A pipeline for each epoch: one that met a damaged file, or was left half-way, cannot be used again.
        with closing(self._feed(epoch, start_step, in_flight)) as feed:
            pipeline = self._build(feed)
            while True:
                try:
                    (images,) = pipeline.run()
                except StopIteration:
                    return
                except RuntimeError as error:
                    if not in_flight:
                        raise
                    raise self._damaged(in_flight[0], error) from error
                batch = in_flight.popleft()
                yield make_batch(self._own(images), batch.ids_B, self._source.labels_N, self._device)

    def _feed(self, epoch: int, start_step: int, in_flight: deque[MicroBatch]) -> Iterator[tuple]:
        """The inputs for each micro-batch, which is put down in `in_flight`; flips only where there are any."""

        def read(index: int, *_: object) -> np.ndarray:
            return np.frombuffer(self._source.read(index), dtype=np.uint8)

        for batch, files in prefetch(read, self._plan.micro_batches(epoch, start_step), self._threads):
            in_flight.append(batch)
            anchors_B2, shapes_B2 = (
                np.ascontiguousarray(part_B2, dtype=np.int32) for part_B2 in np.split(batch.boxes_B4, 2, axis=1)
            )
            flips = (batch.flips_B.astype(np.int32),) if self._plan.flip else ()
            yield files, anchors_B2, shapes_B2, *flips

    def _build(self, feed: Iterator[tuple]):
        from nvidia.dali import fn, pipeline_def, types

        on_gpu = self._device.type == "cuda"

        @pipeline_def(
            batch_size=self._plan.micro_batch_size,
            num_threads=self._threads,
            device_id=torch.cuda.current_device() if on_gpu else None,
        )
        def crops():
            inputs = 4 if self._plan.flip else 3
            files, anchors, shapes, *flipped = fn.external_source(
                source=feed,
                num_outputs=inputs,
                dtype=[types.UINT8, types.INT32, types.INT32, types.INT32][:inputs],
                ndim=[1, 1, 1, 0][:inputs],
            )
            # Anchors refer to the image after EXIF rotation (`adjust_orientation`, on by default), as our sizes do.
            images = fn.decoders.image_slice(
                files,
                anchors,
                shapes,
                axes=[0, 1],
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB if self._source.channels == 3 else types.GRAY,
            )
            images = fn.resize(images, size=list(self._image_size), interp_type=types.INTERP_CUBIC, antialias=True)
            return fn.flip(images, horizontal=flipped[0]) if flipped else images

        pipeline = crops()
        pipeline.build()
        return pipeline

    def _own(self, images) -> torch.Tensor:
        """A copy [B, H, W, C] uint8 of DALI's output, whose buffer it will use again."""
        shape = (self._plan.micro_batch_size, *self._image_size, self._source.channels)
        images_BHWC = torch.empty(shape, dtype=torch.uint8, device=self._device)
        stream = torch.cuda.current_stream() if images_BHWC.is_cuda else None
        return self._copy(images.as_tensor(), images_BHWC, cuda_stream=stream)

    def _damaged(self, batch: MicroBatch, error: RuntimeError) -> DataError:
        """Name the files of a micro-batch that do not decode; DALI gives only their place in the batch."""
        reasons = []
        for index in batch.ids_B.tolist():
            try:
                self._source.decode(index)
            except DataError as reason:
                reasons.append(str(reason))
        if reasons:
            return DataError("; ".join(reasons))
        # DALI's message has many lines, and the cause is none of the first.
        message = " ".join(str(error).split())
        return DataError(
            f"DALI failed on a micro-batch whose images Pillow decodes; data.loader=torch reads it: {message}"
        )
