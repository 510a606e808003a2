"""Every test runs with poisoned memory, a fixed seed and no default device.

Without a CUDA device the Triton kernels run in Triton's interpreter, on the CPU.
"""

import errno
import gc
import os
import resource
from pathlib import Path

# Threads that wait do not spin: the tests stay fast on a machine that is doing something else too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Each of several test processes has a core to itself.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image

# Read by Triton when a kernel is first decorated; whoever sets it (to 0 or 1) decides.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config):
    # Memory from torch.empty is filled with NaN, so that reading what nobody wrote shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """What a test prints need not be text; what one test process tells another must be."""
    report = yield
    report.sections = [(name, said.encode("utf-8", "backslashreplace").decode()) for name, said in report.sections]
    return report


# Tests that took more than 0.75 seconds of processor time when last measured: left to `make test-slow`.
SLOW = frozenset((Path(__file__).parent / "slow.txt").read_text().splitlines())


# First, so that `-m gpu` and `-m slow` see the marks.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if item.nodeid in SLOW:
            item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        # Every test of a kernel is a GPU test where there is a GPU.
        for item in items:
            if "device" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.gpu)
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def device() -> torch.device:
    """Where kernels are tested: the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _indexes_elsewhere(tmp_path_factory):
    """Indexes made by these tests are not put into the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _freed_memory_is_returned():
    """A training process keeps what it frees; one that runs a thousand tests would grow to many times what it uses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ccmim_fast.engine.build.keep_freed_memory", lambda: False)
        yield


@pytest.fixture(autouse=True)
def _large_cycles_are_collected():
    """A step holds itself in a cycle, which Python's collector may leave for long: a ViT-B's has 1.4 GB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > 2**18:  # kB
        gc.collect()


@pytest.fixture
def full(monkeypatch) -> set[int]:
    """Steps whose checkpoints find the disk full."""
    from ccmim_fast.checkpoints import io

    steps, write = set(), io._write

    def written(new, step, *rest):
        if step in steps:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(new, step, *rest)

    monkeypatch.setattr(io, "_write", written)
    return steps


@pytest.fixture(scope="session")
def photograph():
    """An RGB image of 400 x 300 pixels with no symmetry."""
    from ccmim_fast.data.made.photos import photo_path

    with Image.open(photo_path("astronaut.png")) as image:
        return image.convert("RGB").crop((40, 0, 440, 300))


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory, photograph):
    """Two classes of 11 JPEG and PNG files each, of different sizes."""
    root = tmp_path_factory.mktemp("photos")
    for index in range(22):
        folder = root / f"class{index % 2}"
        folder.mkdir(exist_ok=True)
        size = (60 + 5 * index, 150 - 4 * index)
        crop = photograph.crop((index, index, index + size[0], index + size[1]))
        crop.save(folder / f"{index:02d}.{'png' if index % 4 == 3 else 'jpg'}")
    return root


@pytest.fixture
def write_image():
    """write_image(path, height, width, seed=0): a PNG of noise."""

    def write(path, height=8, width=8, seed=0):
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, format="PNG")

    return write
