"""This module counts the instructions that a warp issues, by following its machine code from entry to exit.

What a kernel does with its data does not matter here, only which way it goes. So the walk computes with integers alone:
program number, thread number, the numbers the kernel was given, and what the code makes of them. Anything else (what
was loaded, floating-point numbers) is unknown, and so is what is made of it. Loops of our kernels depend on known
numbers; a loop that does not is an error, no guess. Two rules hold where a forward jump depends on data:

    - around a few instructions with a call: taken (the slow path of a division or a root, for subnormal numbers);
    - otherwise: not taken, so that both sides of a divergent warp are counted. Around a loop it is an error.
"""

import itertools
import operator
import re
import struct
from collections import Counter
from collections.abc import Callable, Sequence

from sass import Instruction, Program

Value = int | bool | None  # None: unknown

_MASK = 0xFFFFFFFF
# Where the arguments of a kernel begin in constant bank 0, seen in compiled kernels.
_ARGUMENTS = {70: 0x160, 75: 0x160, 80: 0x160, 86: 0x160, 89: 0x160, 90: 0x210}
_SIZES = {"fp32": 4, "i32": 4, "i64": 8}
_COMPARE = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}
_TIES = {"AND": operator.and_, "OR": operator.or_, "XOR": operator.xor}
_PREDICATE = re.compile(r"!?U?P(\d|T)$")
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
            bank[place + 4 * word] = value >> 32 * word & _MASK
        place += size
    return bank


def signed(value: int) -> int:
    return value - (1 << 32) if value & 0x80000000 else value


def as_float(value: int) -> float:
    return struct.unpack("<f", struct.pack("<I", value & _MASK))[0]


def as_bits(value: float) -> int:
    return int.from_bytes(struct.pack("<f", value), "little")


class Warp:
    """This class holds the registers and predicates of one thread, which stands for its warp."""

    def __init__(self, bank: dict[int, int], program: int, thread: int):
        self.bank = bank
        self.special = {"SR_TID.X": thread, "SR_CTAID.X": program, "SRZ": 0}
        self.special |= dict.fromkeys(("SR_TID.Y", "SR_TID.Z", "SR_CTAID.Y", "SR_CTAID.Z", "SR_CgaCtaId"), 0)
        self.values: dict[str, Value] = {}
        self.unknown: dict[str, tuple[Instruction, str]] = {}  # by register: what made it so, and from what

    def read(self, operand: str) -> Value:
        """Return an operand as an unsigned 32-bit number, or a predicate."""
        if operand[0] == "!":
            value = self.read(operand[1:])
            return None if value is None else not value
        if operand in ("PT", "UPT"):
            return True
        if operand in ("RZ", "URZ"):
            return 0
        if operand[0] == "-" and operand[1:2] in ("R", "U", "c"):
            value = self.read(operand[1:])
            return None if value is None else -value & _MASK
        if operand[0] == "~":
            value = self.read(operand[1:])
            return None if value is None else ~value & _MASK
        if match := re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", operand):
            return self.bank.get(int(match[1], 16))
        if re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", operand):
            return int(operand, 0) & _MASK
        return self.special[operand] if operand in self.special else self.values.get(operand)

    def read_next(self, register: str) -> Value:
        """Return the register behind `register`, the high word of a pair."""
        match = re.fullmatch(r"(U?R)(\d+)", register)
        return self.values.get(f"{match[1]}{int(match[2]) + 1}") if match else 0

    def write(self, target: str, value: Value) -> None:
        if target not in ("RZ", "URZ", "PT", "UPT"):
            self.values[target] = value if value is None or isinstance(value, bool) else value & _MASK

    def holds(self, x: Instruction) -> bool | None:
        """Return whether an instruction's predicate lets it run; None where that is unknown."""
        value = True if not x.predicate else self.read(x.predicate)
        return value if value is None or not x.negated else not value

    def forget(self, x: Instruction) -> None:
        """Mark all that an instruction writes as unknown."""
        predicates, target, sources = _parted(x)
        source = next((o for o in (x.predicate, *sources) if o and self.read(o) is None), "")
        self.unknown |= dict.fromkeys((*predicates, *filter(None, [target])), (x, source.strip("!-~|")))
        for predicate in predicates:
            self.write(predicate, None)
        if target:
            self.write_words(target, [None] * _written(x))

    def explain(self, operand: str) -> str:
        """Say what an unknown operand was made of, back to what could not be computed."""
        steps = []
        while operand in self.unknown and len(steps) < 12:
            x, operand = self.unknown[operand]
            steps.append(f"{x.address:#x} {x.name} {', '.join(x.operands)}")
        return " <- ".join(steps)

    def write_words(self, target: str, words: Sequence[Value]) -> None:
        """Write registers side by side, the first of them `target`."""
        name, number = re.fullmatch(r"(U?R)(\d+|Z)", target).groups()
        for index, word in enumerate(words):
            self.write(f"{name}Z" if number == "Z" else f"{name}{int(number) + index}", word)


