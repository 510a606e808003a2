"""What `auto` comes to in a run: measured once, kept, recorded, the same on all ranks and after a resume."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from choice_ranks import decide_on_the_first
from ranks_launcher import run_in_ranks
from tiny import tiny_config

from ccmim_fast.autotune.decide import Decision
from ccmim_fast.autotune.table import FILE, Table, read_table
from ccmim_fast.config.schema import TeacherConfig
from ccmim_fast.engine import choices, teacher
from ccmim_fast.engine.build import build_step, prepare_step
from ccmim_fast.engine.choices import apply, choose, choose_form, run_of, to_compile
from ccmim_fast.engine.compile import compile_step, compiled_as, warm_up
from ccmim_fast.engine.dry_run import synthetic_batch
from ccmim_fast.engine.pretraining import fit
from ccmim_fast.models import block, int8, precision
from ccmim_fast.models.int8 import has_int8
from ccmim_fast.models.precision import product
from ccmim_fast.ranks.session import Session
from ccmim_kernels import dispatch

HERE = Session(0, 1, torch.device("cpu"))
LONG = 10**12  # images


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(choices, "SECONDS", 600.0)  # other work may take all of a run's own


@pytest.fixture
def never(monkeypatch):
    def measured(*_):
        raise AssertionError("measured again")

    return lambda: monkeypatch.setattr(choices, "_measured", measured)


def step_for(teacher="same", **train):
    settings = {"batch_size": 4, "precision": "fp32", **train}
    return build_step(tiny_config(train=settings, teacher={"precision": teacher}), HERE)


def test_attention_of_every_length_and_every_linear_layer():
    """16 x 24 / 8^2 patches: 7 visible tokens, 19 masked, 25 in all; decoder 25. Weights and numbers stay."""
    step = step_for()
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    state = torch.get_rng_state()
    table = choose(step, 4, HERE, LONG)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in step.model.state_dict().items())
    lengths = {name for name in table.decisions if name.startswith("attention")}
    assert lengths == {"attention 7 x 3 x 16", "attention 19 x 3 x 16", "attention 25 x 3 x 16", "attention 25 x 4 x 8"}
    assert {"linear 48 x 144", "linear 48 x 192", "linear 192 x 48", "linear 32 x 96"} <= table.decisions.keys()
    for name, decision in table.decisions.items():
        both = {"sdpa", "plain"} if name.startswith("attention") else {"torch", "onednn"}
        assert decision.milliseconds.keys() | decision.dropped.keys() == both, name
        assert decision.chosen in both
    assert table.seconds > 0
    assert step.model.encoder.blocks[0].attention == "auto"


def test_half_precision_has_no_linear_layers_to_choose():
    table = choose(step_for(precision="bf16"), 4, HERE, LONG)
    assert {name.partition(" ")[0] for name in table.decisions} == {"attention"}


@pytest.mark.parametrize("what", ["sdpa", "onednn"])
def test_a_wrong_candidate_is_dropped_after_one_line(monkeypatch, what):
    right = F.scaled_dot_product_attention
    if what == "sdpa":
        monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: right(*a, **k) * 1.001)
    else:
        monkeypatch.setattr(precision, "product", lambda *tensors: product(*tensors) * 1.001)
    table = choose(step_for(), 4, HERE, LONG)
    asked = [name for name in table.decisions if name.startswith("attention" if what == "sdpa" else "linear")]
    for name in asked:
        assert table.decisions[name].chosen == {"sdpa": "plain", "onednn": "torch"}[what]
        (line,) = (line for line in table.notes() if line.startswith(f"{name}: not {what}: result "))
        assert "\n" not in line
    assert len(asked) > 2


def test_the_step_runs_as_decided(monkeypatch):
    step, taken = step_for(), []
    attended = block._plain
    monkeypatch.setattr(block, "_plain", lambda q, k, *rest: taken.append(k.shape[1]) or attended(q, k, *rest))
    monkeypatch.setattr("ccmim_fast.models.precision._Linear.apply", lambda *a: taken.append("onednn") or F.linear(*a))
    decisions = {"attention 19 x 3 x 16": "plain", "attention 25 x 3 x 16": "sdpa", "linear 32 x 96": "onednn"}
    apply(Table({}, {name: Decision(chosen, {}, {}) for name, chosen in decisions.items()}), step)
    step([synthetic_batch(step, 4)], 1e-3)
    assert set(taken) == {19, "onednn"}


def test_a_table_is_measured_once(never):
    table = choose(step_for(), 4, HERE, LONG)
    never()
    assert choose(step_for(), 4, HERE, LONG) == table
    for other in ((step_for(), 2), (step_for(precision="bf16"), 4), (step_for(autotune="fresh"), 4)):
        with pytest.raises(AssertionError, match="measured again"):
            choose(*other, HERE, LONG)


def test_a_table_without_times_is_not_kept(monkeypatch, never):
    """As on a machine with so much other work that time runs out; nor is it told as a measurement."""
    monkeypatch.setattr(choices, "SECONDS", 0.0)
    table = choose(step_for(attention="sdpa"), 4, HERE, LONG)
    assert set(table.chosen().values()) == {"torch"}
    assert "some of them not measured" in table.notes()[0]
    never()
    with pytest.raises(AssertionError, match="measured again"):
        choose(step_for(attention="sdpa"), 4, HERE, LONG)


def test_fresh_keeps_no_table(never):
    choose(step_for(autotune="fresh"), 4, HERE, 8)
    never()
    with pytest.raises(AssertionError, match="measured again"):
        choose(step_for(), 4, HERE, LONG)


def test_off_and_short_runs_measure_nothing(never):
    never()
    assert choose(step_for(autotune="off"), 4, HERE, LONG).decisions == {}
    assert choose(step_for(), 4, HERE, 1000).decisions == {}


needs_int8 = pytest.mark.skipif(not has_int8(), reason="this CPU has no AVX-512 VNNI, or this torch no oneDNN")


@needs_int8
@pytest.mark.parametrize("chosen", ["same", "int8"])
def test_the_teacher_is_what_is_faster(monkeypatch, never, chosen):
    """It is asked once, of a teacher of enough rows; the step runs as decided, and weights and numbers stay."""
    monkeypatch.setattr(teacher, "LEAST_ROWS", 1)
    monkeypatch.setattr(teacher, "winner", lambda times: chosen)
    step = step_for("auto", attention="sdpa", recompute=True)
    state, mode = torch.get_rng_state(), step.model.training
    table = choose(step, 4, HERE, LONG)
    assert table.chosen() == {"teacher": chosen}
    assert table.decisions["teacher"].milliseconds.keys() == {"same", "int8"}
    assert torch.equal(torch.get_rng_state(), state)
    assert step.model.training == mode
    never()
    again = step_for("auto", attention="sdpa", recompute=True)
    assert again.teacher == "same"
    apply(choose(again, 4, HERE, LONG), again)
    assert again.teacher == chosen
    with pytest.raises(AssertionError, match="measured again"):
        choose(
            build_step(dataclasses.replace(again.config, teacher=TeacherConfig(precision="same")), HERE), 4, HERE, LONG
        )


@needs_int8
def test_a_teacher_that_sees_something_else_is_dropped_after_one_line(monkeypatch):
    monkeypatch.setattr(teacher, "LEAST_ROWS", 1)
    monkeypatch.setattr(int8, "_LEVELS", 3)
    table = choose(step_for("auto", attention="sdpa", recompute=True), 4, HERE, LONG)
    assert table.chosen() == {"teacher": "same"}
    assert table.notes()[1].startswith("teacher: not int8: [CLS] has cosine 0.")


def test_what_the_settings_decide_is_not_asked():
    table = choose(step_for(attention="sdpa", recompute=True), 4, HERE, LONG)
    assert table.decisions == {}


def test_every_op_of_a_step_is_seen():
    """An op whose public function is not `choosable` would never be measured."""
    asked = set()
    for target, contrast, source in (("pixels", "nce", "all"), ("hog", "moco", "first")):
        kinds = {"target": {"kind": target, "hog_cell": 4}, "contrast": {"loss": contrast}, "score": {"source": source}}
        config = tiny_config(train={"batch_size": 4}, **kinds)
        calls, _ = choices._calls(build_step(config, HERE), 2)
        asked |= {name for name in calls if " " not in name}
    kernels = {path.stem for path in (Path(dispatch.__file__).parent / "triton_impl").glob("*.py")}
    assert asked == kernels - {"__init__", "launch", "sample_partition"}  # the last one is a part of divide_tokens


def config_of(folder, **sections):
    return tiny_config(
        run={"dir": str(folder), "tensorboard": False, "log_every": 1, **sections.pop("run", {})},
        data={"source": "shapes", "samples": 8, "root": str(folder.parent / "data"), "loader": "torch"},
        optim={"warmup_epochs": 0.0},
        train={"device": "cpu", "precision": "bf16", "batch_size": 8, "epochs": 4, "autotune": "fresh"}
        | sections.pop("train", {}),
    )


def losses(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "train"]


def test_a_resumed_run_keeps_its_choices(tmp_path, monkeypatch):
    """Whatever is faster by then: the losses are those of a run that was never stopped, bit for bit."""

    def faster(name):
        names = ("attention 7 x 3 x 16", "attention 19 x 3 x 16", "attention 25 x 3 x 16", "attention 25 x 4 x 8")
        monkeypatch.setattr(choices, "_measured", lambda *_: {one: Decision(name, {}, {}) for one in names})

    faster("plain")
    fit(config_of(tmp_path / "whole"))
    fit(config_of(tmp_path / "parts", train={"max_steps": 2}, run={"save_every": 1}))
    faster("sdpa")
    fit(config_of(tmp_path / "other"))
    fit(config_of(tmp_path / "parts", run={"save_every": 1, "resume": "auto"}))
    table = read_table(tmp_path / "parts" / FILE)
    assert set(table.chosen().values()) == {"plain"}
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole") != losses(tmp_path / "other")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_all_ranks_take_the_choices_of_the_first(tmp_path, parallel):
    run_in_ranks(decide_on_the_first, 2, tmp_path, parallel)


def test_the_run_that_is_gone_on_with(tmp_path):
    run = tiny_config().run
    assert run_of(run) is None
    assert run_of(dataclasses.replace(run, dir="a", resume="auto")).name == "a"
    checkpoint = tmp_path / "b" / "checkpoints" / "step_00000002"
    assert run_of(dataclasses.replace(run, dir="a", resume=str(checkpoint))) == tmp_path / "b"


def compiled(what: str):
    """Return a step that is compiled as `auto` would on CUDA, and a table that was measured."""
    step = step_for()
    compile_step(step, what, backend="eager")
    warm_up(step, 4, 1)
    return step, Table({"device": "here"}, {"attention 7 x 3 x 16": Decision("sdpa", {"sdpa": 1.0}, {})}, 1.0)


def takes(monkeypatch, **seconds: float):
    """Let each form of the step take as many seconds; it is carried out all the same."""

    def timed(samples, until):
        return {name: [seconds.get(name, 1.0) for _ in range(4) if sample() > 0] for name, sample in samples.items()}

    monkeypatch.setattr(choices, "timed", timed)


@pytest.mark.parametrize("what", ["step", "blocks"])
@pytest.mark.parametrize("faster", ["compiled", "off"])
def test_the_faster_form_of_the_step_stays(monkeypatch, what, faster):
    step, table = compiled(what)
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    takes(monkeypatch, off=1.2 if faster == "compiled" else 0.8)
    chosen = choose_form(table, step, 4, HERE)
    assert compiled_as(step) == chosen.decisions["compile"].chosen == (what if faster == "compiled" else "off")
    assert chosen.decisions["compile"].milliseconds.keys() == {what, "off"}
    assert chosen.decisions.keys() == table.decisions.keys() | {"compile"}
    assert chosen.seconds > table.seconds
    assert all(torch.equal(before[name], value) for name, value in step.model.state_dict().items())
    kept = read_table(choices.path_of(table.where), table.where)
    assert kept == chosen
    # The next run does not ask again, and compiles nothing where that was slower.
    monkeypatch.setattr(choices, "_form", None)
    assert choose_form(kept, step, 4, HERE) is kept
    again = step_for()
    prepare_step(again, 4, "off")
    apply(kept, again)
    assert compiled_as(again) == "off"


def test_a_compiled_step_with_another_loss_is_dropped(monkeypatch):
    step, table = compiled("step")
    forward = step.forward

    def wrong(*batch):
        losses, seen = forward(*batch)
        return losses._replace(total=losses.total * 1.1), seen

    step.forward = wrong
    takes(monkeypatch)
    chosen = choose_form(table, step, 4, HERE)
    assert compiled_as(step) == chosen.decisions["compile"].chosen == "off"
    assert "compile: not step: the loss is " in chosen.notes()[1]


def test_an_eager_step_without_room_leaves_the_compiled_one(monkeypatch):
    step, table = compiled("step")

    def losses(*batch):
        raise torch.cuda.OutOfMemoryError("no room")

    monkeypatch.setattr(step, "losses", losses)
    chosen = choose_form(table, step, 4, HERE)
    assert chosen.decisions["compile"] == Decision("step", {}, {"off": "out of memory"})


def test_without_time_the_compiled_step_stays_and_nothing_is_kept(monkeypatch):
    step, table = compiled("blocks")
    monkeypatch.setitem(choices._FORM_SECONDS, "cpu", 0.0)
    chosen = choose_form(table, step, 4, HERE)
    assert compiled_as(step) == "blocks"
    assert chosen.decisions["compile"] == Decision("blocks", {}, {})
    assert not choices.path_of(table.where).exists()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({}, "step"),
        ({"samples": 10**4}, "off"),  # over before compiling pays
        ({"ranks": 2}, "off"),
        ({"seconds": 0.0}, "off"),
        ({"teacher": "int8"}, "off"),
        ({"known": "off"}, "off"),
        ({"known": "step", "samples": 10**4}, "off"),
        ({"asked": "blocks", "samples": 10**4, "ranks": 2}, "blocks"),
        ({"asked": "off"}, "off"),
    ],
    ids=str,
)
def test_a_long_run_on_a_cpu_tries_a_compiled_step(change, what):
    step = step_for(compile=change.get("asked", "auto"))
    step.teacher = change.get("teacher", "same")
    decisions = {"compile": Decision(change["known"], {}, {})} if "known" in change else {}
    table = Table({}, decisions, change.get("seconds", 1.0))
    here = Session(0, change.get("ranks", 1), HERE.device)
    assert to_compile(table, step, here, change.get("samples", 10**12)) == what


@pytest.mark.parametrize("why", ["said", "ranks", "graph", "not measured", "not compiled"])
def test_forms_that_are_no_question(monkeypatch, why):
    step, table = compiled("step" if why != "not compiled" else "off")
    monkeypatch.setattr(choices, "_form", None)
    train = {"said": {"compile": "step"}, "graph": {"cuda_graph": True}}.get(why, {})
    step.config = dataclasses.replace(step.config, train=dataclasses.replace(step.config.train, **train))
    table = table._replace(seconds=0.0) if why == "not measured" else table
    here = Session(0, 2, HERE.device) if why == "ranks" else HERE
    assert choose_form(table, step, 4, here) is table
