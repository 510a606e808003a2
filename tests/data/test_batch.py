"""The parts of a batch besides the pixels."""

import numpy as np
import torch

from ccmim_fast.data.index.bad_samples import BadSamples
from ccmim_fast.data.source import NOTHING_EXCLUDED
from ccmim_fast.data.stream.plan import Plan
from ccmim_fast.data.stream.torch_loader import TorchLoader, evaluation_batches


class Ramps:
    """Images of many sizes whose red says how far down a pixel lies, and whose green how far right."""

    channels, dtype, labels_N, class_names, fingerprint = 3, np.dtype(np.uint8), None, (), "ramps"
    excluded_X = NOTHING_EXCLUDED

    def __init__(self):
        self.sizes_N2 = np.random.default_rng(0).integers(100, 300, (32, 2)).astype(np.int32)

    def __len__(self):
        return len(self.sizes_N2)

    def name(self, index):
        return str(index)

    def decode(self, index):
        height, width = self.sizes_N2[index]
        image = np.zeros((height, width, 3), dtype=np.uint8)
        image[..., 0] = np.rint(255 * (np.arange(height) + 0.5) / height)[:, None]
        image[..., 1] = np.rint(255 * (np.arange(width) + 0.5) / width)
        return image


def test_boxes_say_where_the_pixels_come_from():
    plan = Plan(Ramps(), seed=1, global_batch=32, flip=True)
    loader = TorchLoader(plan, BadSamples(plan.source, "error", 0.0), (48, 64), 1, torch.device("cpu"))
    batch = next(loader.stream(0))
    assert batch.boxes_B4.dtype == torch.float64
    mirrored = batch.boxes_B4[:, 3] < 0
    assert 0 < int(mirrored.sum()) < 32
    y, x, height, width = (column[:, None] for column in batch.boxes_B4.T)
    down = y + height * (torch.arange(48) + 0.5) / 48
    right = x + width * (torch.arange(64) + 0.5) / 64
    inner = slice(3, -3)  # off the edges, where the filter has a side only
    red, green = (batch.images_BHWC[..., channel].double() for channel in (0, 1))
    torch.testing.assert_close(red[:, inner, 32], 255 * down[:, inner], rtol=0, atol=2.5)
    torch.testing.assert_close(green[:, 24, inner], 255 * right[:, inner], rtol=0, atol=2.5)


def test_ids_are_on_the_host_too():
    plan = Plan(Ramps(), seed=1, global_batch=8)
    loader = TorchLoader(plan, BadSamples(plan.source, "error", 0.0), (48, 64), 1, torch.device("cpu"))
    batch = next(loader.stream(0))
    assert batch.host_ids_B.tolist() == batch.ids_B.tolist() == plan.step_ids(0, range(1)).reshape(-1).tolist()


def test_evaluation_shows_whole_images():
    batch = next(evaluation_batches(Ramps(), (32, 32), 5, torch.device("cpu")))
    assert torch.equal(batch.boxes_B4, torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 5, dtype=torch.float64))
