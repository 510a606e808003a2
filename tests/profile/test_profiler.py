"""A tiny run that is profiled: its files, its table, and that it trains as one that is not."""

import dataclasses
import gzip
import json
import re

import pytest
import torch
from tiny import TINY, images, tiny_config, total_loss

from ccmim_fast.build.model import build_model
from ccmim_fast.checkpoints import io
from ccmim_fast.engine.build import build_step
from ccmim_fast.engine.dry_run import count_flops
from ccmim_fast.engine.pretraining import Pretraining, fit
from ccmim_fast.errors import ConfigError
from ccmim_fast.profile import profiler as profile
from ccmim_fast.profile.meter import Meter, flop_counter
from ccmim_fast.profile.profiler import ADAMW_BYTES, WARM_UP, Profile, check_room, make_table, markdown
from ccmim_fast.ranks.session import Session

STEPS, BATCH = 2, 4
CPU = torch.device("cpu")


def config_for(run, **train):
    settings = {"batch_size": BATCH, "epochs": 1, "device": "cpu", "precision": "fp32", "attention": "sdpa", **train}
    return dataclasses.replace(
        TINY,
        run=dataclasses.replace(TINY.run, dir=str(run), log_every=1, tensorboard=False),
        data=dataclasses.replace(
            TINY.data, source="shapes", samples=8 * BATCH, root=str(run.parent / "images"), loader="torch"
        ),
        train=dataclasses.replace(TINY.train, **settings),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Eight steps, of which the fourth and the fifth are profiled."""
    run = tmp_path_factory.mktemp("profiled") / "run"
    fit(config_for(run, profile=STEPS))
    return run


@pytest.fixture(scope="module")
def table(run):
    return json.loads((run / "profile" / "table.json").read_text())


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_trace_holds_the_operators_of_the_profiled_steps(run):
    with gzip.open(run / "profile" / "trace.json.gz", "rt") as file:
        names = [e["name"] for e in json.load(file)["traceEvents"] if e.get("cat") in ("cpu_op", "user_annotation")]
    assert names.count("Optimizer.step#AdamW.step") == STEPS
    assert names.count(profile.DATA_WAIT) == STEPS
    assert {"aten::addmm", "aten::_fused_adamw_", profile.PROFILED} <= set(names)


def test_shares_sum_to_one(table):
    assert sum(row["share"] for row in table["kinds"]) == pytest.approx(1, abs=1e-9)
    assert sum(row["ms"] for row in table["kinds"]) == pytest.approx(table["ms_per_step"])
    assert {"matmul", "attention", "elementwise", "optimizer", "idle"} <= {row["kind"] for row in table["kinds"]}


def test_arithmetic_is_what_torch_counts(table):
    model = build_model(tiny_config(train={"attention": "sdpa"})).train()
    images_BHWC = images(BATCH)
    with flop_counter() as counter:
        total_loss(model, model(images_BHWC, torch.arange(BATCH), 0), images_BHWC, TINY).total.backward()
    counted = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    attention = sum(flops for op, flops in counted.items() if "attention" in op)
    assert attention > 0
    assert table["flops_per_step"]["attention"] == attention
    # The contrastive loss alone does not grow with the batch as the count over two images says.
    assert table["flops_per_step"]["matmul"] == pytest.approx(counter.get_total_flops() - attention, rel=1e-4)


@pytest.mark.parametrize("asking", [1, 37])
def test_attention_of_xformers_is_counted_by_head(asking):
    """Products of the forward pass: 2 of [T, H] x [H, S] for each of N heads; backward it is 2.5 times that."""
    q_BTNH, kv_BSNH = (torch.empty(2, tokens, 3, 16, device="meta") for tokens in (asking, 37))
    aten, no_masks = torch.ops.aten, (None,) * 5
    with flop_counter() as forward:
        result = aten._efficient_attention_forward(q_BTNH, kv_BSNH, kv_BSNH, *no_masks, 0.0, 0, True)
    out_BTNH, sums, *random = result[:4]
    saved = (None, out_BTNH, None, None, asking, 37, sums, 0.0, *random)
    with flop_counter() as backward:
        aten._efficient_attention_backward(out_BTNH, q_BTNH, kv_BSNH, kv_BSNH, *saved, 0, False)
    assert forward.get_total_flops() == 2 * 2 * 3 * (2 * asking * 37 * 16)
    assert backward.get_total_flops() == 2.5 * forward.get_total_flops()


@pytest.mark.gpu
def test_on_a_gpu_kernels_tell(tmp_path):
    fit(config_for(tmp_path / "run", profile=STEPS, device="cuda", precision="auto"))
    table = json.loads((tmp_path / "run" / "profile" / "table.json").read_text())
    rows = {row["kind"]: row for row in table["kinds"]}
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1, abs=1e-9)
    assert {"matmul", "elementwise", "optimizer", "idle"} <= rows.keys()
    assert not any(part["name"].startswith("aten::") for row in rows.values() for part in row["names"])


def test_floors(table):
    rows = {row["kind"]: row for row in table["kinds"]}
    rate = table["matmul_flops_per_second"]
    for kind in ("matmul", "attention"):
        assert rows[kind]["floor_ms"] == pytest.approx(table["flops_per_step"][kind] / rate * 1e3)
    weights = sum(p.numel() for p in build_model(TINY).parameters() if p.requires_grad)
    assert table["optimizer_bytes_per_step"] == ADAMW_BYTES * weights
    floor = ADAMW_BYTES * weights / table["memory_bytes_per_second"] * 1e3
    assert rows["optimizer"]["floor_ms"] == pytest.approx(floor)
    assert rows["idle"]["floor_ms"] is None
    for row in rows.values():
        assert row["over_floor_ms"] == pytest.approx(row["ms"] - (row["floor_ms"] or 0))


def test_the_largest_loss_is_named(run, table):
    worst = max(table["kinds"], key=lambda row: row["over_floor_ms"])
    assert re.fullmatch(rf"Largest loss: {worst['kind']}, [\d.]+ ms per step .*%.* ms\.", table["sentence"])
    lines = (run / "profile" / "table.md").read_text().splitlines()
    assert lines[-1] == table["sentence"]
    assert sum(line.startswith("| ") for line in lines) == 1 + len(table["kinds"])


def test_the_table_is_printed_once(tmp_path, capsys):
    fit(config_for(tmp_path / "run", profile=1, epochs=2))
    printed = capsys.readouterr().out
    assert printed.count("Largest loss:") == 1
    assert (tmp_path / "run" / "profile" / "table.md").read_text() in printed


def test_the_run_is_the_same_without(run, tmp_path):
    """Losses of every step and the weights, bit for bit."""
    fit(config_for(tmp_path / "run"))
    assert not (tmp_path / "run" / "profile").exists()
    assert losses(run) == losses(tmp_path / "run")
    assert len(losses(run)) == 8
    states = [io.newest(folder / "checkpoints").state["model"] for folder in (run, tmp_path / "run")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def profile_of(tmp_path, steps, rank=0):
    here = Session(rank, 2, CPU)
    step = build_step(config_for(tmp_path / "run"), Session(0, 1, CPU))
    meter = Meter(4, here, count_flops(step), step.precision.dtype)
    return Profile(steps, here, tmp_path, meter, torch.nn.Linear(2, 2), step.precision, 4, print)


@pytest.mark.parametrize(("steps", "rank"), [(0, 0), (2, 1)])
def test_off_and_other_ranks_get_their_batches_untouched(tmp_path, steps, rank):
    batches = [1, 2, 3]
    assert profile_of(tmp_path, steps, rank).watch(batches) is batches


@pytest.mark.parametrize("count", [WARM_UP + 2, 9])
def test_every_batch_passes_once_and_in_order(tmp_path, count):
    profiled = profile_of(tmp_path, 2)
    profiled.meter._steps = 5
    seen = [torch.ones(8).add(number).sum().item() for number in profiled.watch(range(count))]
    assert seen == [8.0 * (number + 1) for number in range(count)]
    assert (tmp_path / "profile" / "table.md").exists()
    # The time the table took is no training: the meter began anew.
    assert profiled.meter._steps == 0


def test_a_step_that_fails_leaves_no_table(tmp_path, monkeypatch):
    train = Pretraining.train

    def failing(self, batches, step, seen):
        if step == WARM_UP + 1:
            raise RuntimeError("planted")
        return train(self, batches, step, seen)

    monkeypatch.setattr(Pretraining, "train", failing)
    with pytest.raises(RuntimeError, match="planted"):
        fit(config_for(tmp_path / "run", profile=STEPS))
    assert not (tmp_path / "run" / "profile").exists()
    torch.profiler.profile().__enter__().__exit__(None, None, None)


@pytest.mark.parametrize("left", [0, WARM_UP, WARM_UP + 1, 9])
def test_the_steps_left_bound_those_profiled(left):
    most = max(0, left - WARM_UP)
    check_room(0, left)
    if most:
        check_room(most, left)
    with pytest.raises(ConfigError, match=rf"train\.profile={most + 1}: .* has {left} left; nearest valid is {most}$"):
        check_room(most + 1, left)


def test_a_run_too_short_is_refused_before_its_first_step(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.profile=6: .*nearest valid is 5"):
        fit(config_for(tmp_path / "run", profile=6))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def made_table(**milliseconds):
    spent = {(kind.replace("_", " "), f"name of {kind}"): ms * 2e3 for kind, ms in milliseconds.items()}
    measured = {
        "facts": {"torch": "2", "device": "none", "precision": "fp32", "threads": 1},
        "steps": 2,
        "images_per_step": 16,
        "flops_per_step": {"matmul": 30_000, "attention": 5_000},
        "optimizer_bytes_per_step": 4_000,
        "matmul_flops_per_second": 1e6,
        "memory_bytes_per_second": 1e6,
    }
    return make_table(spent, measured)


def test_the_loss_is_what_is_over_the_floor_not_what_takes_longest():
    table = made_table(matmul=50, attention=30, optimizer=10, data_wait=10)
    sentence = "Largest loss: attention, 25.0 ms per step above its floor of 5.0 ms, 25% of the step's 100.0 ms."
    assert table["sentence"] == sentence
    assert table["mfu"] == pytest.approx(0.35)
    assert table["ms_per_step"] == pytest.approx(100)
    assert "| attention | 30.0 | 30.0% | 5.0 | 25.0 | `name of attention` 30.0 |" in markdown(table)


def test_without_a_floor_all_of_the_time_is_lost():
    table = made_table(matmul=50, attention=10, data_wait=40)
    assert table["sentence"].startswith("Largest loss: data wait, 40.0 ms per step with no floor below it, 40%")
    assert "| data wait | 40.0 | 40.0% | - | 40.0 |" in markdown(table)


def test_names_of_kernels_do_not_break_the_table():
    name = "void at::native::vectorized_elementwise_kernel<4, at::native::(anonymous namespace)::f(a|b)" + "x" * 99
    line = profile._line(profile._row("elementwise", {("elementwise", name): 1.0}, 1, 0.001, None))
    assert line.count("|") == 7
    assert "`vectorized_elementwise_kernel<4, f(a/b)xxx" in line
