"""What `ccmim bench throughput` counts, writes, leaves out and refuses. Nothing here says how fast anything is."""

import argparse
import functools
import json
import math

import pytest
import torch

from ccmim_fast.cli import main as ccmim
from ccmim_fast.profile.meter import flop_counter

ROW = {
    "name",
    "ours",
    "commit",
    "precision",
    "settings",
    "without",
    "differs",
    "off",
    "form",
    "measured_against",
    "images_per_second",
    "peak_bytes",
    "gflop_per_image",
    "design_gflop_per_image",
    "deviation",
    "as_expected",
    "mfu",
    "matmul_tflop_per_s",
    "first_loss",
    "last_loss",
    "steps",
    "ratios",
    "memory_ratios",
}
ENVIRONMENT = {"command", "time", "device", "commit", "torch", "timm", "transformers", "lightly", "threads", "python"}
ENVIRONMENT |= {"stable-pretraining"}


@pytest.fixture
def throughput(module):
    return module("throughput")


@pytest.fixture
def contenders(module):
    return module("contenders")


@pytest.mark.slow
def test_results(throughput, module, small, peer, tmp_path, capsys):
    out = tmp_path / "made" / "throughput"
    arguments = [*small, "--only", "ccmim-first", "naive", "--peer", f"{peer}:build", "--seconds=0.01", f"--out={out}"]
    assert throughput.main(arguments) == 0
    result = json.loads(out.with_suffix(".json").read_text())
    assert result["environment"].keys() >= ENVIRONMENT
    assert result["environment"]["command"].startswith("ccmim bench throughput --device=cpu")
    ours, naive, other = result["rows"]
    assert [ours["name"], naive["name"], other["name"]] == ["ccmim-first", "naive", "others.py:build"]
    assert [row["ours"] for row in result["rows"]] == [True, False, False]
    for row in result["rows"]:
        assert row.keys() == ROW
        assert row["images_per_second"].keys() == {"median", "min", "max", "rounds"}
        assert row["peak_bytes"] >= 0
        assert math.isfinite(row["last_loss"])
        assert row["steps"] >= 2
    assert other["last_loss"] < other["first_loss"]
    # Of one round: the ratio is that of the two rates.
    assert ours["ratios"].keys() == {"naive", "others.py:build"}
    rates = [row["images_per_second"]["median"] for row in result["rows"]]
    assert ours["ratios"]["naive"]["median"] == pytest.approx(rates[0] / rates[1])
    assert ours["memory_ratios"]["naive"] == pytest.approx(ours["peak_bytes"] / naive["peak_bytes"])
    assert other["form"]["form"] == {}  # its file offers none
    assert "--train.attention=sdpa" not in ours["settings"]
    assert set(naive["without"]) == set(module("naive").SAVINGS)
    assert naive["gflop_per_image"] > ours["gflop_per_image"]
    # One matmul of 8 x 8 x 8 forward, and one backward, for two images.
    assert other["gflop_per_image"] == pytest.approx(2 * 2 * 8**3 / 2 / 1e9)
    page = out.with_suffix(".md").read_text()
    assert "| ccmim-first |" in page
    assert "| ccmim-first |" in capsys.readouterr().out
    assert "float images made beforehand" in page
    assert out.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.slow
def test_who_fails_is_said_and_the_others_go_on(throughput, small, peer, tmp_path):
    out = tmp_path / "throughput"
    peers = [word for name in ("failing", "broken", "build") for word in ("--peer", f"{peer}:{name}")]
    assert throughput.main([*small, *peers, "--seconds=0.01", "--forms=default", f"--out={out}"]) == 1
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert [row.get("error", "") for row in rows] == ["of this size", "its loss is nan", ""]


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["mae-8", "mae-2", "ccmim-first", "ccmim-bank", "naive-ccmim", "naive"])
def test_arithmetic_of_vit_base_is_the_designs(contenders, module, preset):
    """The design's table knows no saving, so there is none; the optimizer's step is real, the batch is 2."""
    contender = contenders.CONTENDERS[preset]
    # torch compiles nothing under a counter.
    settings = [*contender.settings, "--train.compile=off"]
    build = functools.partial(contenders.ours, settings, savings_off=module("naive").SAVINGS)
    images_BHWC = torch.zeros(2, 224, 224, 3, dtype=torch.uint8)
    step = build("vit_base_patch16_224", images_BHWC, "fp32")
    with flop_counter() as counter:
        step()
    expected = contender.design["vit_base_patch16_224"]
    assert counter.get_total_flops() / 2 / 1e9 == pytest.approx(expected, rel=contenders.TOLERANCE)


