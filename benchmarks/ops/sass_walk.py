"""This module counts the instructions that a warp issues, by following its machine code from entry to exit.

What a kernel does with its data does not matter here, only which way it goes. So the walk computes with integers alone:
program number, thread number, the numbers the kernel was given, and what the code makes of them. Anything else (what
was loaded, floating-point numbers) is unknown, and so is what is made of it. Loops of our kernels depend on known
numbers; a loop that does not is an error, no guess. Two rules hold where a forward jump depends on data:

    - around a few instructions with a call: taken (the slow path of a division or a root, for subnormal numbers);
    - otherwise: not taken, so that both sides of a divergent warp are counted. Around a loop it is an error.
"""

import struct
from collections import Counter
from collections.abc import Sequence

from sass import Instruction, Program
from sass_step import step
from sass_warp import MASK, PREDICATE, Warp

# Where the arguments of a kernel begin in constant bank 0, seen in compiled kernels.
_ARGUMENTS = {70: 0x160, 75: 0x160, 80: 0x160, 86: 0x160, 89: 0x160, 90: 0x210}
_SIZES = {"fp32": 4, "i32": 4, "i64": 8}
_SLOW_PATH = 16  # instructions around a call, seen in compiled kernels: at most 10
_LONGEST = 2_000_000  # instructions; more is a loop that the walk does not leave


def argument_bank(architecture: int, types: Sequence[str], numbers: Sequence[int | float | None]) -> dict[int, int]:
    """Lay the arguments of a launch into constant bank 0: words by their address; types as in `Launch.arguments`."""
    bank, place = {}, _ARGUMENTS[architecture]
    for index, (kind, number) in enumerate(zip(types, numbers)):
        kind, _, special = kind.partition(":")
        if special == "1":
            continue  # a constant of the compiled kernel
        size = _SIZES.get(kind, 8)
        place = -(-place // size) * size
        # Each tensor has a place of its own, far from the others.
        value = (index + 1) << 40 if number is None else number
        if isinstance(value, float):
            value = int.from_bytes(struct.pack("<f", value), "little")
        for word in range(size // 4):
            bank[place + 4 * word] = value >> 32 * word & MASK
        place += size
    return bank


def path(program: Program, bank: dict[int, int], index: int, thread: int) -> Counter:
    """Count how often a warp issues each instruction: {index in the code: times}."""
    w, code = Warp(bank, index, thread), program.code
    place = {x.address: number for number, x in enumerate(code)}
    counts, calls, at = Counter(), [], 0
    for _ in range(_LONGEST):
        x = code[at]
        counts[at] += 1
        holds = w.holds(x)
        if x.kind == "EXIT" and holds:
            return counts
        if x.kind == "RET" and holds and calls:
            at = calls.pop()
            continue
        if x.target is not None and x.name != "BRA.DIV":
            conditions = [holds, *(w.read(o) for o in x.operands if PREDICATE.fullmatch(o))]
            taken = False if False in conditions else None if None in conditions else True
            if taken is None:
                taken = _guess(w, code, at, place)
            if taken:
                if x.kind == "CALL":
                    calls.append(at + 1)
                at = place[x.target]
                continue
        elif x.kind not in ("EXIT", "RET", "BRA"):
            step(w, x)
        at += 1
    raise RuntimeError(f"program {index} issues more than {_LONGEST} instructions")


def _guess(w: Warp, code: list[Instruction], at: int, place: dict[int, int]) -> bool:
    """Say whether a jump that depends on data is taken, by the rules above."""
    x = code[at]
    to = place[x.target]
    if x.kind == "CALL":
        return False
    skipped = code[at + 1 : to]
    if to <= at or any(y.kind == "BRA" and y.target <= y.address for y in skipped):
        operand = next(o for o in (x.predicate, *x.operands) if o and w.read(o) is None)
        raise RuntimeError(f"a loop depends on data at {x.address:#x}, or on: {w.explain(operand.strip('!'))}")
    return len(skipped) <= _SLOW_PATH and any(y.kind == "CALL" for y in skipped)