def _parted(x: Instruction) -> tuple[list[str], str, list[str]]:
    """Part the operands of an instruction into predicates it writes, the register it writes ("" for none), sources."""
    operands, predicates = list(x.operands), []
    while operands and _PREDICATE.fullmatch(operands[0]):
        predicates.append(operands.pop(0))
    if not operands or not re.fullmatch(r"U?R(\d+|Z)", operands[0]):
        return predicates, "", operands
    target = operands.pop(0)
    # Carries, of 64-bit addresses.
    while operands and re.fullmatch(r"U?P(\d|T)", operands[0]):
        predicates.append(operands.pop(0))
    return predicates, target, operands


def _written(x: Instruction) -> int:
    """Return how many registers an instruction writes, at most."""
    if match := re.match(r"HGMMA\.\d+x(\d+)", x.name):
        return int(match[1]) // 2
    if x.kind in ("HMMA", "IMMA", "LDSM") or ".128" in x.name:
        return 4
    wide = (".64", ".WIDE", "F64", "64H", ".S64", ".U64")
    pairs = x.kind in ("DADD", "DMUL", "DFMA", "DMMA") or x.name == "CS2R"
    return 2 if pairs or any(mark in x.name for mark in wide) else 1


def _add(w: Warp, x: Instruction, *terms: int) -> int:
    return sum(terms)  # with .X the last are carries


def _shift(w: Warp, x: Instruction, low: int, count: int, high: int) -> int | None:
    if ".U64" in x.name or ".S64" in x.name:
        return None
    if ".L" in x.name:
        return low << count if count < 32 else 0
    return (signed(high) if ".S32" in x.name else high) >> min(count, 31 if ".S32" in x.name else 32)


def _lea(w: Warp, x: Instruction, a: int, b: int, c: int, d: int | None = None) -> int | None:
    if ".X" in x.name or ".SX32" in x.name:
        return None
    return (a << c) + b if ".HI" not in x.name else ((c << 32 | a) >> 32 - d) + b


def _multiply(w: Warp, x: Instruction, a: int, b: int, c: int, carry: int = 0) -> int | None:
    if ".HI" in x.name:
        # The third operand is a pair of registers.
        high = w.read_next(x.operands[-1])
        product = a * b if ".U32" in x.name else signed(a) * signed(b)
        return None if high is None else product + (high << 32 | c) >> 32
    return a * b + c + carry


def _logic(w: Warp, x: Instruction, a: int, b: int, c: int, table: int, _=None) -> int:
    found = 0
    for index in range(8):
        if table >> index & 1:
            found |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    return found


def _permute(w: Warp, x: Instruction, a: int, selector: int, b: int) -> int:
    both, found = b << 32 | a, 0
    for index in range(4):
        choice = selector >> 4 * index & 15
        byte = both >> 8 * (choice & 7) & 255
        found |= (byte if choice < 8 else 255 * (byte >> 7)) << 8 * index
    return found


