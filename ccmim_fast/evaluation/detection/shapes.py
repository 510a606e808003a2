"""Images made by code, whose one object is known to the pixel."""

import numpy as np

from ccmim_fast.data.made.shapes import ShapesSource
from ccmim_fast.evaluation.detection.instances import Instances


class ShapesInstances(ShapesSource):
    """`ShapesSource` as an `InstanceSource`."""

    def instances(self, index: int) -> Instances:
        """See `InstanceSource`."""
        y0, x0, y1, x1 = self.box(index)
        mask_HW = np.array(self.mask(index))  # the cache is read-only, which torch does not like
        return Instances(
            np.array([[x0, y0, x1, y1]], dtype=np.float32),
            self.labels_N[index : index + 1],
            mask_HW[None],
            np.zeros(1, dtype=bool),
        )
