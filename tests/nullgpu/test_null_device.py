"""The null device notices what the other tests of this folder rely on: waits, copies, products, forbidden captures."""

from pathlib import Path

import pytest
from nullgpu.null_device import BuildError, build, end_of, headers, run

PRODUCTS = {
    "torch.bfloat16 high": "bf16",
    "torch.float16 high": "fp16",
    "torch.float32 high": "tf32",
    "torch.float32 highest": "fp32",
}


@pytest.fixture(scope="module")
def told():
    result = run(Path(__file__).parent / "device_itself.py", capability=80, memory_gb=4)
    assert result.code == 0, end_of(result)
    return result.told


def test_it_says_what_it_was_told_to_be(told):
    assert told["device"] == ["Null GPU sm_80", [8, 0]]
    assert told["memory"][0] == 100 * 2**20
    assert abs(told["memory"][1] - 4e9) < 2**20
    assert "out of memory" in told["too much"]


@pytest.mark.parametrize("case", PRODUCTS)
def test_products_are_counted_by_type_with_their_flops(told, case):
    # Three of one product, and a batch of three.
    assert told[f"products {case}"] == [["product", PRODUCTS[case], 4, 6 * 2 * 8 * 16 * 24]]


def test_waits_and_copies_are_counted(told):
    size = [1, 4000]
    assert told["kernel"] == {"waits": 0, "copies": {}, "kernels": 1}
    assert told["synchronize"] == {"waits": 1, "copies": {}, "kernels": 0}
    assert told["to the host"] == {"waits": 1, "copies": {"D2H pageable": size}, "kernels": 0}
    assert told["from pageable memory"] == {"waits": 1, "copies": {"H2D pageable": size}, "kernels": 0}
    assert told["from pinned memory"] == {"waits": 0, "copies": {"H2D": size}, "kernels": 0}
    assert told["item"]["waits"] == told["nonzero"]["waits"] == 1
    assert sum(events for events, _ in told["item"]["copies"].values()) == 1
    assert "synchroniz" in told["no_waits"]


def test_copies_are_real_and_a_bool_is_what_the_test_says(told):
    assert told["bool"] is True
    assert told["data"] == 999 * 500


def test_a_capture_refuses_what_waits(told):
    assert "during capture" in told["captured wait"]
    assert "capture" in told["captured pageable copy"]  # torch refuses it before the device does


def test_a_replay_that_reads_changed_host_memory_is_noticed(told):
    assert told["replay unchanged"] == {"launch": [1, 2]}
    assert told["replay changed"] == {"launch": [1, 2], "reads host memory that changed": [1, 4000]}


def test_events_tell_time_in_launches(told):
    assert told["time of five launches in ms"] == pytest.approx(0.005)
    assert told["trace"] == ["event", *["kernel"] * 5, "event"]


def test_where_it_cannot_be_built_the_reason_is_told(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BuildError, match="no gcc on PATH"):
        build()


@pytest.mark.parametrize(
    ("version", "folders"), [("13.2", ["nccl", "cu13"]), ("12.6", ["nccl", "cuda_runtime", "cublas"])]
)
def test_headers_are_those_of_torchs_own_cuda(version, folders, tmp_path):
    for folder in ("nccl", "cu13", "cuda_runtime", "cublas"):
        (tmp_path / "nvidia" / folder / "include").mkdir(parents=True)
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text(f"__version__ = '2.7.1'\ncuda: Optional[str] = '{version}'\n")
    with pytest.raises(BuildError, match=r"no cuda\.h of CUDA 1[23]"):
        headers(tmp_path / "torch")
    for name in ("cuda.h", "cuda_runtime_api.h", "cublas_v2.h", "cublasLt.h", "nccl.h"):
        (tmp_path / "nvidia" / folders[-1] / "include" / name).touch()
    assert [path.parent.name for path in headers(tmp_path / "torch")] == folders
    (tmp_path / "torch" / "version.py").write_text("cuda: Optional[str] = None\n")
    with pytest.raises(BuildError, match="without CUDA"):
        headers(tmp_path / "torch")
