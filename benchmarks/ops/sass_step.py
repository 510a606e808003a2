"""This module holds what an instruction does to the integers and predicates of a warp, as `sass_walk` needs it."""

import itertools
import operator
import re
import struct
from collections.abc import Callable

from sass import Instruction
from sass_warp import MASK, Warp, parted, written

_COMPARE = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}
_TIES = {"AND": operator.and_, "OR": operator.or_, "XOR": operator.xor}


def signed(value: int) -> int:
    return value - (1 << 32) if value & 0x80000000 else value


def as_float(value: int) -> float:
    return struct.unpack("<f", struct.pack("<I", value & MASK))[0]


def as_bits(value: float) -> int:
    return int.from_bytes(struct.pack("<f", value), "little")


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
    return _smaller(w, x, a + b & MASK, c, least)


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
    w.write_words(x.operands[0], [w.bank.get(start + 4 * word) for word in range(written(x))])
    return True


def _clear(w: Warp, x: Instruction) -> bool:
    w.write_words(x.operands[0], [w.read(x.operands[1])] * written(x))
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
    function, (predicates, target, sources) = _COMPUTED.get(x.kind), parted(x)
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
        return result & MASK != 0
    # What a negated register carries is not computed; a negative number is just large.
    negated = any(source[0] in "-~" and not source[1].isdigit() for source in sources)
    return None if "IADD3" not in x.kind or negated else result > MASK


_PERFORMED: dict[str, Callable[[Warp, Instruction], bool]] = {
    **dict.fromkeys(("ISETP", "UISETP"), _compare),
    **dict.fromkeys(("PLOP3", "UPLOP3"), _combine),
    **dict.fromkeys(("LDC", "ULDC"), _load_argument),
    "CS2R": _clear,
    "HFMA2": _half_constant,
    "P2R": _pack_predicates,
    "R2P": _unpack_predicates,
}


def step(w: Warp, x: Instruction) -> None:
    """Do what an instruction does that is no jump, as far as it can be known."""
    holds = w.holds(x)
    if holds is None or (holds and not _PERFORMED.get(x.kind, _compute)(w, x)):
        w.forget(x)
