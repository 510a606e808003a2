"""A backend of attention that has no kernel is refused by one line; of no other is anything said."""

from functools import cache
from pathlib import Path

import pytest
from nullgpu.null_device import end_of, run

SCRIPT = Path(__file__).parent / "refuse_attention.py"


@cache
def told_by(capability):
    result = run(SCRIPT, capability=capability)
    assert result.code == 0, end_of(result)
    return result.told


# A process each.
@pytest.mark.parametrize("capability", [*(pytest.param(cc, marks=pytest.mark.slow) for cc in (61, 75, 80)), 90])
def test_what_is_refused_is_what_cannot_run(capability):
    outcomes = told_by(capability)["backends"]
    for name, dtype, channels, works, said in outcomes:
        assert works == (not said), (name, dtype, channels, said)
    assert {works for name, *_, works, _ in outcomes if name == "efficient"} == {True, False}
    assert all(works for name, *_, works, _ in outcomes if name in ("sdpa", "plain"))


def test_the_line_names_the_value_and_the_limit():
    told = told_by(90)
    said = {(name, dtype, channels): said for name, dtype, channels, _, said in told["backends"]}
    assert said["flash", "torch.float32", 64] == (
        "train.attention=flash: no kernel for float32, 64 channels a head and compute capability 9.0; it needs half "
        "precision, compute capability 8.0 and at most 256 channels a head; use attention=sdpa"
    )
    assert told["a run"].startswith("train.attention=flash: no kernel for float32, 16 channels a head")
    assert told["cudnn"].startswith("train.attention=cudnn: no kernel for float32, 16 channels a head")
    assert told["xformers"].startswith("train.attention=xformers: no kernel for float64, 16 channels a head")
