"""The null device notices what the other tests of this folder rely on: waits, copies, products, forbidden captures."""

from pathlib import Path

import pytest
from nullgpu.null_device import end_of, run

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
