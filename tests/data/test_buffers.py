"""The memory of batches: each has its own on a CPU; on a GPU they share a ring."""

import pytest
import torch

from ccmim_fast.data.stream.batch import Buffers


def filled_with(value):
    return lambda to, stream: to.fill_(value)


def test_on_a_cpu_each_batch_has_its_own():
    buffers = Buffers((2, 3), torch.uint8, torch.device("cpu"), held=1)
    batches = [buffers.fill(filled_with(value)) for value in range(5)]
    assert [batch.tolist() for batch in batches] == [[[value] * 3] * 2 for value in range(5)]
    assert batches[0].dtype == torch.uint8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("held", [1, 3])
def test_on_a_gpu_no_batch_is_overwritten_before_it_was_used(held):
    """The step is slow and asynchronous, the loader is not: what the step sums must be what was written for it."""
    buffers = Buffers((1000, 1000), torch.uint8, torch.device("cuda"), held)
    slow = torch.randn(4096, 4096, device="cuda")
    sums, places = [], set()
    for step in range(8):
        group = [buffers.fill(filled_with(step * held + micro)) for micro in range(held)]
        places |= {batch.data_ptr() for batch in group}
        for _ in range(5):
            slow = torch.nn.functional.normalize(slow @ slow)
        sums += [batch.long().sum() for batch in group]
    assert [total.item() // 1_000_000 for total in sums] == list(range(8 * held))
    assert len(places) == 2 * held
