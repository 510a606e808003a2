"""Floors against the design's table and against real tensors, and what the driver says, writes and refuses."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks" / "ops"))
bench, registry, timing = (importlib.import_module(name) for name in ("bench", "registry", "timing"))
Size = registry.Size
WITH_GRADIENT = [op for op in registry.NAMES if "backward" in registry.benchmark(op).floor(Size(1))]

SMALL = ["--batch", "2", "--width", "64", "--rounds", "2"]
ON_CPU = [*SMALL, "--device", "cpu", "--kernels", "reference"]


def floor(op, size):
    return registry.benchmark(op).floor(size)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("op", "megabytes"),
    [("divide_tokens", 618), ("gather_tokens", 621), ("restore_tokens", 260), ("masked_patch_loss", 347)],
)
def test_floors_agree_with_the_design(op, megabytes):
    """Its table stands at B = 1024, L = 196, D = 768, bf16, forward."""
    forward = floor(op, Size(1024))["forward"]
    assert forward.bytes / 1e6 == pytest.approx(megabytes, rel=0.03)


def test_embed_tokens_reads_half_precision_and_writes_float32():
    assert floor("embed_tokens", Size(1024))["forward"].bytes == pytest.approx(1024 * 196 * 768 * 6, rel=0.03)


def test_cls_row_reads_k_once():
    assert floor("cls_row", Size(1024))["forward"].bytes == pytest.approx(1024 * 197 * 768 * 2, rel=0.03)


def test_where_hog_target_differs_from_the_design():
    """The design's 352 MB are bf16 images and the bf16 features of all patches; the op reads uint8 and gives the masked
    patches' features in float32."""
    images, features = 1024 * 224 * 224 * 3, 1024 * 196 * 108
    assert 2 * (images + features) / 1e6 == pytest.approx(352, rel=0.03)
    assert floor("hog_target", Size(1024))["forward"].bytes == images + 1024 * 147 * (108 * 4 + 8)


def test_where_info_nce_differs_from_the_design():
    """The design's 5 us at 1k x 8k x 256 are one product at 800 TFLOP/s; Eq. 7 has two, students' and teachers'."""
    forward = floor("info_nce", Size(1024, keys=8192))["forward"]
    assert forward.flops == 2 * (2 * 1024 * 8192 * 256)
    assert forward.flops / 2 / 800e12 * 1e6 == pytest.approx(5, rel=0.1)


@pytest.mark.parametrize("tokens", [1.0, 1 / 3])
@pytest.mark.parametrize("op", registry.NAMES)
def test_forward_counts_every_input_and_output_once(op, tokens):
    size = Size(3, 128, tokens=tokens)
    case = registry.benchmark(op).case(size, torch.device("cpu"))
    tensors = [*case.inputs, *case.call(*case.inputs, kernels="reference")]
    count = sum(x.numel() * x.element_size() for x in tensors)
    if op == "masked_patch_loss":
        count -= 3 * size.keep * size.pixels  # pixels of visible patches are not read
    if op == "divide_tokens":
        count -= 3 * (size.masked - size.teacher) * 128 * 2  # nor tokens that neither set has
    assert floor(op, size)["forward"].bytes == count


@pytest.mark.parametrize("op", WITH_GRADIENT)
def test_backward_reads_the_gradient_and_writes_those_of_the_leaves(op):
    size = Size(3, 128)
    case = registry.benchmark(op).case(size, torch.device("cpu"))
    out = case.call(*case.inputs, kernels="reference")[0]
    passes = floor(op, size)
    least = sum(x.numel() * x.element_size() for x in (out, *case.leaves))
    assert least <= passes["backward"].bytes <= passes["both"].bytes
    assert passes["both"].bytes <= passes["forward"].bytes + passes["backward"].bytes


