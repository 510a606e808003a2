"""What a run does about its images: goes on anywhere, leaves out what fails, and says what it waits for."""

import dataclasses
import json
import os
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny import TINY

from ccmim_fast.data.stream.torch_loader import TorchLoader
from ccmim_fast.data.throughput import StageTimes
from ccmim_fast.engine import health
from ccmim_fast.engine.pretraining import fit
from ccmim_fast.errors import DataError
from ccmim_fast.export.embed import embed_folder
from ccmim_fast.report.snapshots import take_snapshots


@pytest.fixture
def photos(tmp_path):
    """Twenty small JPEG files."""
    root = tmp_path / "photos"
    root.mkdir()
    for number in range(20):
        Image.effect_noise((60, 40 + number), 80).convert("RGB").save(root / f"{number:02d}.jpg")
    return root


@pytest.fixture
def shown(monkeypatch):
    """(epoch, id) of every sample that a loader yields, in order."""
    found = []
    stream = TorchLoader.stream

    def recorded(self, cursor):
        for batch in stream(self, cursor):
            found.extend(zip(batch.epochs_B.tolist(), batch.ids_B.tolist()))
            yield batch

    monkeypatch.setattr(TorchLoader, "stream", recorded)
    return found


def run(folder, root, *, resume="never", allow=False, data=(), **train):
    sections = {
        "run": {
            "dir": str(folder),
            "log_every": 1,
            "save_every": 1,
            "tensorboard": False,
            "resume": resume,
            "allow_change": allow,
        },
        "data": {"root": str(root), "loader": "torch", **dict(data)},
        "train": {"epochs": 3, "batch_size": 6, "device": "cpu", "precision": "fp32", **train},
    }
    fit(
        dataclasses.replace(
            TINY, **{name: dataclasses.replace(getattr(TINY, name), **f) for name, f in sections.items()}
        )
    )
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_sample_once_an_epoch_with_another_batch_after_resuming(tmp_path, photos, shown):
    run(tmp_path / "run", photos, max_steps=4)
    assert len(shown) == 24
    records = run(tmp_path / "run", photos, resume="auto", allow=True, batch_size=5, accumulate=1)
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 13))
    for epoch in range(3):
        assert sorted(number for e, number in shown if e == epoch) == list(range(20))
    assert [e for e, _ in shown] == [0] * 20 + [1] * 20 + [2] * 20 + [3] * 4  # the last step is a whole one
    assert records[-1]["epoch"] == pytest.approx(64 / 20)


