"""Average precision as COCO defines it. The only file that imports torchmetrics."""

# N objects, H height, W width

from collections.abc import Iterable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ccmim_fast.evaluation.detection.instances import Instances
from ccmim_fast.ranks.session import broadcast

FIGURES = {"box AP": "bbox_map", "box AP50": "bbox_map_50", "box AP75": "bbox_map_75"}
FIGURES |= {"mask AP": "segm_map", "mask AP50": "segm_map_50", "mask AP75": "segm_map_75"}


def average_precision(pairs: Iterable[tuple[dict[str, Tensor], Instances]]) -> dict[str, float]:
    """Return the figures, shares of 1, over the images of all ranks; the same on each.

    Of boxes and of masks: the mean over thresholds of overlap from 0.5 to 0.95 in steps of 0.05 (AP), and at 0.5 and
    0.75; the mean over the classes that there are; at most 100 objects an image. `pairs` are, of each image of this
    rank, what was found (boxes [N, 4], scores [N], labels [N] from 1 on, masks [N, H, W] bool) and what there is.
    """
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision(
        iou_type=("bbox", "segm"),
        backend="faster_coco_eval",
        # COCO's; torchmetrics rounds its own to float32, and an overlap of 0.6 is below 0.6.
        iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
        rec_thresholds=np.linspace(0, 1, 101).tolist(),
        # Its own way of gathering asks that every rank has as many images.
        sync_on_compute=False,
    )
    for found, objects in pairs:
        truth = {
            "boxes": torch.from_numpy(objects.boxes_N4),
            "labels": torch.from_numpy(objects.labels_N) + 1,
            "masks": torch.from_numpy(objects.masks_NHW),
            "iscrowd": torch.from_numpy(objects.crowd_N).long(),
        }
        metric.update([{name: value.cpu() for name, value in found.items()}], [truth])
    if dist.is_initialized():
        # The first rank is given what the others have.
        state, is_first = metric.metric_state, dist.get_rank() == 0
        shares = [None] * dist.get_world_size() if is_first else None
        dist.gather_object(state, shares)
        if not is_first:
            return broadcast(None)
        for name in state:
            setattr(metric, name, [row for share in shares for row in share[name]])
    values = metric.compute()
    return broadcast({name: float(values[key]) for name, key in FIGURES.items()})
