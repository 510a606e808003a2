"""These sources know the objects in their images: box, class and mask of each."""

# N objects, H height, W width

from typing import NamedTuple, Protocol

import numpy as np

from ccmim_fast.data.made.shapes import ShapesSource
from ccmim_fast.data.source import Source


class Instances(NamedTuple):
    """This tuple describes the objects of an image."""

    boxes_N4: np.ndarray  # float32 x0, y0, x1, y1 in pixels, the last two exclusive
    labels_N: np.ndarray  # int64 indices into the source's `class_names`
    masks_NHW: np.ndarray  # bool
    crowd_N: np.ndarray  # bool, regions of many objects: no one trains on them, and what is found there is no mistake


class InstanceSource(Source, Protocol):
    """A `Source` whose objects are known; `excluded_X` are the images without any to train on."""

    def instances(self, index: int) -> Instances:
        """Return the objects of one image. Raises DataError naming the image."""
        ...


class ShapesInstances(ShapesSource):
    """Images made by code, whose one object is known to the pixel; an `InstanceSource`."""

    def instances(self, index: int) -> Instances:
        y0, x0, y1, x1 = self.box(index)
        mask_HW = np.array(self.mask(index))  # the cache is read-only, which torch does not like
        return Instances(
            np.array([[x0, y0, x1, y1]], dtype=np.float32),
            self.labels_N[index : index + 1],
            mask_HW[None],
            np.zeros(1, dtype=bool),
        )
