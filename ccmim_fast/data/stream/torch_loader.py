"""Images decoded by Pillow and resized by torch in threads: runs everywhere, says what the DALI loader must give."""

# N samples, B batch, H height, W width, C channels

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from ccmim_fast.data.index.bad_samples import Skipped
from ccmim_fast.data.source import Source, usable, usable_ids
from ccmim_fast.data.stream.batch import Batch, make_batch
from ccmim_fast.data.stream.buffers import Buffers
from ccmim_fast.data.stream.fallback import load_or_substitute
from ccmim_fast.data.stream.plan import MicroBatch, Plan
from ccmim_fast.data.stream.prefetch import prefetch, thread_count


class TorchLoader:
    """Training micro-batches by Pillow and torch; a `Loader`.

    Args:
        plan: what this rank loads, and from where; images of any number of channels.
        skipped: keeps account of what cannot be shown.
        image_size: height and width of the crops, pixels.
        workers: decoding threads; 0: this rank's share of the cores.
        device: where the batches go.
    """

    def __init__(
        self, plan: Plan, skipped: Skipped, image_size: tuple[int, int], workers: int, device: torch.device
    ) -> None:
        self.plan, self.skipped, self._image_size = plan, skipped, image_size
        self._threads, self._device = thread_count(workers), device

    def stream(self, cursor: int) -> Iterator[Batch]:
        """See `Loader`."""

        def load(sample: MicroBatch) -> tuple[MicroBatch, np.ndarray]:
            return load_or_substitute(
                lambda one: crop_of(self.plan.source, one, self._image_size), sample, self.plan, self.skipped
            )

        shape = (self.plan.micro_batch_size, *self._image_size, self.plan.source.channels)
        buffers = Buffers(shape, self._device, held=self.plan.accumulate)
        for batch, images in prefetch(load, self.plan.micro_batches(cursor), self._threads):
            yield _batch(batch, images, self.plan.source, buffers.fill, self._device)


def evaluation_batches(
    source: Source,
    image_size: tuple[int, int],
    batch_size: int,
    device: torch.device,
    workers: int = 0,
    central: float = 0.0,
    part: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Every usable image once, in the order of its id; no augmentation.

    The last batch may be smaller. Raises DataError naming an image that does not decode.

    Args:
        central: show the largest central part of the aspect of `image_size`, so many times its sides: 0.875 is a resize
            of the shorter side to 256 and a central crop of 224. 0: the whole image, without regard to its aspect.
        part: (k, n): the images k, k + n, k + 2 n, ... alone.
    """
    first, step = part

    def whole_images() -> Iterator[MicroBatch]:
        places_P = np.arange(first, usable(source), step)
        for start in range(0, len(places_P), batch_size):
            ids_B = usable_ids(source, places_P[start : start + batch_size])
            sizes_B2 = source.sizes_N2[ids_B].astype(np.int64)
            boxes_B4 = np.concatenate([np.zeros_like(sizes_B2), sizes_B2], axis=1)
            if central:
                boxes_B4 = _central_boxes(sizes_B2, image_size, central)
            yield MicroBatch(ids_B, np.zeros_like(ids_B), boxes_B4, np.zeros(len(ids_B), dtype=bool))

    def load(sample: MicroBatch) -> tuple[MicroBatch, np.ndarray]:
        return sample, crop_of(source, sample, image_size)

    for batch, images in prefetch(load, whole_images(), thread_count(workers)):
        buffers = Buffers((len(images), *images[0].shape), device, held=1)
        yield _batch(batch, images, source, buffers.fill, device)


def _central_boxes(sizes_B2: np.ndarray, image_size: tuple[int, int], share: float) -> np.ndarray:
    """Boxes [B, 4] of the aspect of `image_size` in the middle of images: `share` of the sides of the largest one."""
    sides_2 = np.array(image_size)
    largest_B1 = (sizes_B2 / sides_2).min(axis=1, keepdims=True)
    cut_B2 = np.clip(np.rint(share * largest_B1 * sides_2).astype(np.int64), 1, sizes_B2)
    return np.concatenate([(sizes_B2 - cut_B2) // 2, cut_B2], axis=1)


def crop_of(source: Source, sample: MicroBatch, image_size: tuple[int, int]) -> np.ndarray:
    """What a micro-batch of one shows: [H, W, C] uint8. Raises DataError naming the image."""
    image_HWC = source.decode(sample.ids_B.item())
    return crop_and_resize(image_HWC, sample.boxes_B4[0], sample.flips_B.item(), image_size)


def crop_and_resize(image_HWC: np.ndarray, box_4: np.ndarray, flipped: bool, image_size: tuple[int, int]) -> np.ndarray:
    """Cut out a box (y, x, height, width), `resize` and mirror it.

    The cut comes first: pixels outside the box have no part in the result, as when only the box is decoded.
    """
    y, x, height, width = box_4.tolist()
    resized_HWC = resize(image_HWC[y : y + height, x : x + width], image_size)
    return resized_HWC[:, ::-1] if flipped else resized_HWC


def resize(image_HWC: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """[H, W, C] uint8 in another size by antialiased bicubic interpolation.

    torch's uint8 kernel: Pillow's filter, on photographs 0.2 levels from it on average, in a fifth of its time
    (500 x 375 to 224 x 224 pixels: 0.25 ms against 1.2, AMD EPYC; DALI's operator for CPUs: 2.1).
    """
    # A copy, contiguous and writable: of a view torch would lay out the result in planes.
    image_1CHW = torch.from_numpy(np.array(image_HWC)).permute(2, 0, 1)[None]
    resized_1CHW = F.interpolate(image_1CHW, image_size, mode="bicubic", antialias=True)
    return resized_1CHW[0].permute(1, 2, 0).numpy()


def _batch(batch: MicroBatch, images: list[np.ndarray], source: Source, fill: Callable, device: torch.device) -> Batch:
    def copy(images_BHWC: torch.Tensor, stream: object) -> None:
        if stream is None:
            np.stack(images, out=images_BHWC.numpy())
            return
        # Stacked right into pinned memory: pinning a pageable tensor would copy it once more.
        pinned_BHWC = torch.empty(images_BHWC.shape, dtype=torch.uint8, pin_memory=True)
        np.stack(images, out=pinned_BHWC.numpy())
        images_BHWC.copy_(pinned_BHWC, non_blocking=True)

    return make_batch(fill(copy), batch, source, device)
