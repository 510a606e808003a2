"""NVIDIA DALI decodes the images here and, on a GPU, resizes them too. Only this file imports DALI.

DALI draws no random numbers and reads no files: it is given bytes and boxes. It therefore carries out the same plan as
the torch loader and gives the same pixels up to rounding.
"""

# B batch, H height, W width, C channels

import importlib.util
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import starmap
from typing import Any, NamedTuple

import numpy as np
import torch

from ccmim_fast.data.build import Loader
from ccmim_fast.data.index.indexed import IndexedSource
from ccmim_fast.data.source import Source, encode_pnm
from ccmim_fast.data.stream.batch import Batch, make_batch
from ccmim_fast.data.stream.plan import MicroBatch, Plan
from ccmim_fast.data.stream.prefetch import load_with_fallback, prefetch
from ccmim_fast.data.stream.torch_loader import resize
from ccmim_fast.errors import ConfigError, DataError, MachineError

_FILES_PER_TASK = 16  # with one file per task, the hand-over between threads takes longer than reading


def is_installed() -> bool:
    """Tell whether DALI is installed, without importing it."""
    # `find_spec("nvidia.dali")` imports `nvidia`, which may be missing itself.
    return all(importlib.util.find_spec(name) is not None for name in ("nvidia", "nvidia.dali"))


def _refusal(source: Source) -> str:
    """Return what DALI reads and these images are not; empty if it reads them."""
    if source.channels not in (1, 3):
        return f"1 or 3 channels, not {source.channels}"
    return "" if source.dtype == np.uint8 else "pixels of 8 bits, not of more"


class DaliLoader(Loader):
    """This loader decodes images of 1 or 3 channels by DALI.

    DALI cannot skip an image: one that does not decode ends the pipeline. A new pipeline then goes on with the same
    micro-batch, decoded by Pillow, in which fallbacks replace the images that Pillow cannot decode either.

    `workers` counts threads, both of Python to read files and of DALI to decode. `device` "cuda" is the current device.
    """

    def __init__(self, plan: Plan, *others: Any):
        if refusal := _refusal(plan.source):
            raise ConfigError(f"data.loader=dali reads {refusal}; set data.loader=torch")
        try:
            import nvidia.dali.plugin.pytorch as dali_torch
        except (ImportError, OSError) as error:
            raise MachineError(
                f"data.loader=dali needs DALI ({error}); pip install nvidia-dali-cuda130, or set data.loader=torch"
            ) from error
        self._copy = dali_torch.feed_ndarray
        super().__init__(plan, *others)
        self._pool = ThreadPoolExecutor(self._threads)  # on a CPU torch resizes, eight times as fast as DALI there

    @staticmethod
    def suits(source: Source) -> bool:
        """Tell whether DALI reads and speeds up such images; generated images are not encoded, so they gain nothing."""
        return isinstance(source, IndexedSource) and not _refusal(source) and is_installed()

    def stream(self, cursor: int) -> Iterator[Batch]:
        buffers, flip = self.buffers(), self.plan.flip and self._device.type == "cuda"
        # Micro-batches, in order: whose images have not come out yet; which DALI is to be given once more.
        in_flight: deque[_Encoded] = deque()
        again: deque[_Encoded] = deque()

        def feed() -> tuple:  # without `self`: DALI keeps it alive for a while, and with it our threads
            in_flight.append(again.popleft() if again else next(loaded))
            return in_flight[-1].inputs(flip)

        with closing(self.encoded(cursor)) as loaded:
            pipeline = self._build(feed)
            while True:
                try:
                    (images,) = pipeline.run()
                except RuntimeError as error:
                    if not in_flight:
                        raise
                    in_flight[0] = self._repair(in_flight[0], error)
                    again.extendleft(reversed(in_flight))
                    in_flight.clear()
                    pipeline = self._build(feed)
                    continue
                samples = in_flight.popleft().samples
                own_BHWC = buffers.fill(partial(self._take, images, samples))
                yield make_batch(own_BHWC, samples, self.plan.source, self._device)

    def _take(self, images, samples: MicroBatch, own_BHWC: torch.Tensor, stream: "torch.cuda.Stream | None") -> None:
        """Copy DALI's output to our own memory, since DALI will use its buffer again."""
        if stream is not None:
            self._copy(images.as_tensor(), own_BHWC, cuda_stream=stream)
            return
        out_BHWC = own_BHWC.numpy()

        def resize_one(i: int) -> None:
            resized_HWC = resize(images.at(i), self._image_size)
            out_BHWC[i] = resized_HWC[:, ::-1] if samples.flips_B[i] else resized_HWC

        list(self._pool.map(resize_one, range(len(out_BHWC))))

    def encoded(self, cursor: int) -> Iterator["_Encoded"]:
        """Yield micro-batches from sample number `cursor` on, read and not decoded."""
        load = self._loading(self.plan.source.read)
        batches = self.plan.micro_batches(cursor)
        with closing(prefetch(load, batches, self._threads, _FILES_PER_TASK)) as loaded:
            yield from starmap(_Encoded, loaded)

    def _loading(self, read: Callable[[int], bytes]) -> Callable[[MicroBatch], tuple[MicroBatch, np.ndarray]]:
        """Return a function that gives the bytes which `read` gives of a sample or of its fallback, as an array."""

        def load(sample: MicroBatch) -> np.ndarray:
            return np.frombuffer(read(sample.ids_B.item()), dtype=np.uint8)

        return partial(load_with_fallback, load, plan=self.plan, bad_samples=self.bad_samples)

    def _repair(self, failed: "_Encoded", error: RuntimeError) -> "_Encoded":
        """Return the same micro-batch as pixels that Pillow has decoded, with fallbacks for what it cannot decode."""
        if failed.repaired:
            # DALI's message has many lines, and the cause is not in the first one.
            message = " ".join(str(error).split())
            raise DataError(f"DALI fails on decoded pixels; set data.loader=torch: {message}") from error
        load = self._loading(lambda index: encode_pnm(self.plan.source.decode(index)))
        samples, files = zip(*map(load, failed.samples.samples()))
        return _Encoded(MicroBatch.join(samples), list(files), repaired=True)

    def _build(self, feed: Callable[[], tuple]):
        """Return a pipeline that decodes what `feed` returns (`_Encoded.inputs`); on a GPU it resizes and flips too."""
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
            # On a GPU `mixed` decodes only the box, by a hardware decoder where there is one.
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
    """The B images of a micro-batch are encoded here; if `repaired`, they are pixels that are known to be good."""

    samples: MicroBatch
    files: list[np.ndarray]
    repaired: bool = False

    def inputs(self, flip: bool) -> tuple:
        """Return DALI's input: the encoded images, anchors and shapes of the crops, and, for `flip`, the flips."""
        halves_B2 = np.split(self.samples.boxes_B4, 2, axis=1)
        places_B2 = (np.ascontiguousarray(half_B2, dtype=np.int32) for half_B2 in halves_B2)
        flips = (self.samples.flips_B.astype(np.int32),) if flip else ()
        return self.files, *places_B2, *flips