def test_without_a_gpu_floors_are_printed(no_gpu, capsys):
    assert bench.main(["--batch", "1024", "--width", "768", "--bandwidth", "2.0"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].startswith("No CUDA device: times")
    assert "2.0 TB/s" in printed
    assert "ahead_of_time.py" in printed
    assert all(f"`{op}`" in printed for op in registry.NAMES)
    # 261.0 MB at 2 TB/s.
    assert "| `restore_tokens` | 1024 |  | forward | 261.0 | 0.00 | 130.5 |" in printed


def test_red_tests_leave_an_op_out(monkeypatch, tmp_path, capsys):
    """`cls_row`'s test command fails, `info_nce`'s passes."""
    code = "import sys; sys.exit('test_cls_row' in sys.argv[1])"
    monkeypatch.setattr(bench, "TESTS", (sys.executable, "-c", code))
    out = tmp_path / "ops"
    assert bench.main([*ON_CPU, "--op", "cls_row", "info_nce", "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert "cls_row" not in printed.out
    assert "`info_nce`" in printed.out
    assert "cls_row: its tests fail, so it is not timed" in printed.err
    assert {row["op"] for row in json.loads(out.with_suffix(".json").read_text())["rows"]} == {"info_nce"}


def test_the_gate_runs_the_ops_own_tests():
    assert bench.TESTS[1:] == ("-m", "pytest", "-q")
    assert all((ROOT / "tests" / "ops" / f"test_{op}.py").is_file() for op in registry.NAMES)


def test_results(tmp_path):
    out = tmp_path / "made" / "ops"
    assert bench.main([*ON_CPU, "--no-tests", "--op", "gather_tokens", "hog_target", "--out", str(out)]) == 0
    result = json.loads(out.with_suffix(".json").read_text())
    known = {
        "command",
        "device",
        "capability",
        "driver",
        "cuda",
        "torch",
        "triton",
        "python",
        "commit",
        "date",
        "float32 matmul",
    }
    assert result["environment"].keys() == known
    assert result["tests"] == "not run"
    assert [(row["op"], row["pass"]) for row in result["rows"]] == [
        ("gather_tokens", "forward"),
        ("gather_tokens", "backward"),
        ("gather_tokens", "both"),
        ("hog_target", "forward"),
    ]
    for row in result["rows"]:
        assert row.keys() == {"op", "batch", "width", "pass", "bytes", "flops", "floor_us", "variants"}
        assert row["variants"].keys() == {"reference", "copy"}
        for found in row["variants"].values():
            assert found.keys() == {"median_us", "iqr_us", "share_of_floor", "peak_mb"}
    assert "| `gather_tokens` | 2 | 64 | both |" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_a_result_is_never_written_over(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    where = {"device": "NVIDIA H100 80GB HBM3", "date": "2026-11-23"}
    first = bench.prefix_of(None, where)
    assert first.name == "ops-2026-11-23-nvidia-h100-80gb-hbm3"
    first.with_name(first.name + ".json").write_text("{}")
    assert bench.prefix_of(None, where).name == first.name + "-2"


def test_what_cannot_run_is_said():
    def out_of_memory(_):
        raise torch.OutOfMemoryError

    def refused(_):
        raise RuntimeError("this GPU is too old\nlong trace")

    variants = {"reference": timing.Variant(out_of_memory), "compiled": timing.Variant(refused)}
    found = timing.time_variants(variants, 2, torch.device("cpu"))
    assert found == {"reference": "out of memory", "compiled": "RuntimeError: this GPU is too old"}
    with pytest.raises(RuntimeError, match="too old"):
        timing.time_variants({"triton": timing.Variant(refused)}, 2, torch.device("cpu"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda", "--no-tests"], "--no-tests: not on CUDA"),
        (["--device", "cuda", "--rounds", "5"], "--rounds=5 must be at least 20"),
        (["--device", "cpu"], "--device=cpu: Triton kernels run on CUDA"),
        (["--op", "nothing"], "invalid choice: 'nothing'"),
    ],
)
def test_refused(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit) as caught:
        bench.parse(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
