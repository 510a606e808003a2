"""The faults of `mutations.py` can be planted: the text that each replaces stands in its file once."""

from ops.mutations import ROOT, faults


def test_every_fault_can_be_planted():
    found = list(faults())
    assert len({fault.file for fault in found if fault.file.parent.name == "triton_impl"}) >= 8
    assert not [fault.what for fault in found if not fault.text_is_there_once(ROOT)]
