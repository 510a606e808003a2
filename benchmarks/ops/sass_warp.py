"""This module holds what is known of a warp while its machine code is followed: registers and predicates."""

import functools
import re
from collections.abc import Sequence

from sass import Instruction

Value = int | bool | None  # None: unknown

MASK = 0xFFFFFFFF
PREDICATE = re.compile(r"!?U?P(\d|T)$")


@functools.cache
def _meaning(operand: str) -> tuple[str, int | bool | str]:
    """Read an operand: what kind it is, and its number, the address of an argument, or another operand."""
    if operand in ("PT", "UPT"):
        return "number", True
    if operand in ("RZ", "URZ"):
        return "number", 0
    if operand[0] == "!":
        return "not", operand[1:]
    if operand[0] == "~":
        return "inverse", operand[1:]
    if operand[0] == "-" and operand[1:2] in ("R", "U", "c"):
        return "minus", operand[1:]
    if match := re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", operand):
        return "argument", int(match[1], 16)
    if re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", operand):
        return "number", int(operand, 0) & MASK
    return "register", operand


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
        kind, content = _meaning(operand)
        if kind == "number":
            return content
        if kind in ("not", "minus", "inverse"):
            value = self.read(content)
            if value is None:
                return None
            return not value if kind == "not" else (-value if kind == "minus" else ~value) & MASK
        if kind == "argument":
            return self.bank.get(content)
        return self.special[content] if content in self.special else self.values.get(content)

    def read_next(self, register: str) -> Value:
        """Return the register behind `register`, the high word of a pair."""
        match = re.fullmatch(r"(U?R)(\d+)", register)
        return self.values.get(f"{match[1]}{int(match[2]) + 1}") if match else 0

    def write(self, target: str, value: Value) -> None:
        if target not in ("RZ", "URZ", "PT", "UPT"):
            self.values[target] = value if value is None or isinstance(value, bool) else value & MASK

    def holds(self, x: Instruction) -> bool | None:
        """Return whether an instruction's predicate lets it run; None where that is unknown."""
        value = True if not x.predicate else self.read(x.predicate)
        return value if value is None or not x.negated else not value

    def forget(self, x: Instruction) -> None:
        """Mark all that an instruction writes as unknown."""
        predicates, target, sources = parted(x)
        source = next((o for o in (x.predicate, *sources) if o and self.read(o) is None), "")
        self.unknown |= dict.fromkeys((*predicates, *filter(None, [target])), (x, source.strip("!-~|")))
        for predicate in predicates:
            self.write(predicate, None)
        if target:
            self.write_words(target, [None] * written(x))

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


@functools.cache
def parted(x: Instruction) -> tuple[list[str], str, list[str]]:
    """Part the operands of an instruction into predicates it writes, the register it writes ("" for none), sources."""
    operands, predicates = list(x.operands), []
    while operands and PREDICATE.fullmatch(operands[0]):
        predicates.append(operands.pop(0))
    if not operands or not re.fullmatch(r"U?R(\d+|Z)", operands[0]):
        return predicates, "", operands
    target = operands.pop(0)
    # Carries, of 64-bit addresses.
    while operands and re.fullmatch(r"U?P(\d|T)", operands[0]):
        predicates.append(operands.pop(0))
    return predicates, target, operands


@functools.cache
def written(x: Instruction) -> int:
    """Return how many registers an instruction writes, at most."""
    if match := re.match(r"HGMMA\.\d+x(\d+)", x.name):
        return int(match[1]) // 2
    if x.kind in ("HMMA", "IMMA", "LDSM") or ".128" in x.name:
        return 4
    wide = (".64", ".WIDE", "F64", "64H", ".S64", ".U64")
    pairs = x.kind in ("DADD", "DMUL", "DFMA", "DMMA") or x.name == "CS2R"
    return 2 if pairs or any(mark in x.name for mark in wide) else 1
