"""This module counts the PTX instructions that a thread executes: for sm_61, whose machine code no tool at hand reads.

The count says less than that of machine code: an assembler makes several instructions of a division, and none of many a
move. As in `sass_walk`, only integers are computed with, and a loop that does not depend on them alone is an error.
"""

import operator
import re
from collections import Counter
from collections.abc import Callable, Sequence

_LINE = re.compile(r"\s*(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*([^;]*);")
_LABEL = re.compile(r"\s*(\$\w+):")
_COMPARE = {"lt": "lt", "le": "le", "gt": "gt", "ge": "ge", "eq": "eq", "ne": "ne", "lo": "lt", "hi": "gt"}
_LONGEST = 2_000_000  # instructions; more is a loop that the walk does not leave


def _shift(value: int, count: int) -> int:
    return value >> min(count, 127)


def _divide(a: int, b: int) -> int:
    """Divide as C does, toward zero."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


_COMPUTED: dict[str, Callable[..., int]] = {
    "mov": lambda a: a,
    "cvt": lambda a: a,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "mad": lambda a, b, c: a * b + c,
    "div": _divide,
    "rem": lambda a, b: a - _divide(a, b) * b,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": operator.invert,
    "neg": operator.neg,
    "min": min,
    "max": max,
    "shl": lambda a, b: a << min(b, 127),
    "shr": _shift,
    "selp": lambda a, b, which: a if which else b,
    "setp": lambda a, b: None,
}


class Program:
    """This class is the PTX of a kernel: (predicate, negated, name, operands) of each instruction, and its labels."""

    def __init__(self, text: str):
        self.code: list[tuple[str, bool, str, tuple[str, ...]]] = []
        self.labels: dict[str, int] = {}
        for line in text[text.index(".entry") :].splitlines():
            if label := _LABEL.match(line):
                self.labels[label[1]] = len(self.code)
            elif match := _LINE.match(line):
                negated, predicate, name, operands = match.groups()
                # Not within the braces of what is loaded or stored at once.
                parts = re.findall(r"\{[^}]*\}|[^,{}]+", operands)
                cleaned = tuple(part.strip() for part in parts if part.strip())
                self.code.append((predicate or "", negated == "!", name, cleaned))

    def accesses(self) -> list[tuple[str, int]]:
        """Say how each instruction accesses global memory: ("load", "store" or "", bytes)."""
        found = []
        for _, _, name, _ in self.code:
            vector, bits = re.search(r"\.v(\d)", name), re.search(r"\.[bufs](\d+)$", name)
            kind = {"ld": "load", "st": "store"}.get(name.split(".")[0], "") if ".global" in name else ""
            found.append((kind, int(bits[1]) // 8 * (int(vector[1]) if vector else 1) if bits else 0))
        return found


def _typed(value: int, kind: str, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if kind == "s" and value >> bits - 1 else value


def path(program: Program, types: Sequence[str], numbers: Sequence[int | None], index: int, thread: int) -> Counter:
    """Count how often a thread of program `index` executes each instruction: {index in the code: times}."""
    arguments = [number for kind, number in zip(types, numbers) if not kind.endswith(":1")]
    values: dict[str, int | None] = {"%tid.x": thread, "%ctaid.x": index}
    counts, at = Counter(), 0

    def read(operand: str) -> int | None:
        return int(operand, 0) if re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", operand) else values.get(operand)

    for _ in range(_LONGEST):
        if at >= len(program.code):
            return counts
        predicate, negated, name, operands = program.code[at]
        counts[at] += 1
        holds = True if not predicate else read(predicate)
        holds = holds if holds is None or not negated else not holds
        if name.startswith("ret") and holds:
            return counts
        if name.startswith("bra"):
            target = program.labels[operands[0]]
            if holds is None and target <= at:
                raise RuntimeError(f"a loop depends on data, or on what the walk cannot compute: bra {operands[0]}")
            at = target if holds else at + 1
            continue
        if operands and operands[0].startswith("%"):
            values[operands[0]] = _result(name, operands, read, arguments) if holds else None
        at += 1
    raise RuntimeError(f"program {index} executes more than {_LONGEST} instructions")


def _result(name: str, operands: tuple[str, ...], read: Callable, arguments: list[int | None]) -> int | None:
    """Return what an instruction writes; None where that is unknown."""
    kind, *suffixes = name.split(".")
    if name.startswith("ld.param"):
        number = arguments[int(operands[1].rsplit("_", 1)[1].rstrip("]"))] if "param_" in operands[1] else None
        return number if isinstance(number, int) else None
    type_ = re.fullmatch(r"([sub])(\d+)|pred", suffixes[-1]) if suffixes else None
    sources = [read(operand) for operand in operands[1:]]
    if kind not in _COMPUTED or type_ is None or None in sources or "hi" in suffixes[:-1]:
        return None
    sign, bits = (type_[1], int(type_[2])) if type_[1] else ("u", 1)
    if kind == "setp":
        a, b = (_typed(source, sign, bits) for source in sources)
        return int(getattr(operator, _COMPARE[suffixes[0]])(a, b))
    typed = [_typed(source, sign, bits) for source in sources]
    if kind == "selp":
        typed[-1] = sources[-1]
    wide = 2 * bits if "wide" in suffixes else bits
    return _typed(_COMPUTED[kind](*typed), "u", wide) if sign != "s" else _COMPUTED[kind](*typed)
