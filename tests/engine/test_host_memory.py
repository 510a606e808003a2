"""glibc keeps what a step frees."""

import subprocess
import sys

import pytest

CHURN = """
import resource, sys, torch
from ccmim_fast.engine.build import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(3):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_large_blocks_are_not_mapped_anew():
    faults = {
        how: int(subprocess.run([sys.executable, "-c", CHURN, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "return")
    }
    # 20 tensors of 64 MB, 16,384 pages of 4 kB each; a few while the heap grows to its size.
    assert faults["keep"] < 0.5 * faults["return"]
