"""Run the kernels' tests in this process, for a tool that watches one; the arguments are pytest's."""

import sys
from pathlib import Path

import pytest

OPS = Path(__file__).resolve().parents[2] / "tests" / "ops"

if __name__ == "__main__":
    sys.exit(pytest.main([str(OPS), "-x", "-m", "not slow", "-p", "no:cacheprovider", *sys.argv[1:]]))
