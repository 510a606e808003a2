"""Which arithmetic a device gets, by compute capability."""

import pytest
import torch

from ccmim_fast.errors import ConfigError
from ccmim_fast.models.precision import choose_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _restore_policy():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("capability", "name", "dtype", "scaled"),
    [
        ((6, 1), "fp32", None, False),
        ((7, 0), "fp16", torch.float16, True),
        ((7, 5), "fp16", torch.float16, True),
        ((8, 0), "bf16", torch.bfloat16, False),
        ((9, 0), "bf16", torch.bfloat16, False),
        ((12, 0), "bf16", torch.bfloat16, False),
    ],
)
def test_auto_follows_the_table(monkeypatch, capability, name, dtype, scaled):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert choose_precision("auto", CUDA) == (name, dtype, scaled)


def test_bf16_is_refused_where_the_gpu_has_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    with pytest.raises(ConfigError, match=r"needs compute capability 8\.0, this GPU has 7\.5"):
        choose_precision("bf16", CUDA)


def test_fp16_is_refused_on_a_cpu():
    with pytest.raises(ConfigError, match=r"train\.precision=fp16: not on a CPU"):
        choose_precision("fp16", CPU)


def test_fp32_means_fp32():
    choose_precision("fp32", CPU)
    assert torch.get_float32_matmul_precision() == "highest"
    choose_precision("bf16", CPU)
    assert torch.get_float32_matmul_precision() == "high"
