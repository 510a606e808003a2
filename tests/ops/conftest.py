"""Kernels that run in Triton's interpreter are watched in every test of this folder."""

import contextlib

import pytest
from ops.watched import watched

from ccmim_kernels.triton_impl.launch import INTERPRETED


@pytest.fixture(autouse=True)
def _watched():
    with watched() if INTERPRETED else contextlib.nullcontext():
        yield