def _extend(w: Warp, x: Instruction, a: int, bits: int) -> int:
    low = a & ((1 << bits) - 1)
    return low if ".U32" in x.name or not low >> bits - 1 else low - (1 << bits)


def _smaller(w: Warp, x: Instruction, a: int, b: int, least: bool) -> int:
    key = int if ".U32" in x.name else signed
    return (min if least else max)(a, b, key=key)


def _smaller_sum(w: Warp, x: Instruction, a: int, b: int, c: int, least: bool) -> int:
    return _smaller(w, x, a + b & _MASK, c, least)


def _to_float(w: Warp, x: Instruction, a: int) -> int | None:
    if "F64" in x.name:
        return None
    number = float(a if ".U" in x.name else signed(a))
    bits = as_bits(number)
    return bits + (".RP" in x.name and as_float(bits) < number)


def _reciprocal(w: Warp, x: Instruction, a: int) -> int | None:
    return as_bits(1 / as_float(a)) if ".RCP" in x.name and "64H" not in x.name and as_float(a) else None


# What the walk can compute, of operands that are known; None: unknown after all.
_COMPUTED: dict[str, Callable[..., int | None]] = {
    **dict.fromkeys(("IADD3", "UIADD3", "VIADD"), _add),
    **dict.fromkeys(("IMAD", "UIMAD"), _multiply),
    **dict.fromkeys(("SHF", "USHF"), _shift),
    **dict.fromkeys(("LEA", "ULEA"), _lea),
    **dict.fromkeys(("LOP3", "ULOP3"), _logic),
    **dict.fromkeys(("PRMT", "UPRMT"), _permute),
    **dict.fromkeys(("SGXT", "USGXT"), _extend),
    **dict.fromkeys(("IMNMX", "VIMNMX", "UIMNMX"), _smaller),
    "VIADDMNMX": _smaller_sum,
    **dict.fromkeys(("MOV", "UMOV", "R2UR", "S2R", "S2UR"), lambda w, x, a, *_: a),
    **dict.fromkeys(("SEL", "USEL"), lambda w, x, a, b, which: a if which else b),
    "IABS": lambda w, x, a: abs(signed(a)),
    **dict.fromkeys(("I2F", "I2FP"), _to_float),
    "MUFU": _reciprocal,
    "F2I": lambda w, x, a: int(as_float(a)) if "TRUNC" in x.name and "F64" not in x.name else None,
}


def _compare(w: Warp, x: Instruction) -> bool:
    first, second, a, b, tie = x.operands[:5]
    parts = x.name.split(".")
    a, b, tie, low = w.read(a), w.read(b), w.read(tie), w.read(x.operands[-1])
    if None in (a, b, tie, low):
        return False
    a, b = (a, b) if "U32" in parts else (signed(a), signed(b))
    combine = next(_TIES[part] for part in parts if part in _TIES)
    compare = next(_COMPARE[part] for part in parts if part in _COMPARE)
    # EX: of the high words, after the low words were compared.
    holds = low if "EX" in parts and a == b else compare(a, b)
    w.write(first, combine(holds, tie))
    w.write(second, combine(not holds, tie))
    return True


def _combine(w: Warp, x: Instruction) -> bool:
    first, second, *sources, table, other = x.operands
    choices = [(False, True) if value is None else (value,) for value in map(w.read, sources)]
    for target, text in ((first, table), (second, other)):
        # A predicate that the table does not look at may be unknown.
        found = {bool(int(text, 16) >> (4 * i + 2 * j + k) & 1) for i, j, k in itertools.product(*choices)}
        w.write(target, found.pop() if len(found) == 1 else None)
    return True


