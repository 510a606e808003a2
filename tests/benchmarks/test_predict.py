"""The time that is predicted of a step."""

import pytest


def test_seconds(module):
    predict = module("predict")
    gpu = predict.Gpu("made up", 90, 80.0, products=100.0, attention=10.0, bandwidth=1000.0)
    counts = predict.Counts(images=4, launches=10, products=200.0, attention=5.0, bytes=500.0, compiled=True)
    took = predict.seconds(counts, gpu)
    assert took == {"products": 2.0, "attention": 0.5, "bytes": 0.5, "launches": pytest.approx(2.5e-5), "step": 3.0}
    # A host that launches for longer than the device works decides.
    slow = predict.seconds(counts._replace(launches=10**6, compiled=False), gpu)
    assert slow["step"] == slow["launches"] == pytest.approx(6.0)


def test_a_row_has_a_cell_for_each_head(module):
    predict = module("predict")
    counts = predict.Counts(256, 700, 1e13, 1e12, 1e11, True)
    assert len(predict.row("step", counts, predict.GPUS["h200"])) == len(predict.HEADER)
