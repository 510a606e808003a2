"""Made traces: whose every moment is, on a GPU and on a CPU."""

import pytest

from ccmim_fast.profile.timeline import DATA_WAIT, PROFILED, Interval, attribute, read_timeline

GEMM, GELU = "ampere_sgemm_128x64_nn", "triton_poi_fused_gelu_0"
NCCL = "ncclDevKernel_AllReduce_Sum_f32_RING_LL"


def event(category, name, start, length, thread=1):
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": length, "tid": thread, "pid": 1}


def window(length=100):
    return event("user_annotation", PROFILED, 0, length)


def by_kind(spent):
    kinds = {}
    for (kind, _), time in spent.items():
        kinds[kind] = kinds.get(kind, 0) + time
    return kinds


def test_gpu_idle_is_the_span_without_kernels():
    spent = read_timeline(
        [
            window(),
            event("cpu_op", "aten::mm", 0, 90),
            event("gpu_user_annotation", PROFILED, 0, 100, 7),
            event("cuda_runtime", "cudaLaunchKernel", 5, 80),
            event("kernel", GEMM, 10, 20, 7),
            event("kernel", GELU, 30, 10, 7),
            event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 50, 5, 7),
        ],
        on_gpu=True,
    )
    assert by_kind(spent) == {"matmul": 20, "elementwise": 15, "idle": 65}
    assert spent["matmul", GEMM] == 20


def test_gpu_overlap_counts_once_and_communication_only_where_it_is_exposed():
    events = [window(), event("kernel", GEMM, 10, 40, 7), event("kernel", NCCL, 30, 40, 20)]
    for order in (events, events[::-1]):
        assert by_kind(read_timeline(order, on_gpu=True)) == {"matmul": 40, "communication": 20, "idle": 40}


def test_gpu_waits_for_data_only_where_it_has_nothing_to_do():
    events = [window(), event("user_annotation", DATA_WAIT, 0, 30), event("kernel", GEMM, 20, 40, 7)]
    assert by_kind(read_timeline(events, on_gpu=True)) == {"data wait": 20, "matmul": 40, "idle": 40}


def test_what_lies_outside_of_the_steps_does_not_count():
    events = [
        window(),
        event("kernel", GEMM, -50, 60, 7),
        event("kernel", GEMM, 95, 60, 7),
        event("kernel", GELU, 200, 9),
    ]
    assert by_kind(read_timeline(events, on_gpu=True)) == {"matmul": 15, "idle": 85}


def test_cpu_time_is_the_innermost_operators():
    spent = read_timeline(
        [
            window(),
            event("user_annotation", "ProfilerStep#1", 0, 100),
            event("user_annotation", "DistributedDataParallel.forward", 5, 60),
            event("cpu_op", "aten::linear", 10, 50),
            # Begins with its parent.
            event("cpu_op", "aten::addmm", 10, 45),
            event("cpu_op", "aten::copy_", 15, 5),
            event("cpu_op", "AddmmBackward0", 60, 30),
            event("cpu_op", "aten::view", 70, 10),
            event("cpu_op", "aten::gelu", 0, 100, thread=2),
            event("kernel", GEMM, 0, 100, 7),
        ],
        on_gpu=False,
    )
    assert spent["matmul", "aten::linear"] == 5
    assert spent["matmul", "aten::addmm"] == 40
    assert spent["elementwise", "aten::copy_"] == 5
    assert by_kind(spent) == {"matmul": 45, "elementwise": 5, "other": 30, "idle": 20}


def test_cpu_work_inside_a_wait_for_data_is_waiting():
    events = [window(), event("user_annotation", DATA_WAIT, 10, 20), event("cpu_op", "aten::mm", 15, 10)]
    assert by_kind(read_timeline(events, on_gpu=False)) == {"data wait": 20, "idle": 80}


def test_no_interval_outlives_a_later_one_of_higher_rank():
    low, high = Interval(0, 10, (1,), "other", "a"), Interval(2, 4, (2,), "matmul", "b")
    assert attribute([low, high], 0, 12) == {("other", "a"): 8, ("matmul", "b"): 2, ("idle", ""): 2}


def test_a_trace_without_our_range_is_refused():
    with pytest.raises(ValueError, match="no range 'ccmim_fast: profiled steps'"):
        read_timeline([event("kernel", GEMM, 0, 1)], on_gpu=True)
