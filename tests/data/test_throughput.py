"""The figures of `ccmim data bench`: which there are, never how high they are."""

import numpy as np
import pytest
import tifffile
import torch

from ccmim_fast.data import throughput as module
from ccmim_fast.data.index.indexed import open_images
from ccmim_fast.data.made.shapes import ShapesSource
from ccmim_fast.data.stream import dali_loader
from ccmim_fast.data.stream.plan import Plan
from ccmim_fast.data.throughput import StageTimes, Throughput, measure_stage_times, measure_throughput
from ccmim_fast.errors import MachineError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(dali_loader, "is_installed", lambda: False)


@pytest.mark.usefixtures("cache")
def test_rates_of_files(photo_folder):
    rates = measure_throughput(open_images(str(photo_folder)), 32, batch=8, images=16, workers=2, device="cpu")
    assert set(rates.loaders) == {"torch"}
    assert rates.loaders["torch"] > 0
    assert min(rates.stages) > 0
    assert rates.copy_ms > 0
    assert rates.threads == 2


@pytest.mark.usefixtures("cache")
def test_a_batch_is_no_larger_than_the_set(tmp_path):
    (tmp_path / "arrays").mkdir()
    for seed in range(3):
        pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 5), dtype=np.uint8)
        np.save(tmp_path / f"arrays/{seed}.npy", pixels)
    rates = measure_throughput(open_images(str(tmp_path / "arrays"), channels=5), 16, 64, 1, 1, "cpu")
    assert rates.loaders["torch"] > 0
    assert min(rates.stages) > 0


@pytest.mark.usefixtures("cache")
def test_a_device_that_is_missing_is_one_line(photo_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MachineError, match="--device=cuda: no CUDA device"):
        measure_throughput(open_images(str(photo_folder)), 32, 8, 8, 1, "cuda")


@pytest.mark.usefixtures("cache")
def test_each_stage_is_timed_by_itself(photo_folder, monkeypatch):
    source = open_images(str(photo_folder))
    now, encoded, decoded, crop = [0.0], source.encoded, source.decoded, module.crop_and_resize

    def lasting(seconds, function):
        def run(*arguments):
            now[0] += seconds
            return function(*arguments)

        return run

    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(source, "encoded", lasting(0.5, encoded))
    monkeypatch.setattr(source, "decoded", lasting(0.03, decoded))
    monkeypatch.setattr(module, "crop_and_resize", lasting(0.002, crop))
    # PNG files among them: what is read is the file, though loaders get its pixels.
    found = measure_stage_times(Plan(source, 0, 4), (32, 32), 22)
    assert found == pytest.approx(StageTimes(500.0, 30.0, 2.0))


def test_made_images_are_not_read():
    found = measure_stage_times(Plan(ShapesSource(0, 8, (32, 32)), 0, 4), (16, 16), 4)
    assert found.read == 0
    assert found.decode > 0
    assert found.crop > 0


@pytest.mark.usefixtures("cache")
def test_images_that_fail_are_left_out(tmp_path, write_image):
    (tmp_path / "flat").mkdir()
    for seed in range(3):
        write_image(tmp_path / f"flat/{seed}.png", seed=seed)
    source = open_images(str(tmp_path / "flat"))
    (tmp_path / "flat/0.png").unlink()
    assert min(measure_stage_times(Plan(source, 0, 1), (16, 16), 3)) > 0
    (tmp_path / "flat/1.png").unlink()
    (tmp_path / "flat/2.png").unlink()
    assert measure_stage_times(Plan(source, 0, 1), (16, 16), 3) == (0, 0, 0)


def test_advice_fits_the_images(tmp_path):
    """Made images cannot be sharded; arrays are neither made smaller nor decoded by DALI."""
    for name, pixels in (("five", np.zeros((8, 9, 5), np.uint8)), ("deep", np.zeros((8, 9, 3), np.uint16))):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "a.npy", pixels)
    sources = [ShapesSource(0, 8, (32, 32)), open_images(str(tmp_path / "five"), 5)]
    tifffile.imwrite(tmp_path / "deep/a.tif", np.zeros((8, 9, 3), np.uint16), photometric="rgb")
    for source in (*sources, open_images(str(tmp_path / "deep"), 3)):
        for slowest in range(3):
            advice = StageTimes(*(9.0 if stage == slowest else 1.0 for stage in range(3))).advice(source)
            assert "DALI" not in advice
            assert "--side" not in advice
            assert "shard" not in advice or source is not sources[0]


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (StageTimes(9.0, 1.0, 2.0), "into tars on a faster disk"),
        (StageTimes(1.0, 9.0, 2.0), "let DALI decode them"),
        (StageTimes(1.0, 2.0, 9.0), "give the run more cores"),
    ],
)
def test_advice_is_about_the_slowest(photo_folder, stages, words):
    source = open_images(str(photo_folder))
    advice = stages.advice(source)
    assert words in advice
    assert advice.startswith(f"milliseconds an image: read {stages.read:.1f}, decode {stages.decode:.1f}")
    lines = Throughput(stages, 0.5, {"torch": 123.4, "dali": 567.8}, 4, source).lines()
    assert lines[-1] == advice
    assert lines[0].split() == ["read", f"{stages.read:.2f}", "ms", "an", "image,", "one", "thread"]
    assert "4 threads could give 333 img/s without DALI" in lines
    assert [line.split()[:2] for line in lines[-3:-1]] == [["torch", "123"], ["dali", "568"]]
