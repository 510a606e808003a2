"""This module reads the machine code (SASS) of a compiled kernel: instructions, loops, registers, occupancy."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

_TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?)(U?P\w+)\s+)?([A-Z]\S*)\s*([^;/]*);")


class Instruction(NamedTuple):
    """This class is one instruction: `@!P0 ISETP.GE.AND P1, PT, R2, RZ, PT`.

    Attributes: address in bytes; the predicate it needs ("" for none) and whether that must be false; its name with
    all suffixes; its operands.
    """

    address: int
    predicate: str
    negated: bool
    name: str
    operands: tuple[str, ...]

    @property
    def kind(self) -> str:
        """Return the name without suffixes."""
        return self.name.split(".")[0]

    @property
    def target(self) -> int | None:
        """Return the address of a jump or call."""
        if self.kind not in ("BRA", "CALL"):
            return None
        return next((int(x, 16) for x in self.operands if x.startswith("0x")), None)

    @property
    def access(self) -> str:
        """Say how the instruction accesses global memory: "load" (also straight into shared memory), "store" or ""."""
        return {"LDG": "load", "LDGSTS": "load", "STG": "store"}.get(self.kind, "")

    @property
    def width(self) -> int:
        """Return the bytes a thread loads or stores."""
        for suffix, width in ((".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1), (".S8", 1)):
            if suffix in self.name:
                return width
        return 4


class Program(NamedTuple):
    """This class is a kernel's machine code and what one program of it needs.

    Attributes: its instructions; registers per thread; bytes spilled per thread; bytes of shared memory.
    """

    code: list[Instruction]
    registers: int
    spilled: int
    shared: int


def _cuobjdump(option: str, path: str) -> str:
    return subprocess.run([_TOOL, option, path], check=True, capture_output=True, text=True).stdout


def usage(cubin: bytes) -> dict[str, int]:
    """Return REG, STACK and LOCAL of the kernel in a cubin: registers per thread, and bytes per thread that spilled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _cuobjdump("--dump-resource-usage", file.name)
    line = next(line for line in text.splitlines() if "REG:" in line)
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}


def disassemble(cubin: bytes, shared: int) -> Program:
    """Return the machine code of the kernel in a cubin (sm_70 and newer), which takes `shared` bytes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _cuobjdump("-sass", file.name)
    found = usage(cubin)
    return Program(parse(text), found["REG"], found["STACK"] + found["LOCAL"], shared)


def parse(text: str) -> list[Instruction]:
    """Return the instructions of a listing of cuobjdump."""
    code = []
    for address, negated, predicate, name, operands in _LINE.findall(text):
        cleaned = tuple(x.strip().removesuffix(".reuse") for x in operands.split(",")) if operands.strip() else ()
        code.append(Instruction(int(address, 16), predicate, negated == "!", name, cleaned))
    return code


def loops(code: list[Instruction]) -> list[tuple[int, int]]:
    """Return (first, last) index of the instructions of each loop: what a jump backwards encloses."""
    place = {x.address: index for index, x in enumerate(code)}
    found = []
    for index, x in enumerate(code):
        # A jump to itself is the padding behind the last EXIT.
        if x.kind == "BRA" and x.target in place and place[x.target] < index:
            found.append((place[x.target], index))
    return sorted(found)


class Multiprocessor(NamedTuple):
    """This class is what one multiprocessor holds: 32-bit registers, bytes of shared memory, warps, and programs."""

    registers: int
    shared: int
    warps: int
    programs: int


# Compute capability: CUDA C++ Programming Guide, technical specifications per compute capability.
MULTIPROCESSORS = {
    61: Multiprocessor(65536, 96 * 1024, 64, 32),
    70: Multiprocessor(65536, 96 * 1024, 64, 32),
    75: Multiprocessor(65536, 64 * 1024, 32, 16),
    80: Multiprocessor(65536, 164 * 1024, 64, 32),
    86: Multiprocessor(65536, 100 * 1024, 48, 16),
    89: Multiprocessor(65536, 100 * 1024, 48, 24),
    90: Multiprocessor(65536, 228 * 1024, 64, 32),
    100: Multiprocessor(65536, 228 * 1024, 64, 32),
    120: Multiprocessor(65536, 100 * 1024, 48, 24),
}


def resident(architecture: int, warps: int, registers: int, shared: int) -> tuple[int, str]:
    """Return how many warps a multiprocessor holds at once, and what limits them.

    Registers are given to a warp in units of 256, and each program takes 1 kB of shared memory for the system from
    compute capability 8.0 on (CUDA occupancy calculator).
    """
    has = MULTIPROCESSORS[architecture]
    per_warp = -(-registers * 32 // 256) * 256
    per_program = -(-(shared + (1024 if architecture >= 80 else 0)) // 128) * 128
    most = {"registers": has.registers // per_warp // warps, "warps": has.warps // warps, "programs": has.programs}
    if per_program:
        most["shared memory"] = has.shared // per_program
    limit = min(most, key=most.get)
    return most[limit] * warps, limit
