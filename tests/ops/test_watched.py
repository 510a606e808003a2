"""The watched interpreter tells of each kind of misuse, and of nothing else."""

from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from ops.accesses import MisuseError
from ops.watched import watched

from ccmim_kernels.triton_impl.launch import INTERPRETED, launch

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels run on the GPU, where nothing is watched")


@triton.jit(do_not_specialize=["first", "step", "count"])
def copy_kernel(
    source_ptr,  # [N] fp32
    target_ptr,  # [N] fp32, out
    first,
    step,
    count,
    BLOCK: tl.constexpr,
):
    """Program p copies the `count` elements from `first` + p * `step` on."""
    place = first + tl.program_id(0) * step + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < count
    x = tl.load(source_ptr + place, mask=inside)
    tl.store(target_ptr + place, x, mask=inside)


@triton.jit
def neighbour_kernel(
    source_ptr,  # [N] fp32
    between_ptr,  # [N] fp32, out where between_is_output
    target_ptr,  # [N] fp32, out
    between_is_output,
    N: tl.constexpr,
    WRITE: tl.constexpr,
    BARRIER: tl.constexpr,
    AGAIN: tl.constexpr,
):
    """Reverse `source` by way of `between`."""
    place = tl.arange(0, N)
    x = tl.load(source_ptr + place)
    if WRITE:
        tl.store(between_ptr + place, x)  # first
    if BARRIER:
        tl.debug_barrier()
    x = tl.load(between_ptr + N - 1 - place)
    if AGAIN:
        tl.store(between_ptr + place, x)
    tl.store(target_ptr + place, x)


@triton.jit
def total_kernel(
    source_ptr,  # [N] fp32
    total_ptr,  # [1] fp32, out
    shares_ptr,  # [programs] fp32, out
    N: tl.constexpr,
    LANES: tl.constexpr,
):
    """Each program adds what is in `total`, to which the first one writes."""
    program = tl.program_id(0)
    x = tl.load(source_ptr + tl.arange(0, N))
    if program == 0:
        if LANES:
            tl.store(total_ptr + tl.arange(0, N) // N, x)
        else:
            tl.store(total_ptr, tl.sum(x))
        tl.debug_barrier()
    tl.store(shares_ptr + program, tl.load(total_ptr))


@triton.jit
def last_kernel(
    source_ptr,  # [N] fp32
    target_ptr,  # [1] fp32, out
    N: tl.constexpr,
):
    """Program 1 writes the sum that all programs have computed."""
    x = tl.load(source_ptr + tl.arange(0, N))
    tl.debug_barrier()
    if tl.program_id(0) == 1:
        tl.store(target_ptr, tl.sum(x))


def line(text):
    """Return a pattern for the place of the one line of this file that reads so."""
    (number,) = (n for n, read in enumerate(Path(__file__).read_text().splitlines(), 1) if read.strip() == text)
    return rf"test_watched\.py:{number}"


COPIED = line("tl.store(target_ptr + place, x, mask=inside)")
STORED = line("tl.store(between_ptr + place, x)  # first")
REVERSED = line("x = tl.load(between_ptr + N - 1 - place)")


def copy(source, target, first=0, step=4, count=4, programs=2):
    launch(copy_kernel, programs, source, target, first, step, count, BLOCK=8, warps=1)


def reverse(source, between, output=1, write=True, barrier=True, again=False):
    options = {"N": len(source), "WRITE": write, "BARRIER": barrier, "AGAIN": again}
    launch(neighbour_kernel, 1, source, between, torch.empty_like(source), output, **options, warps=1)


def test_what_is_right_is_not_told_of():
    source, target = torch.randn(8), torch.empty(8)
    copy(source, target)
    assert torch.equal(target, source)
    # Strided views, whose gaps nobody touches; a storage may hold what is read and what is written.
    table = torch.randn(4, 2, 3)
    before = table.clone()
    copy(table[:, 0], table[:, 1], step=6, count=3, programs=4)
    assert torch.equal(table[:, 1], before[:, 0])
    reverse(torch.randn(8), torch.empty(8))
    reverse(torch.randn(8), torch.randn(8), output=0, write=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"count": 5},
            r"copy_kernel: program 1 reads source_ptr\[8\] of shape \[8\], which is outside the view \(at test_",
        ),
        ({"first": -1}, r"program 0 reads source_ptr\[-1\] of shape \[8\], which is outside the view"),
        ({"first": 2**30, "step": 0}, r"reads source_ptr\[1073741824\]"),
        ({"count": 3}, r"copy_kernel: leaves 2 of 8 elements unwritten, first target_ptr\[3\] of shape \[8\]"),
        ({"step": 3}, rf"program 1 writes target_ptr\[3\].*, which program 0 wrote at {COPIED} \(at {COPIED}"),
    ],
)
def test_places(options, message):
    with pytest.raises(MisuseError, match=message):
        copy(torch.randn(8), torch.empty(8), **options)


