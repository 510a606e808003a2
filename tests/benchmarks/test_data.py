"""The benchmark of the loaders: every contender gives batches, and the figures are those of its rounds."""

import argparse

import data
import pytest


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    options = argparse.Namespace(work=tmp_path_factory.mktemp("work"), root=None, images=12, batch=4, image_size=32)
    options.threads, options.device = 1, "cpu"
    data.prepare(options)
    return options


@pytest.mark.parametrize("name", [data.PEER, *data.OURS, data.READING, data.PYTHON])
def test_every_contender_gives_batches(options, name):
    stream = data.batches(name, options)
    for _ in range(4):
        batch = next(stream)
        images = batch if name == data.PEER else batch[0] if name in (data.READING, data.PYTHON) else batch.images_BHWC
        assert len(images) == 4
    stream.close()


def test_figures_and_page():
    rates = {data.PEER: [100, 200], "dali, files": [300, 300], "dali, tars": [270, 330]}
    rates |= {"torch, files": [100, 100], "torch, tars": [90, 90], data.READING: [9, 9], data.PYTHON: [9, 9]}
    rows = [
        {
            "name": name,
            "ours": name != data.PEER,
            "images_per_second": data.over_rounds(found),
            "ratio": data.over_rounds([rate / peer for rate, peer in zip(found, rates[data.PEER])]),
            "cpu_ms": data.over_rounds(
                [0.2, 0.2] if name == data.READING else [0.1, 0.1] if name == data.PYTHON else [2.0, 2.0]
            ),
        }
        for name, found in rates.items()
    ]
    found = data.summary(rows)
    assert found == pytest.approx(
        {
            "dali_over_torchvision": 2.25,
            "tars_over_files_dali": 1.0,
            "tars_over_files_torch": 0.9,
            "python_share_of_cpu": 0.05,
            "reading_share_of_cpu": 0.1,
        }
    )
    page = data.body(rows, found)
    assert "DALI from files is 2.25 times torchvision" in page
    assert "takes 5.0%" in page
