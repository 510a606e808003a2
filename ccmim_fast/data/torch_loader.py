"""Images cropped and resized by Pillow in threads: runs everywhere, and says what the DALI loader must give."""

# N samples, B batch, H height, W width, C channels

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from PIL import Image

from ccmim_fast.data.batch import Batch, make_batch
from ccmim_fast.data.plan import MicroBatch, Plan
from ccmim_fast.data.prefetch import prefetch, thread_count
from ccmim_fast.data.source import Source


class TorchLoader:
    """Training micro-batches by Pillow; a `Loader`.

    Args:
        source: the images, of any number of channels.
        plan: what this rank loads.
        image_size: height and width of the crops, pixels.
        workers: decoding threads; 0: one per core.
        device: where the batches go.
    """

    def __init__(
        self, source: Source, plan: Plan, image_size: tuple[int, int], workers: int, device: torch.device
    ) -> None:
        self._source, self._plan, self._image_size = source, plan, image_size
        self._threads, self._device = thread_count(workers), device

    @property
    def steps_per_epoch(self) -> int:
        return self._plan.steps_per_epoch

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """See `Loader`."""
        micro_batches = self._plan.micro_batches(epoch, start_step)
        return _load(self._source, micro_batches, self._image_size, self._threads, self._device)


def evaluation_batches(
    source: Source, image_size: tuple[int, int], batch_size: int, device: torch.device, workers: int = 0
) -> Iterator[Batch]:
    """Every image once, in the order of its id, whole and resized without regard to its aspect; no augmentation.

    The last batch may be smaller.
    """

    def whole_images() -> Iterator[MicroBatch]:
        for start in range(0, len(source), batch_size):
            ids_B = np.arange(start, min(start + batch_size, len(source)))
            sizes_B2 = source.sizes_N2[ids_B].astype(np.int64)
            boxes_B4 = np.concatenate([np.zeros_like(sizes_B2), sizes_B2], axis=1)
            yield MicroBatch(ids_B, boxes_B4, np.zeros(len(ids_B), dtype=bool))

    return _load(source, whole_images(), image_size, thread_count(workers), device)


def crop_and_resize(image_HWC: np.ndarray, box_4: np.ndarray, flipped: bool, image_size: tuple[int, int]) -> np.ndarray:
    """Cut out a box (y, x, height, width), resize it by antialiased bicubic interpolation, mirror it; uint8 as given.

    The cut comes first: pixels outside the box have no part in the result, as when only the box is decoded.
    """
    y, x, height, width = box_4.tolist()
    crop_HWC = image_HWC[y : y + height, x : x + width]
    if crop_HWC.shape[2] == 3:
        resized_HWC = _resize(crop_HWC, image_size)
    else:
        resized_HWC = np.stack([_resize(plane_HW, image_size) for plane_HW in np.moveaxis(crop_HWC, 2, 0)], axis=2)
    return resized_HWC[:, ::-1] if flipped else resized_HWC


def _resize(pixels: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """[H, W] or [H, W, 3] uint8 in another size."""
    return np.asarray(Image.fromarray(pixels).resize(image_size[::-1], Image.Resampling.BICUBIC))


def _load(
    source: Source, micro_batches: Iterable[MicroBatch], image_size: tuple[int, int], threads: int, device: torch.device
) -> Iterator[Batch]:
    def load_one(index: int, box_4: np.ndarray, flipped: bool) -> np.ndarray:
        return crop_and_resize(source.decode(index), box_4, flipped, image_size)

    for batch, images in prefetch(load_one, micro_batches, threads):
        # Stacked right into pinned memory: pinning a pageable tensor would copy it once more.
        images_BHWC = torch.empty(len(images), *images[0].shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
        np.stack(images, out=images_BHWC.numpy())
        yield make_batch(images_BHWC, batch.ids_B, source.labels_N, device)