def _load_argument(w: Warp, x: Instruction) -> bool:
    address = re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", x.operands[1])
    if address is None:
        return False
    start = int(address[1], 16)
    w.write_words(x.operands[0], [w.bank.get(start + 4 * word) for word in range(_written(x))])
    return True


def _clear(w: Warp, x: Instruction) -> bool:
    w.write_words(x.operands[0], [w.read(x.operands[1])] * _written(x))
    return True


def _half_constant(w: Warp, x: Instruction) -> bool:
    """Treat HFMA2 of zeros, a constant in two halves: HFMA2.MMA R3, -RZ, RZ, 1.875, 0 is 1.0 in float32."""
    target, a, b, *halves = x.operands
    if (a, b) != ("-RZ", "RZ"):
        return False
    high, low = (int.from_bytes(struct.pack("<e", float(half)), "little") for half in halves)
    w.write(target, high << 16 | low)
    return True


def _pack_predicates(w: Warp, x: Instruction) -> bool:
    target, _, _, mask = x.operands
    wanted = [index for index in range(7) if int(mask, 16) >> index & 1]
    values = [w.read(f"P{index}") for index in wanted]
    if None in values:
        return False
    w.write(target, sum(1 << index for index, value in zip(wanted, values) if value))
    return True


def _unpack_predicates(w: Warp, x: Instruction) -> bool:
    _, source, mask = x.operands
    value = w.read(source)
    for index in range(7):
        if int(mask, 16) >> index & 1:
            w.write(f"P{index}", None if value is None else bool(value >> index & 1))
    return True


def _multiply_wide(w: Warp, x: Instruction, target: str, sources: list[str]) -> bool:
    a, b, low = (w.read(source) for source in sources)
    high = w.read_next(sources[2])
    if None in (a, b, low, high):
        return False
    product = (a * b if ".U32" in x.name else signed(a) * signed(b)) + (high << 32 | low)
    w.write_words(target, [product, product >> 32])
    return True


def _compute(w: Warp, x: Instruction) -> bool:
    function, (predicates, target, sources) = _COMPUTED.get(x.kind), _parted(x)
    if function is None or not (target or predicates):
        return False
    if ".WIDE" in x.name:
        return _multiply_wide(w, x, target, sources)
    values = [w.read(source) for source in sources]
    result = None if None in values else function(w, x, *values)
    if result is None:
        return False
    w.write(target, result)
    for predicate in predicates:
        w.write(predicate, _test_or_carry(x, sources, result))
    return True


def _test_or_carry(x: Instruction, sources: list[str], result: int) -> bool | None:
    """Return what LOP3 writes to a predicate, whether a bit is set, or IADD3, the carry."""
    if "LOP3" in x.kind:
        return result & _MASK != 0
    return None if "IADD3" not in x.kind or any(source[0] in "-~" for source in sources) else result > _MASK


_PERFORMED: dict[str, Callable[[Warp, Instruction], bool]] = {
    **dict.fromkeys(("ISETP", "UISETP"), _compare),
    **dict.fromkeys(("PLOP3", "UPLOP3"), _combine),
    **dict.fromkeys(("LDC", "ULDC"), _load_argument),
    "CS2R": _clear,
    "HFMA2": _half_constant,
    "P2R": _pack_predicates,
    "R2P": _unpack_predicates,
}


def _step(w: Warp, x: Instruction) -> None:
    """Do what an instruction does that is no jump, as far as it can be known."""
    holds = w.holds(x)
    if holds is None or (holds and not _PERFORMED.get(x.kind, _compute)(w, x)):
        w.forget(x)


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
            conditions = [holds, *(w.read(o) for o in x.operands if _PREDICATE.fullmatch(o))]
            taken = False if False in conditions else None if None in conditions else True
            if taken is None:
                taken = _guess(w, code, at, place)
            if taken:
                if x.kind == "CALL":
                    calls.append(at + 1)
                at = place[x.target]
                continue
        elif x.kind not in ("EXIT", "RET", "BRA"):
            _step(w, x)
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
