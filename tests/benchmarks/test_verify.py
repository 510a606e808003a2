"""`make verify-gpu`: its stages go on where they were, and its report says what was seen and no more."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from nullgpu import null_device

FOLDER = Path(__file__).parents[2] / "benchmarks" / "verify"
sys.path.insert(0, str(FOLDER))

MODULES = ("curve", "peaks", "record", "run", "stages", "traffic")
curve, peaks, record, run, stages, traffic = map(importlib.import_module, MODULES)


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


@pytest.fixture
def verify(tmp_path, monkeypatch):
    """verify(*stages, **options) runs them as a dry run; returns exit status, and how each stage ended."""

    def verified(*given, **options):
        monkeypatch.setattr(run, "STAGES", given)
        arguments = ["--dry-run", f"--folder={tmp_path}", *(f"--{key}={value}" for key, value in options.items())]
        code = run.main(arguments)
        kept = json.loads((tmp_path / "outcomes.json").read_text())["outcomes"]
        return code, {name: outcome[1] for name, outcome in kept.items()}

    return verified


def test_each_stage_passes_or_fails_by_its_exit_status(verify, tmp_path):
    code, ended = verify(
        stages.Stage("good", "is it?", python("print('as it should')"), 1),
        stages.Stage("bad", "is it?", python("raise SystemExit(1)"), 1),
        stages.Stage("unable", "is it?", python(f"raise SystemExit({stages.CANNOT})"), 1),
    )
    assert (code, ended) == (1, {"good": "passed", "bad": "FAILED", "unable": "not run"})
    page = (tmp_path / "report.md").read_text()
    assert "| bad | is it? | FAILED exit status 1 |" in page
    assert "as it should" in page


def test_a_second_call_does_only_what_is_left(verify, tmp_path):
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    first = stages.Stage("first", "?", python(count), 1)
    assert verify(first) == (0, {"first": "passed"})
    assert verify(first, stages.Stage("second", "?", python(count), 1)) == (0, {"first": "passed", "second": "passed"})
    assert (tmp_path / "count").read_text() == "xx"


def test_stages_of_another_commit_or_device_are_done_anew(verify, tmp_path, monkeypatch):
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    stage = stages.Stage("first", "?", python(count), 1)
    verify(stage)
    facts = run.facts
    monkeypatch.setattr(run, "facts", lambda dry: facts(dry) | {"commit": "another"})
    verify(stage)
    assert (tmp_path / "count").read_text() == "xx"


def test_minutes_that_are_over_leave_stages_to_the_next_call(verify, tmp_path):
    given = [stages.Stage(name, "?", python("pass"), 1) for name in ("first", "next")]
    assert verify(*given, minutes=0.5) == (run.LEFT, {"first": "passed"})
    assert "| next | ? | left the next call does it |" in (tmp_path / "report.md").read_text()
    assert verify(*given, minutes=0.5) == (0, {"first": "passed", "next": "passed"})


def test_a_record_that_was_cut_off_is_made_anew(verify, tmp_path):
    (tmp_path / "outcomes.json").write_text("{cut o")
    assert verify(stages.Stage("first", "?", python("pass"), 1)) == (0, {"first": "passed"})


def test_a_stage_that_is_too_slow_is_stopped_with_what_it_started(verify, tmp_path):
    child = f"import time; time.sleep(3); open({str(tmp_path / 'late')!r}, 'w')"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    assert verify(stages.Stage("slow", "?", python(code), 0.02)) == (1, {"slow": "too slow"})
    assert not (tmp_path / "late").exists()


def test_a_tool_that_is_missing_is_told(tmp_path):
    for needs in ("no-such-tool", "torch.no_such_module", "no_such_package.module"):
        outcome = run.run_stage(stages.Stage("tool", "?", python("pass"), 1, needs=needs), tmp_path, 60, dry=False)
        assert (outcome.ended, outcome.why) == ("not run", f"{needs} is not installed")
    assert run.run_stage(stages.Stage("m", "?", python("pass"), 1, needs="torch.nn"), tmp_path, 60, False).why == ""


def test_the_report_has_no_path_of_this_machine():
    said = f"\x1b[31m{Path.home()}/x {FOLDER.parents[1]}/tests\x1b[0m\n{sys.prefix}/lib\n```"
    assert record.tidy(said) == "~/x ./tests\n<python>/lib\n'''"
    assert len(record.tidy("line\n" * 500).splitlines()) == record.MOST_LINES


def test_a_machine_without_a_gpu_is_told_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(run.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        run.main([])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "ccmim: ccmim bench verify: torch sees no GPU here; `ccmim doctor` says why\n"


@pytest.mark.parametrize(
    ("gpu", "step"),
    [
        ([1.0, 0.9, 0.8], 0),
        ([1.0 + 9e-6, 0.9, 0.8], 0),
        ([1.0 + 2e-5, 0.9, 0.8], 1),  # nothing has been rounded yet
        ([1.0, 0.9, 0.8 * (1 + 9e-3)], 0),  # at the third step the other order is off by 1e-3
        ([1.0, 0.9, 0.8 * (1 + 2e-2)], 3),
        ([1.0, float("nan"), 0.8], 2),
        ([1.0, 0.9], 3),
    ],
)
def test_the_gpus_curve_may_differ_as_rounding_does(gpu, step):
    assert curve.verdict(gpu, cpu=[1.0, 0.9, 0.8], other=[1.0, 0.9, 0.8 * (1 + 1e-3)])["step"] == step


def test_ncus_bytes_are_summed_over_kernels_and_units():
    page = (
        "==PROF== Connected\n"
        '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","divide_tokens_kernel","dram__bytes_read.sum","Mbyte","1,310.25"\n'
        '"0","divide_tokens_kernel","dram__bytes_write.sum","Kbyte","2.5"\n'
        '"0","divide_tokens_kernel","sm__cycles.sum","cycle","77"\n'
    )
    assert traffic.counted(page) == 1310.25e6 + 2.5e3


def test_every_stage_has_a_name_of_its_own_and_all_fit_into_the_promised_minutes_twice():
    names = [stage.name for stage in stages.STAGES]
    assert len(set(names)) == len(names)
    assert sum(stage.limit for stage in stages.STAGES) < 50


def test_a_peak_is_held_on_one_gpu_and_shown_of_many():
    assert peaks.verdict(10.4, 10.0, 1).endswith("1.040 x the header's 10 GB: passed")
    assert peaks.verdict(10.6, 10.0, 1).endswith("FAILED")
    assert peaks.verdict(9.4, 10.0, 1).endswith("FAILED")
    assert "FAILED" not in peaks.verdict(5.0, 10.0, 8)


@pytest.mark.slow
def test_a_dry_run_starts_every_stage(tmp_path):
    """On a device that computes nothing; what needs a tool of the CUDA toolkit is collected."""
    target = [str(FOLDER / "run.py"), "--dry-run", f"--folder={tmp_path}"]
    result = null_device.run(target, timeout=1200, NULLCUDA_BOOL="0", XDG_CACHE_HOME=str(tmp_path / "cache"))
    outcomes = json.loads((tmp_path / "outcomes.json").read_text())["outcomes"]
    printed = {name: (tmp_path / f"{name}.txt").read_text()[-1000:] for name in outcomes}
    ended = {name: outcome[1] for name, outcome in outcomes.items()}
    assert ended == {stage.name: "passed" for stage in stages.STAGES} | {"traffic": "not run"}, printed
    assert result.code == 0, null_device.end_of(result)
    assert "No figure here means anything" in (tmp_path / "report.md").read_text()