def test_an_image_that_fails_is_left_out_told_and_counted(tmp_path, photos, shown, capsys):
    from ccmim_fast.data.index.indexed import open_images

    open_images(str(photos))
    broken = photos / "07.jpg"
    os.truncate(broken, broken.stat().st_size // 2)
    records = run(tmp_path / "run", photos, data={"max_bad": 0.1}, epochs=2)
    assert 7 not in {number for _, number in shown}
    assert [r["sample"] for r in records if r["kind"] == "skipped"] == [7]
    said = capsys.readouterr().out
    assert said.count("sample 7 is left out: ") == 1
    assert "1 of 20 samples could not be shown" in said
    with pytest.raises(DataError, match=r"07\.jpg.*data\.on_error=skip goes on without it"):
        run(tmp_path / "strict", photos, data={"on_error": "error"})


def test_what_the_set_leaves_out_is_told_first_recorded_and_counted(tmp_path, photos, shown, capsys):
    (photos / "x.heic").write_bytes(b"x")
    (photos / "deeper").mkdir()
    (photos / "00.jpg").rename(photos / "deeper/00.jpg")  # used, although the others have no class
    records = run(tmp_path / "run", photos, data={"max_bad": 0.05}, epochs=1)
    assert {number for _, number in shown} == set(range(20))
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("1 left out: a format that is not read; ")
    assert line.endswith(f"the first '{photos}/x.heic'")
    (told,) = [record for record in records if record["kind"] == "left_out"]
    assert [(note["count"], note["first"]) for note in told["notes"]] == [(1, f"{photos}/x.heic")]
    with pytest.raises(DataError, match=r"1 of 21 samples cannot be used, more than data\.max_bad=0\.04"):
        run(tmp_path / "strict", photos, data={"max_bad": 0.04})
    assert capsys.readouterr().out.startswith("1 left out: ")


def test_other_ranks_tell_what_failed_and_do_not_advise(monkeypatch):
    monkeypatch.setattr(health, "measure_stage_times", lambda *_: pytest.fail("not for one rank of many"))
    loader = SimpleNamespace(bad_samples=SimpleNamespace(reasons={3: "cut"}), plan=SimpleNamespace(source=range(9)))
    said = []
    report = health.DataReport(loader, (32, 32), said.append, metrics=None)
    report.update(7, waited=0.9)
    report.update(8, waited=0.9)
    report.close()
    assert said[0] == "step 7: sample 3 is left out: cut"
    assert [line.startswith("1 of 9 samples") for line in said[1:]] == [True]


def test_another_set_of_images_is_told_when_a_run_resumes(tmp_path, photos, capsys):
    run(tmp_path / "run", photos, epochs=1)
    assert "not those of the checkpoint" not in capsys.readouterr().out
    (photos / "00.jpg").unlink()
    run(tmp_path / "run", photos, resume="auto", allow=True, epochs=2)
    assert "not those of the checkpoint (20 then, 19 now)" in capsys.readouterr().out


@pytest.fixture
def bands(tmp_path):
    """Twelve images of five bands of 11 bits in 16, in both layouts."""
    root = tmp_path / "bands"
    root.mkdir()
    for number in range(12):
        made = np.random.default_rng(number).integers(0, 2000, (5, 40, 48), dtype=np.uint16)
        np.save(root / f"{number}.npy", np.moveaxis(made, 0, 2) if number % 2 else made)
    return root


BANDS = {"channels": 5, "mean": (0.25,) * 5, "std": (0.14,) * 5, "loader": "auto"}


def test_images_of_16_bits_are_trained_as_they_are(tmp_path, bands, capsys):
    run(tmp_path / "run", bands, data=BANDS, max_steps=1)
    said = capsys.readouterr().out
    assert "12 images · TorchLoader · float32 pixels" in said
    assert said.count("pixels reach 1999, and 65535 is white: set --data.max_value=2047") == 1


def test_a_run_on_wide_images_goes_on_and_is_drawn_and_embedded(tmp_path, bands, capsys):
    data = BANDS | {"max_value": (2047.0,)}
    for resume in ("never", "auto"):
        run(tmp_path / "run", bands, data=data, epochs=1, resume=resume)
    assert "pixels reach" not in capsys.readouterr().out
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert all(0.5 < line["recons"] < 2 for line in lines if "recons" in line)
    (snapshot,), remarks = take_snapshots(tmp_path / "run", 2, 1)
    assert not remarks
    assert snapshot.images_BHWC.dtype == snapshot.reconstruction_BHWC.dtype == np.uint8
    assert snapshot.images_BHWC.std() > 40  # three deviations on both sides fill the screen's range
    made = embed_folder(str(tmp_path / "run"), str(bands), tmp_path / "x.npy", device="cpu")
    assert (made.images, made.width, made.left_out) == (12, 48, 0)


def test_advice_comes_once_where_steps_wait(tmp_path, photos, monkeypatch, capsys):
    stream = TorchLoader.stream

    def slow(self, cursor):
        for batch in stream(self, cursor):
            time.sleep(0.2)
            yield batch

    monkeypatch.setattr(TorchLoader, "stream", slow)
    monkeypatch.setattr(health, "measure_stage_times", lambda *_: StageTimes(1.0, 9.0, 2.0))
    run(tmp_path / "run", photos, max_steps=3)
    said = capsys.readouterr().out
    assert said.count("of the time goes by waiting for images") == 1
    assert "decode 9.0" in said
    monkeypatch.setattr(health, "WAIT", 1.1)
    run(tmp_path / "quiet", photos, max_steps=3)
    assert "waiting for images" not in capsys.readouterr().out
