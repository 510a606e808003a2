"""Pillow decodes the images here and torch resizes them: this loader runs everywhere and is the reference."""

# N samples, B batch, H height, W width, C channels

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from ccmim_fast.data.build import Loader
from ccmim_fast.data.index.bad_samples import BadSamples
from ccmim_fast.data.source import Source, usable_count, usable_ids
from ccmim_fast.data.stream.batch import Batch, make_batch, to_device
from ccmim_fast.data.stream.plan import MicroBatch
from ccmim_fast.data.stream.prefetch import attempted, load_with_fallback, prefetch
from ccmim_fast.data.threads import thread_count


class TorchLoader(Loader):
    """This loader decodes images of any number of channels by Pillow and resizes them by torch."""

    def stream(self, cursor: int) -> Iterator[Batch]:
        source, buffers = self.plan.source, self.buffers()
        load_one = partial(load_crop, source, image_size=self._image_size)
        load = partial(load_with_fallback, load_one, plan=self.plan, bad_samples=self.bad_samples)
        for samples, images in prefetch(load, self.plan.micro_batches(cursor), self._threads):
            yield make_batch(buffers.fill(partial(_stack, images)), samples, source, self._device)


def evaluation_batches(
    source: Source,
    image_size: tuple[int, int],
    batch_size: int,
    device: torch.device,
    workers: int = 0,
    central: float = 0.0,
    part: tuple[int, int] = (0, 1),
    bad_samples: BadSamples | None = None,
) -> Iterator[Batch]:
    """Yield every usable image once, in the order of the ids, without augmentation; the last batch may be smaller.

    `central`: crop the largest central part that has the aspect of `image_size`, with sides scaled by this factor:
    0.875 equals a resize of the shorter side to 256 and a central crop of 224. 0: the whole image. `part` (k, n): yield
    the images k, k + n, k + 2 n, ... only. An image that cannot be decoded is left out, and recorded in `bad_samples`,
    which raises DataError if it allows no more.
    """
    first, step = part
    bad_samples = bad_samples or BadSamples(source, "error", 1.0)

    def micro_batches() -> Iterator[MicroBatch]:
        positions_P = np.arange(first, usable_count(source), step)
        for start in range(0, len(positions_P), batch_size):
            ids_B = usable_ids(source, positions_P[start : start + batch_size])
            sizes_B2 = source.sizes_N2[ids_B].astype(np.int64)
            boxes_B4 = np.concatenate([np.zeros_like(sizes_B2), sizes_B2], axis=1)
            if central:
                boxes_B4 = central_boxes(sizes_B2, image_size, central)
            yield MicroBatch(ids_B, np.zeros_like(ids_B), boxes_B4, np.zeros(len(ids_B), dtype=bool))

    load_one = partial(load_crop, source, image_size=image_size)

    def load(sample: MicroBatch) -> tuple[MicroBatch, np.ndarray | None]:
        image, reason = attempted(load_one, sample, sample.ids_B.item(), bad_samples)
        return (sample if reason is None else sample.part(0, 0)), image

    for samples, images in prefetch(load, micro_batches(), thread_count(workers)):
        if shown := [image for image in images if image is not None]:
            yield make_batch(to_device(np.stack(shown), device), samples, source, device)


def central_boxes(sizes_B2: np.ndarray, image_size: tuple[int, int], share: float = 1.0) -> np.ndarray:
    """Return central boxes [B, 4] with the aspect of `image_size`: `share` of the sides of the largest one."""
    sides_2 = np.array(image_size)
    largest_B1 = (sizes_B2 / sides_2).min(axis=1, keepdims=True)
    cut_B2 = np.clip(np.rint(share * largest_B1 * sides_2).astype(np.int64), 1, sizes_B2)
    return np.concatenate([(sizes_B2 - cut_B2) // 2, cut_B2], axis=1)


def load_crop(source: Source, sample: MicroBatch, image_size: tuple[int, int]) -> np.ndarray:
    """Decode, crop and resize a micro-batch of one: [H, W, C] as the source's. Raises DataError naming the image."""
    image_HWC = source.decode(sample.ids_B.item())
    return crop_and_resize(image_HWC, sample.boxes_B4[0], sample.flips_B.item(), image_size)


def crop_and_resize(image_HWC: np.ndarray, box_4: np.ndarray, flipped: bool, image_size: tuple[int, int]) -> np.ndarray:
    """Crop to a box (y, x, height, width), `resize` the crop, and mirror it where `flipped`.

    The crop comes first: pixels outside the box do not influence the result, as if only the box had been decoded.
    """
    y, x, height, width = box_4.tolist()
    resized_HWC = resize(image_HWC[y : y + height, x : x + width], image_size)
    return resized_HWC[:, ::-1] if flipped else resized_HWC


def resize(image_HWC: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Resize [H, W, C] uint8 or float32 by antialiased bicubic interpolation; float32 is neither rounded nor cut off.

    torch's uint8 kernel has Pillow's filter, differs from Pillow by 0.2 levels on average on photographs, and takes a
    fifth of the time (500 x 375 to 224 x 224 pixels: 0.25 ms against 1.2, AMD EPYC; DALI's operator for CPUs: 2.1).
    """
    # A contiguous, writable copy: for a view torch would lay out the result in planes.
    image_1CHW = torch.from_numpy(np.array(image_HWC)).permute(2, 0, 1)[None]
    resized_1CHW = F.interpolate(image_1CHW, image_size, mode="bicubic", antialias=True)
    return resized_1CHW[0].permute(1, 2, 0).numpy()


def _stack(images: list[np.ndarray], images_BHWC: torch.Tensor, stream: object) -> None:
    """Copy images [H, W, C] to a tensor; `stream` is None on a CPU."""
    if stream is None:
        np.stack(images, out=images_BHWC.numpy())
        return
    # The images are stacked in pinned memory at once: pinning a pageable tensor would copy it once more.
    pinned_BHWC = torch.empty(images_BHWC.shape, dtype=images_BHWC.dtype, pin_memory=True)
    np.stack(images, out=pinned_BHWC.numpy())
    images_BHWC.copy_(pinned_BHWC, non_blocking=True)