def test_a_target_that_is_too_short():
    with pytest.raises(
        MisuseError, match=r"program 1 writes target_ptr\[7\] of shape \[7\], which is outside the view"
    ):
        copy(torch.randn(8), torch.empty(7))


def test_a_view_ends_where_its_storage_goes_on():
    source, target = torch.randn(4, 2, 3), torch.empty(4, 2, 3)
    with pytest.raises(MisuseError, match=r"reads source_ptr\[24\] of shape \[4, 3\], which is outside the view"):
        copy(source[:, 0], target[:, 0], step=6, count=3, first=6, programs=4)
    with pytest.raises(MisuseError, match=r"program 0 reads source_ptr\[3\] of shape \[4, 3\], which is outside"):
        copy(source[:, 0], target, step=6, count=4, programs=4)
    with pytest.raises(MisuseError, match=r"leaves 3 of 12 elements unwritten, first target_ptr\[3, 0\]"):
        copy(source, target[:, 1], first=0, step=6, count=3, programs=3)


def test_an_offset_that_ends_in_another_tensor_is_outside():
    both = torch.randn(16)
    with pytest.raises(MisuseError, match=r"reads source_ptr\[8\]"):
        copy(both[:8], both[8:], first=8, programs=1, count=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"barrier": False}, rf"reads between_ptr\[7\].* it wrote at {STORED}, with no barrier .* \(at {REVERSED}\)"),
        ({"again": True}, rf"writes between_ptr\[0\].* it read at {REVERSED}, with no barrier in between"),
        ({"write": False}, r"reads between_ptr\[7\] of shape \[8\], which nobody has written"),
        ({"output": 0}, r"writes between_ptr\[0\] of shape \[8\], which is not declared an output"),
    ],
)
def test_order_within_a_program(options, message):
    with pytest.raises(MisuseError, match=message):
        reverse(torch.randn(8), torch.randn(8), **options)


def test_order_between_programs():
    totals = torch.empty(1), torch.empty(2)
    with pytest.raises(MisuseError, match=r"program 1 reads total_ptr\[0\] .* program 0 wrote at"):
        launch(total_kernel, 2, torch.randn(8), *totals, N=8, LANES=False, warps=1)
    with pytest.raises(MisuseError, match=r"program 0 writes total_ptr\[0\] of shape \[1\], twice, from two lanes"):
        launch(total_kernel, 2, torch.randn(8), *totals, N=8, LANES=True, warps=1)
    # Program 1 writes what program 0 has read.
    row = torch.randn(12)
    with pytest.raises(MisuseError, match=r"program 1 writes target_ptr\[4\] .* program 0 read at"):
        copy(row[4:], row[:8], programs=2, step=4)
    launch(last_kernel, 2, row[4:], row[:1], N=8, warps=1)
    with pytest.raises(MisuseError, match=r"program 1 writes target_ptr\[0\] .* program 0 read at"):
        launch(last_kernel, 2, row[:8], row[:1], N=8, warps=1)


def test_chosen_programs():
    source, target = torch.randn(40), torch.zeros(40)
    with watched(programs=(1, -1)):
        copy(source, target, programs=10)
    assert target.nonzero().flatten().tolist() == [4, 5, 6, 7, 36, 37, 38, 39]
