"""This module is for code that runs on the null device (`null_device.run`): it reads the device's counters, and tells
the test what was found."""

import contextlib
import ctypes
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_DEVICE = ctypes.CDLL("libcuda.so.1")
for _name in ("null_used", "null_peak", "null_pinned"):
    getattr(_DEVICE, _name).restype = ctypes.c_size_t


class Counts(dict[tuple[str, str], tuple[int, float]]):
    """Number of events and sum of amounts by (kind, name). README.md lists the kinds, and what their amounts are."""

    def __sub__(self, before: "Counts") -> "Counts":
        zero = (0, 0.0)
        rows = {key: (n - before.get(key, zero)[0], a - before.get(key, zero)[1]) for key, (n, a) in self.items()}
        return Counts({key: row for key, row in rows.items() if row[0]})

    def events(self, kind: str, name: str = "") -> int:
        """Return the number of events of a kind whose name contains `name`."""
        return sum(row[0] for key, row in self.items() if key[0] == kind and name in key[1])

    def amount(self, kind: str, name: str = "") -> float:
        """Return the sum of the amounts of a kind whose name contains `name`."""
        return sum(row[1] for key, row in self.items() if key[0] == kind and name in key[1])

    def names(self, kind: str) -> dict[str, int]:
        """Return the number of events by name."""
        return {key[1]: row[0] for key, row in self.items() if key[0] == kind}

    @property
    def launches(self) -> int:
        """Kernels and products."""
        return self.events("kernel") + self.events("product")

    def share(self, *types: str) -> float:
        """Return the share of the products' FLOPs whose factors are of these types: bf16, fp16, tf32, fp32."""
        return sum(self.amount("product", name) for name in types) / (self.amount("product") or 1)


def counts() -> Counts:
    """Return everything that has happened on the device so far."""
    kind, name, events, amount = ctypes.c_char_p(), ctypes.c_char_p(), ctypes.c_long(), ctypes.c_double()
    found = Counts()
    for index in range(_DEVICE.null_rows()):
        _DEVICE.null_row(index, *map(ctypes.byref, (kind, name, events, amount)))
        found[kind.value.decode(), name.value.decode()] = events.value, amount.value
    return found


@contextlib.contextmanager
def counted() -> Iterator[Counts]:
    """Count what happens within; the counts are complete when the block ends."""
    before, found = counts(), Counts()
    try:
        yield found
    finally:
        found.update(counts() - before)


@contextlib.contextmanager
def no_waits() -> Iterator[None]:
    """Raise where torch makes the host wait for the device within."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def traced() -> Iterator[list[list[str]]]:
    """List the events within, in their order: kind, name, amount and details. Complete when the block ends."""
    found: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.tsv"
        _DEVICE.null_trace(str(path).encode())
        try:
            yield found
        finally:
            _DEVICE.null_trace(b"")
            found.extend(line.split("\t") for line in path.read_text().splitlines())


@contextlib.contextmanager
def bools_are(value: bool) -> Iterator[None]:
    """Let every bool that the host reads from the device be `value` within: no kernel has computed one."""
    before = os.environ.get("NULLCUDA_BOOL")
    os.environ["NULLCUDA_BOOL"] = str(int(value))
    try:
        yield
    finally:
        del os.environ["NULLCUDA_BOOL"]
        if before is not None:
            os.environ["NULLCUDA_BOOL"] = before


def memory() -> dict[str, int]:
    """Return the bytes that are allocated on the device, their peak, and those of pinned memory."""
    return {name: getattr(_DEVICE, f"null_{name}")() for name in ("used", "peak", "pinned")}


def without_cudnn() -> None:
    """Keep torch from cuDNN, the one library of a step that is the real one and wants a real device."""
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)


def tell(name: str, value: Any) -> None:
    """Give the test a value, which JSON can write, as `told[name]`."""
    with open(os.environ["NULL_DEVICE_TELLS"], "a") as file:
        file.write(json.dumps([name, value]) + "\n")