def test_what_counts_as_the_designs_arithmetic(contenders):
    ours, naive = contenders.CONTENDERS["ccmim-first"], contenders.CONTENDERS["naive"]
    assert [contenders.as_expected(ours, share) for share in (-0.07, -0.05, 0.005, 0.02)] == [False, True, True, False]
    assert [contenders.as_expected(naive, share) for share in (-0.02, -0.005, 0.005)] == [False, True, True]


def test_a_ratio_is_taken_round_by_round(throughput, contenders, module):
    figures = functools.partial(
        module("measure").Figures, peak_bytes=5, flops_per_image=1e9, matmul_flops=1e12, losses=[1.0, 0.5]
    )
    taking_part = [contenders.CONTENDERS[name] for name in ("mae-8", "transformers")]
    found = {"mae-8": [figures(2.0), figures(8.0)], "transformers": [figures(1.0), figures(2.0)]}
    options = argparse.Namespace(arch="other", image_size=224, settings=[], precision="fp32")
    ours, peer = throughput.rows_of(taking_part, found, options)
    assert ours["ratios"] == {"transformers": {"median": 3.0, "min": 2.0, "max": 4.0, "rounds": [2.0, 4.0]}}
    assert peer["ratios"]["mae-8"]["rounds"] == [0.5, 0.25]
    assert ours["memory_ratios"] == {"transformers": 1.0}
    assert ours["mfu"] == pytest.approx(5.0 * 1e9 / 1e12)
    assert ours["deviation"] is None


def test_rounds_are_interleaved(module, monkeypatch):
    """And the arithmetic is counted once; who failed once is not asked again."""
    rounds, asked = module("rounds"), []
    job = module("measure").Job([], "", "arch", 2, 32, "cpu", "fp32", 2, 0.1)

    def measure(given):
        asked.append((given.arch, given.count))
        return "out of memory" if given.arch == "b" else argparse.Namespace(images_per_second=1.0)

    monkeypatch.setattr(rounds, "measure", measure)
    found = rounds.run_rounds({name: job._replace(arch=name) for name in "abc"}, 2)
    assert asked == [("a", True), ("b", True), ("c", True), ("a", False), ("c", False)]
    assert found["b"] == "out of memory"
    assert [len(found[name]) for name in "ac"] == [2, 2]


