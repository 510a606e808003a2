"""MATLAB's arrays as scipy writes and reads them; whatever damage is a ValueError."""

import io
import zlib

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from ccmim_fast.data.index import matlab
from ccmim_fast.data.index.matlab import read_arrays

TYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8")


def saved(arrays, **options):
    file = io.BytesIO()
    savemat(file, arrays, **options)
    return file.getvalue()


def made(dtype):
    draw = np.random.default_rng(0)
    high = 100 if dtype.endswith("1") else 8000
    # Rows of 0 to 4 bytes are stored in another way than longer ones.
    return {f"a{n}": draw.integers(0, high, (1, n)).astype(dtype) for n in (0, 1, 2, 3, 4, 5, 8, 1020)}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_equals_scipy(dtype, compressed):
    data = saved(made(dtype) | {"matrix": np.arange(6).reshape(2, 3).astype(dtype)}, do_compression=compressed)
    found, expected = read_arrays(data), loadmat(io.BytesIO(data))
    assert found.keys() == {name for name in expected if not name.startswith("__")}
    for name, row in found.items():
        np.testing.assert_array_equal(row, expected[name].reshape(-1, order="F"), strict=name != "a0")


def test_big_endian():
    """Written by hand: scipy writes the order of its machine only."""
    words = np.array([14, 56, 6, 8, 9, 0, 5, 8, 1, 3], ">u4").tobytes()  # a matrix of 1 x 3, class 9
    small = np.array([1 << 16 | 1], ">u4").tobytes() + b"x\0\0\0" + np.array([3 << 16 | 2], ">u4").tobytes()
    data = bytes(124) + b"\x01\0MI" + words + small + bytes([7, 8, 9, 0])
    data = data.replace(words, words.replace((56).to_bytes(4, "big"), (48).to_bytes(4, "big"), 1))
    found = read_arrays(data)
    assert {name: row.tolist() for name, row in found.items()} == {"x": [7, 8, 9]}


def test_arrays_of_other_kinds_are_left_out():
    arrays = {"text": "rose", "cells": np.array(["a", 1], dtype=object), "imaginary": np.array([1j]), "n": np.ones(3)}
    assert read_arrays(saved(arrays)).keys() == {"n"}


@pytest.mark.parametrize("compressed", [False, True])
def test_damage(compressed):
    """Cut at any place or with some bits turned: a ValueError, or arrays; nothing else."""
    data = saved(made("u2"), do_compression=compressed)
    draw = np.random.default_rng(1)
    refused = 0
    for trial in range(2000):
        spoiled = bytearray(data)
        if trial % 4 == 0:
            spoiled = spoiled[: draw.integers(len(data))]
        for at in draw.integers(100, min(len(spoiled), 500), 3) if len(spoiled) > 100 else ():
            spoiled[at] ^= 1 << int(draw.integers(8))
        try:
            read_arrays(bytes(spoiled))
        except ValueError:
            refused += 1
    assert refused > 500


def test_a_file_that_is_cut_off_is_told_to_be():
    data = saved({"labels": np.arange(500, dtype=np.uint16)[None]})
    for length in (130, 150, 1000, len(data) - 1):
        with pytest.raises(ValueError, match="it is cut off"):
            read_arrays(data[:length])


def test_little_that_stands_for_much(monkeypatch):
    monkeypatch.setattr(matlab, "_LARGEST", 1000)
    packed = zlib.compress(bytes(2000))
    data = bytes(124) + b"\x01\0IM" + np.array([15, len(packed)], "<u4").tobytes() + packed
    with pytest.raises(ValueError, match="more than 1000 bytes"):
        read_arrays(data)
