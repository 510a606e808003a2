"""Average precision against cases that are counted by hand, on one process and on two of unequal shares."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from ranks_launcher import TESTS, run_ranks

from ccmim_fast.evaluation.detection.instances import Instances
from ccmim_fast.evaluation.detection.precision import average_precision

pytest.importorskip("torchmetrics")
pytest.importorskip("faster_coco_eval")

SIDE = 100


def mask_of(box):
    x0, y0, x1, y1 = box
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def there(*objects):
    """Of (box, label, crowd)."""
    boxes, labels, crowd = zip(*objects)
    masks = np.stack([mask_of(box) for box in boxes])
    return Instances(np.array(boxes, dtype=np.float32), np.array(labels), masks, np.array(crowd))


def found(*objects):
    """Of (box, label, score); a detector counts labels from 1 on."""
    boxes, labels, scores = zip(*objects) if objects else ((), (), ())
    masks = np.stack([mask_of(box) for box in boxes]) if objects else np.zeros((0, SIDE, SIDE), dtype=bool)
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64) + 1,
        "scores": torch.tensor(scores, dtype=torch.float32),
        "masks": torch.from_numpy(masks),
    }


LEFT, RIGHT, AWAY = (10, 10, 50, 50), (55, 10, 95, 50), (10, 60, 50, 90)


def test_all_found():
    figures = average_precision([(found((LEFT, 0, 0.9), (RIGHT, 1, 0.8)), there((LEFT, 0, False), (RIGHT, 1, False)))])
    assert figures == pytest.approx(dict.fromkeys(figures, 1.0))
    assert list(figures) == ["box AP", "box AP50", "box AP75", "mask AP", "mask AP50", "mask AP75"]


def test_an_overlap_of_six_tenths_counts_at_the_thresholds_below_it():
    """24 of 40 columns: overlap 0.6, right at 0.5, 0.55 and 0.6, three of ten thresholds. A second class is found."""
    narrow = (10, 10, 34, 50)
    figures = average_precision(
        [(found((narrow, 0, 0.9), (RIGHT, 1, 0.8)), there((LEFT, 0, False), (RIGHT, 1, False)))]
    )
    assert figures["box AP"] == pytest.approx((0.3 + 1) / 2)
    assert figures["box AP50"] == pytest.approx(1)
    assert figures["box AP75"] == pytest.approx(0.5)
    assert figures["mask AP"] == pytest.approx((0.3 + 1) / 2)


def test_a_mistake_that_is_surer_than_what_is_right():
    """Precision is 1/2 up to full recall; at 101 places of recall with what is found of two objects, 51 of them."""
    pairs = [(found((AWAY, 0, 0.9), (LEFT, 0, 0.8)), there((LEFT, 0, False)))]
    assert average_precision(pairs)["box AP"] == pytest.approx(0.5)
    pairs = [(found((LEFT, 0, 0.9)), there((LEFT, 0, False), (RIGHT, 0, False)))]
    assert average_precision(pairs)["box AP"] == pytest.approx(51 / 101)
    assert average_precision([(found((LEFT, 1, 0.9)), there((LEFT, 0, False)))])["box AP"] == 0
    assert average_precision([(found(), there((LEFT, 0, False)))])["box AP"] == 0


def test_what_is_found_in_a_crowd_is_no_mistake():
    inside = (12, 62, 30, 80)
    objects = there((LEFT, 0, False), (AWAY, 0, True))
    assert average_precision([(found((inside, 0, 0.9), (LEFT, 0, 0.8)), objects)])["mask AP"] == pytest.approx(1)
    objects = there((LEFT, 0, False), (AWAY, 0, False))
    assert average_precision([(found((inside, 0, 0.9), (LEFT, 0, 0.8)), objects)])["mask AP"] < 0.5


def unequal(rank, world):
    """Five images, the third without anything, the detector ever less right: the share of one rank."""
    pairs = []
    for number in range(rank, 5, world):
        shift = 3 * number
        box = (10 + shift, 10, 50 + shift, 50)
        objects = there((LEFT, number % 2, False), (RIGHT, 1, False))
        if number == 2:
            objects = Instances(*(values[:0] for values in objects))
        pairs.append((found((box, number % 2, 0.9 - number / 10), (RIGHT, 1, 0.3 + number / 10)), objects))
    return pairs


@pytest.mark.slow
def test_two_processes_of_unequal_shares_equal_one(tmp_path):
    script = (
        "import json, sys, torch.distributed as dist; from pathlib import Path;"
        f"sys.path.insert(0, {os.path.dirname(__file__)!r});"
        "from test_detection_precision import unequal; from ccmim_fast.evaluation.detection.precision import *;"
        "dist.init_process_group('gloo'); rank = dist.get_rank();"
        "figures = average_precision(unequal(rank, 2));"
        "Path(sys.argv[1], str(rank)).write_text(json.dumps(figures)); dist.destroy_process_group()"
    )
    (tmp_path / "two.py").write_text(script)
    run_ranks(2, str(tmp_path / "two.py"), str(tmp_path), PYTHONPATH=os.pathsep.join([TESTS, *sys.path]))
    alone = average_precision(unequal(0, 1))
    assert 0 < alone["box AP"] < 1
    for rank in "01":
        assert json.loads((tmp_path / rank).read_text()) == alone