def test_a_missing_peer_is_a_line(throughput, contenders, module, small, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda name: None)
    # fp32 is what all run in: no second naive line.
    assert [c.name for c in throughput.chosen(throughput.parse(small))] == list(contenders.CONTENDERS)
    asked = []

    def run_rounds(jobs, rounds):
        asked.extend(jobs)
        return {name: [module("measure").Figures(1.0, 5, 1e9, 1e12, [1.0, 0.5])] for name in jobs}

    monkeypatch.setattr(throughput, "run_rounds", run_rounds)
    assert throughput.main([*small, f"--out={tmp_path / 'made'}"]) == 0
    assert asked == [c.name for c in contenders.CONTENDERS.values() if not c.peer]
    page = (tmp_path / "made.md").read_text()
    for printed in (capsys.readouterr().out, page):
        assert "lightly: not installed; pip install --no-deps lightly\n" in printed
        assert "stable-pretraining: not installed; pip install --no-deps -r requirements/bench.txt\n" in printed
    with pytest.raises(throughput.MachineError, match="pip install transformers"):
        throughput.chosen(throughput.parse([*small, "--only", "transformers"]))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--only", "mae8"], 2, ["mae8", "nearest: mae-8"]),
        (["--only", "mae8-fp32"], 2, ["mae8-fp32", "nearest: mae-8"]),
        (["--only", "mae-8-fp32", "mae-8-fp16"], 2, ["fp16", "not on a CPU"]),
        (["--only", "mae-8", "mae-8"], 2, ["mae-8", "twice"]),
        (["--only", "mae-8@"], 2, ["mae-8@", "a commit comes after one of mae-8, "]),
        (["--only", "transformers@HEAD"], 2, ["transformers@HEAD", "a commit comes after one of"]),
        (["--only", "naive-mae@HEAD"], 2, ["naive-mae@HEAD", "a commit comes after one of"]),
        (["--only", "mae-8@nowhere"], 2, ["@nowhere", "no such commit", "git fetch"]),
        (["--only", "mae-8@--all"], 2, ["@--all", "no such commit"]),
        (["--forms=slowest"], 2, ["--forms", "slowest"]),
        (["--peer", "/nowhere.py:build"], 2, ["/nowhere.py:build", "path.py:function"]),
        (["--peer", "PEER"], 2, ["path.py:function"]),
        (["--peer", "PEER:nothing"], 2, ["'nothing'"]),
        (["--peer", "PEER:build", "--peer", "PEER:build"], 2, ["others.py:build", "twice"]),
        (["--batch=1"], 2, ["--batch=1", "at least 2"]),
        (["--rounds=many"], 2, ["--rounds", "many"]),
        (["--only", "mae-8", "--mask.rato=0.5"], 2, ["mask.rato", "mask.ratio"]),
        (["--only", "mae-8", "--model.arch=x"], 2, ["--arch"]),
        (["--device=cuda"], 6, ["no CUDA device"]),
        (["--precision=fp16"], 2, ["fp16"]),
        (["--only", "mae-8", "--arch=vit_bse"], 2, ["vit_bse"]),
    ],
)
def test_mistakes_end_in_one_line(module, throughput, small, peer, arguments, code, words, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = [*small, *(word.replace("PEER", str(peer)) for word in arguments)]
    assert module("command_line").run_main(throughput.main, arguments) == code
    out, err = capsys.readouterr()
    printed = err.splitlines()
    assert len(printed) == 1, printed
    assert all(word in printed[0] for word in words), printed
    assert "img/s" not in out  # it is said before anything is measured


def test_the_command_finds_the_script(capfd, tmp_path, monkeypatch):
    assert ccmim(["bench"]) == 2
    assert ccmim(["bench", "nothing"]) == 2
    with pytest.raises(SystemExit) as ended:
        ccmim(["bench", "throughput", "--only", "nobody"])
    assert ended.value.code == 2
    lines = capfd.readouterr().err.splitlines()
    words = ["throughput, ladder, attention, data, bank, soak, scaling, verify, ops", "'nothing'", "nobody"]
    assert [word in line for word, line in zip(words, lines)] == [True] * 3
    monkeypatch.setattr("ccmim_fast.commands.bench.__file__", str(tmp_path / "ccmim_fast" / "commands" / "bench.py"))
    assert ccmim(["bench", "ops"]) == 6
    assert "git clone" in capfd.readouterr().err


def test_a_result_is_never_written_over(module, tmp_path, monkeypatch):
    pages = module("pages")
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    options = argparse.Namespace(out=None, precision="bf16")
    where = {"device": "NVIDIA H100 80GB HBM3", "time": "2026-11-23T10:00:00"}
    first = pages.prefix_of("throughput", options, where)
    assert first.name == "throughput-2026-11-23-nvidia-h100-80gb-hbm3-bf16"
    first.with_name(first.name + ".json").write_text("{}")
    assert pages.prefix_of("throughput", options, where).name == first.name + "-2"


@pytest.mark.parametrize(
    ("name", "precision", "off"),
    [("mae-8", "", "naive-mae"), ("ccmim-bank-fp32", "fp32", "naive-ccmim-fp32"), ("transformers-bf16", "bf16", "")],
)
def test_a_name_may_end_in_a_precision(contenders, name, precision, off):
    found = contenders.contender_of(name)
    assert (found.name, found.precision, found.off) == (name, precision, off)
    assert found.settings == contenders.CONTENDERS[name.removesuffix(f"-{precision}")].settings


def test_what_a_result_tells_of_peers_and_losses(module, throughput, contenders):
    """The page has the form of each peer and what was tried, what differs, and whose loss has not fallen."""
    figures = functools.partial(module("measure").Figures, 1.0, 5_000_000, 1e9, 1e12)
    taking_part = [contenders.CONTENDERS["mae-8"], contenders.CONTENDERS["transformers"]]
    found = {"mae-8": [figures([1.0, 1.5])], "transformers": [figures([2.0, 1.0])]}
    form = module("forms").Best(
        {"compile": "off"}, {"compile": {"off": 1.0, "model": 2.0}}, {"layout=x": "an error"}, 3.0
    )
    options = argparse.Namespace(arch="other", image_size=224, settings=[], precision="fp32", forms="best")
    rows = throughput.rows_of(taking_part, found, options, {"transformers": form})
    body = module("throughput_page").body({"rows": [*rows, {"name": "lightly", "error": "killed"}]})
    lines = [line for line in body.splitlines() if line]
    assert lines[2].endswith("| 1.000 -> 1.500 (2) |  |")
    assert lines[3].endswith("| 2.000 -> 1.000 (2) | compile off |")
    assert "mae-8: its loss has not fallen" in lines
    assert "transformers: its loss has not fallen" not in lines
    assert "lightly: killed" in lines
    assert any(line.startswith("transformers differs from mae-8: its decoder") for line in lines)
    assert "transformers was tried in these forms: compile: off 1 ms, model 2 ms; not layout=x: an error" in lines
    memory = lines[lines.index("Peak memory, as a share of that of:") + 1 :]
    assert memory[2] == "| mae-8 |  | 1.00 |"
    json.dumps(rows)
