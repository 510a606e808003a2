"""The hour of faults notices a leak and a missing record; and a few seconds of it run."""

import json
import mmap
import os

import numpy as np
import pytest

TINY = ["--data.samples=64", "--data.image_size=[32,32]", "--model.patch_size=8", "--model.embed_dim=48"]
TINY += [
    "--train.epochs=4000",
    "--model.depth=2",
    "--model.num_heads=3",
    "--decoder.dim=32",
    "--train.batch_size=16",
    "--data.max_bad=0.5",
]


@pytest.fixture
def hour(module):
    return module("soak_hour")


@pytest.fixture
def samples_module(module):
    return module("soak_samples")


def life_of(samples_module, megabytes_per_hour, handles_at_end=40, minutes=10):
    """Samples of a rank whose memory wanders by some MB, as an allocator's does, and rises."""
    draw, wander, samples = np.random.default_rng(0), 0.0, []
    for i in range(30 * minutes):
        wander = 0.9 * wander + draw.normal(0, 0.3)
        memory = 300 + 200 * (i < 10) + wander + megabytes_per_hour * i / 1800
        handles = 40 if i < 15 * minutes else handles_at_end
        samples.append(samples_module.Sample(2.0 * i, 7, "rank 0", 2 * memory, memory, handles, 12, 4 * i))
    return samples


GOOD = {"exit_code": 0, "state": "done", "steps": 40, "newest_checkpoint": "step_00000040", "records_missing": []}
GOOD |= {"records_twice": 0, "records_broken": 0, "left_over_files": [], "left_over_processes": 0}
GOOD |= {"loss_first": 1.0, "loss_last": 0.8}


@pytest.mark.parametrize(("leak", "flat"), [(0, True), (-50, True), (60, False)])
def test_a_leak_is_noticed(hour, samples_module, leak, flat):
    (life,) = samples_module.lives(life_of(samples_module, leak), shortest=240, warm_up=60)
    assert life["mb_per_hour"]["rise"] == pytest.approx(leak, abs=4 * life["mb_per_hour"]["error"])
    assert life["mb_per_hour"]["error"] < 10
    # 1,000 steps are 500 seconds here.
    assert life["mb_per_1000_steps"]["rise"] == pytest.approx(life["mb_per_hour"]["rise"] * 500 / 3600)
    assert hour.verdict(GOOD, [life])["memory flat"] is flat
    assert all(so for name, so in hour.verdict(GOOD, [life]).items() if name != "memory flat")


def test_leaked_handles_are_noticed(hour, samples_module):
    (life,) = samples_module.lives(life_of(samples_module, 0, handles_at_end=43), shortest=240, warm_up=60)
    assert life["handles"] == {"first": 40, "last": 43, "max": 43}
    assert not hour.verdict(GOOD, [life])["handles flat"]


def test_short_lives_have_no_slope(samples_module):
    assert samples_module.lives(life_of(samples_module, 0, minutes=3), shortest=240, warm_up=60) == []


def test_the_error_of_a_slope_is_that_of_the_textbook_where_samples_are_independent(samples_module):
    """Over many draws, rises deviate from the true one by as much as the errors say."""
    draw, x = np.random.default_rng(0), np.arange(200.0)
    found = [samples_module.slope(x, 3 + 0.5 * x + draw.normal(0, 2, 200)) for _ in range(300)]
    rises, errors = np.array([s.rise for s in found]), np.array([s.error for s in found])
    assert rises.mean() == pytest.approx(0.5, abs=1e-3)
    assert rises.std() == pytest.approx(errors.mean(), rel=0.15)


def test_a_process_is_sampled(samples_module, tmp_path):
    before = samples_module.sample_process(os.getpid())
    files = [(tmp_path / str(i)).open("w") for i in range(5)]
    # Not from the heap, which may have as much to spare, or grow by as much for what is written.
    block = mmap.mmap(-1, 20_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(0, len(block), mmap.PAGESIZE):
        block[page] = 1
    after = samples_module.sample_process(os.getpid())
    assert after[2] == before[2] + 5
    assert after[1] - before[1] == pytest.approx(20, abs=15)  # other threads of the process allocate, too
    assert after[0] > after[1]
    block.close()
    for file in files:
        file.close()
    assert samples_module.sample_process(2**22 + 1) is None


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"exit_code": 1}, "ended complete"),
        ({"state": "stopped"}, "ended complete"),
        ({"newest_checkpoint": "step_00000030"}, "ended complete"),
        ({"records_missing": [15]}, "every record once"),
        ({"records_broken": 1}, "every record once"),
        ({"left_over_files": ["checkpoints/.new_step_00000040"]}, "nothing left over"),
        ({"left_over_processes": 1}, "nothing left over"),
        ({"loss_last": 1.1}, "the loss fell"),
    ],
)
def test_conditions_of_success(hour, changed, what):
    assert all(hour.verdict(GOOD, []).values())
    assert [name for name, so in hour.verdict({**GOOD, **changed}, []).items() if not so] == [what]


@pytest.mark.slow
def test_a_few_seconds_of_faults(module, tmp_path):
    """And the launch that ends the run; a full disk only where one may be mounted."""
    out = tmp_path / "hour"
    code = module("soak").main(["--minutes=0.05", "--kinds=nan,disk", f"--out={out}", *TINY])
    result = json.loads(out.with_suffix(".json").read_text())
    assert code == 0, result["verdict"]
    assert (result["end"]["records_missing"], result["end"]["failed"]) == ([], "")
    assert result["launches"] >= 2  # and one more where numbers stayed not finite or a busy machine lost a rank
    assert {fault["kind"] for fault in result["faults"]} & {"nan", "disk"}
    assert all(fault["led_to"] for fault in result["faults"])
    assert len({sample.split()[1] for sample in result["samples"]}) >= 3
    assert "| ended complete | yes |" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").stat().st_size > 1000
