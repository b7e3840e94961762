"""Counts what a warp executes of a kernel's machine code, by following its control flow without a GPU.

Integers that follow from the program's number, the thread's number and the kernel's arguments are computed, so branches
and trips of loops that depend on them are those of the device. What comes from memory, but for tensors of
``Compiled.known``, or from floating-point arithmetic, is *data*: a forward branch that depends on data is taken, for it
skips what is rare (the slow path of a division, what only the last program does). A branch that depends on an
instruction that is not known here raises.
"""

from __future__ import annotations

import functools
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.gpu.compiled import Compiled

_PARAMETERS_AT = {80: 0x160, 89: 0x160, 90: 0x210, 100: 0x380}
"""Where arguments begin in the constant bank, by capability."""
_MOST_INSTRUCTIONS = 200_000
_DATA, _UNKNOWN = "data", "unknown"
_MASK = 0xFFFFFFFF
Value = int | str


@dataclass(frozen=True)
class Instruction:
    """One line of a listing: ``@!P0 ISETP.GE.AND P1, PT, R0, 0x3, PT``.

    Attributes:
        guard: ``"!P0"``, or empty.
        opcode: with its suffixes.
        operands: as they are written.
    """

    guard: str
    opcode: str
    operands: tuple[str, ...]

    @functools.cached_property
    def base(self) -> str:
        """The opcode without suffixes and without the mark of the uniform datapath."""
        base = self.opcode.split(".")[0]
        return base[1:] if base[:1] == "U" and base[1:] in {*_COMPUTED, *_PREDICATES} else base

    @functools.cached_property
    def split(self) -> tuple[list[str], tuple[str, ...]]:
        """Registers and predicates that it writes, the main one first; and its sources."""
        return _split(self)


@dataclass(frozen=True)
class Listing:
    """The machine code of one kernel.

    Attributes:
        instructions: in order.
        labels: number of the instruction behind each.
        capability: of the GPU.
        registers: of a thread.
        spills: instructions anywhere in it that keep a register in memory, or take it back.
    """

    instructions: list[Instruction]
    labels: dict[str, int]
    capability: int
    registers: int
    spills: int


def tool(name: str) -> str:
    """Path of a program of Triton's package: ``nvdisasm``."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


_REGISTERS = re.compile(r"EIATTR_REGCOUNT\n.*?\.word\s+index@.*?\.word\s+0x([0-9a-f]+)", re.DOTALL)


@functools.lru_cache(maxsize=64)
def listing(cubin: bytes, capability: int) -> Listing:
    """Disassemble a kernel. The whole file is read, not its code alone, for that names the registers too.

    Codecs share kernels, and ``nvdisasm`` takes half a second to start: one of a table is read once.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool("nvdisasm"), "--no-dataflow", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = _REGISTERS.findall(text)
    if not found:
        raise RuntimeError(f"nvdisasm names no registers: {text[:2000]!r}")
    return parsed(text, capability, max(int(count, 16) for count in found))


_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?PT?\d*)\s+)?([A-Z][A-Z0-9_.a-z]*)\s*(.*?)\s*;")


def parsed(text: str, capability: int, registers: int) -> Listing:
    """A listing from the text of ``nvdisasm``."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        label = re.match(r"^(\.L_\S+|\$\S+|[A-Za-z_]\w*):", line)
        if label:
            labels[label[1]] = len(instructions)
            continue
        one = _LINE.match(line)
        if one:
            operands = tuple(part.strip() for part in one[3].split(",")) if one[3] else ()
            instructions.append(Instruction(one[1] or "", one[2], operands))
    spills = sum(one.opcode.split(".")[0] in ("LDL", "STL") for one in instructions)
    return Listing(instructions, labels, capability, registers, spills)


@dataclass
class Executed:
    """What one warp executes.

    Attributes:
        instructions: all that are issued.
        loads, stores: of global memory, by bits of a thread.
        shared: of shared memory.
        opcodes: all of them by their names without suffixes.
    """

    instructions: int = 0
    loads: Counter[int] = field(default_factory=Counter)
    stores: Counter[int] = field(default_factory=Counter)
    shared: int = 0
    opcodes: Counter[str] = field(default_factory=Counter)


_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}


def _signed(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value


def _bits(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def _float(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def _multiplied(one: Instruction, a: int, b: int, c: int, *carry: int) -> int:
    if ".HI" not in one.opcode:
        return a * b + c + sum(carry)
    product = a * b if ".U32" in one.opcode else _signed(a) * _signed(b)
    return (product + c) >> 32  # c is of 64 bits


def _shifted(one: Instruction, low: int, by: int, high: int) -> int:
    if ".U64" in one.opcode or ".S64" in one.opcode or ".W" in one.opcode:
        raise NotImplementedError
    by = min(by, 32)
    if ".L" in one.opcode:
        return high << by if ".HI" in one.opcode else low << by
    value = high if ".HI" in one.opcode else low
    return (_signed(value) if ".S32" in one.opcode else value) >> by


def _logic(one: Instruction, *values: int) -> int:
    """``LOP3``: three values and a table of eight bits."""
    a, b, c, table = values[:4]
    result = 0
    for case in range(8):
        if table >> case & 1:
            chosen = (a if case & 4 else ~a) & (b if case & 2 else ~b) & (c if case & 1 else ~c)
            result |= chosen
    return result


def _shifted_sum(one: Instruction, a: int, b: int, *rest: int) -> int:
    if ".X" in one.opcode:
        raise NotImplementedError
    if ".HI" not in one.opcode:
        return (a << rest[0]) + b
    high, by = (rest[0], rest[1]) if len(rest) > 1 else (0, rest[0])
    wide = _signed(a) if ".SX32" in one.opcode else high << 32 | a
    return (wide >> (32 - by)) + b


def _extended(one: Instruction, value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value if ".U32" in one.opcode or not value >> (bits - 1) else value - (1 << bits)


def _least(one: Instruction, a: int, b: int, most: int) -> int:
    if ".U32" not in one.opcode:
        a, b = _signed(a), _signed(b)
    return min(a, b) if most else max(a, b)


def _permuted(one: Instruction, a: int, chosen: int, b: int) -> int:
    """``PRMT``: four of eight bytes, or their signs."""
    if "." in one.opcode:
        raise NotImplementedError
    result = 0
    for place in range(4):
        number = chosen >> 4 * place & 15
        byte = (b << 32 | a) >> 8 * (number & 7) & 0xFF
        result |= (byte if number < 8 else 0xFF * (byte >> 7)) << 8 * place
    return result


_COMPUTED: dict[str, Callable[..., int]] = {
    "MOV": lambda one, a, *_: a,
    "IMAD": _multiplied,
    "IADD3": lambda one, a, b, c, *carries: a + b + c + sum(carries),
    "VIADD": lambda one, a, b: a + b,
    "IADD": lambda one, a, b: a + b,
    "SHF": _shifted,
    "LOP3": _logic,
    "LEA": _shifted_sum,
    "SEL": lambda one, a, b, first: a if first else b,
    "SGXT": _extended,
    "PRMT": _permuted,
    "IMNMX": _least,
    "VIMNMX": _least,
    "IABS": lambda one, a: abs(_signed(a)),
    "R2UR": lambda one, a: a,
    "I2F": lambda one, a: _bits(float(a if ".U32" in one.opcode else _signed(a))),
    "PLOP3": lambda one, a, b, c, table, *_: table >> (a << 2 | b << 1 | c) & 1,
    "F2I": lambda one, a: int(_float(a)),
}
"""The low 32 bits of what an instruction makes of its sources; a predicate is 0 or 1."""

_COMPARED: dict[str, Callable[[int, int], bool]] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}
_PREDICATES = ("ISETP", "PLOP3")
_HAPPENED = ("ELECT", "SYNCS", "UTCATOMSWS")
"""The first thread is elected, what it waits for in shared memory is there, and so is the tensor memory it asks for."""

_FROM_DATA = re.compile(r"LD[GSL]?$|LDSM|ATOM|RED|SHFL|VOTE|MATCH|[FHD](ADD|MUL|FMA|SETP|SEL|MNMX|SET|CHK)|F2F|MUFU")
_REGISTER, _PREDICATE = re.compile(r"U?R(\d+|Z)$"), re.compile(r"!?U?P(\d+|T)$")


class _Warp:
    """The first thread of one warp of one program."""

    def __init__(
        self,
        code: Listing,
        constants: Mapping[int, int],
        memory: Mapping[int, int],
        program: int,
        warp: int,
    ) -> None:
        self.code, self.constants, self.memory = code, constants, memory
        self.special = {"SR_TID.X": 32 * warp, "SR_CTAID.X": program, "SR_LANEID": 0, "SRZ": 0, "SR_CgaCtaId": 0}
        self.held: dict[str, Value] = {}
        self.seen = Executed()

    def run(self) -> Executed:
        at = 0
        while True:
            one = self.code.instructions[at]
            self.seen.instructions += 1
            if self.seen.instructions > _MOST_INSTRUCTIONS:
                raise RuntimeError(f"more than {_MOST_INSTRUCTIONS} instructions of one thread: an endless loop?")
            self.seen.opcodes[one.base] += 1
            guard = self.value(one.guard) if one.guard else 1
            if one.base == "EXIT" and self._goes(one, guard, forward=True):
                return self.seen
            label = one.operands[-1].strip("`()") if one.base in ("BRA", "CALL") else ""
            if one.base == "CALL" and guard == 1 and label.endswith("sqrt_rn_f32_slowpath"):
                at += 1  # roots of data go the quick way, so this is the root of a zero that fills up the tile
                continue
            if one.base == "CALL" and guard != 0 and not label.startswith(".L"):  # those are jumps out of loops
                raise RuntimeError(f"the path of a full tile calls {label}")
            if label in self.code.labels:
                target = self.code.labels[label]
                conditions = [guard, *(self.value(part) for part in one.operands[:-1])]
                guard = 0 if 0 in conditions else next((v for v in conditions if v != 1), 1)
                if guard == _DATA and self._traps(target):
                    guard = 0
                at = target if self._goes(one, guard, forward=target > at) else at + 1
                continue
            if one.base != "EXIT" and guard != 0:
                self._count(one)
                self._execute(one, guard)
            at += 1

    def _traps(self, at: int) -> bool:
        """Whether a call that stops the program stands there: tensor memory was not what it should be."""
        return any(
            "guardrail_trap" in operand for one in self.code.instructions[at : at + 4] for operand in one.operands
        )

    def _goes(self, one: Instruction, guard: Value, *, forward: bool) -> bool:
        if guard == _DATA and forward:
            return True
        if isinstance(guard, str):
            raise RuntimeError(f"cannot tell whether {one.opcode} {one.operands} is taken: {one.guard} is {guard}")
        return bool(guard)

    def _count(self, one: Instruction) -> None:
        suffixes = one.opcode.split(".")[1:]
        bits = next((_BITS[suffix] for suffix in suffixes if suffix in _BITS), 32)
        if one.base in ("LDG", "STG"):
            (self.seen.loads if one.base == "LDG" else self.seen.stores)[bits] += 1
        self.seen.shared += one.base in ("LDS", "STS")

    def value(self, operand: str) -> Value:
        """Of a source; predicates are 0 or 1."""
        if operand in self.held:
            return self.held[operand]
        if operand[:1] in "!~-|":
            inner = self.value(operand[1:].strip("|"))
            if isinstance(inner, str):
                return inner
            changed = {"!": 1 - inner, "~": ~inner, "-": -inner, "|": abs(_signed(inner))}
            return changed[operand[0]] & _MASK
        operand = operand.removesuffix(".reuse")
        constant = re.match(r"c\[0x0\]\[(0x[0-9a-f]+)\]$", operand)
        if constant:
            return self.constants.get(int(constant[1], 16), _UNKNOWN)
        if re.match(r"0x[0-9a-f]+$", operand):
            return int(operand, 16) & _MASK
        if operand in ("RZ", "URZ"):
            return 0
        if operand in ("PT", "UPT"):
            return 1
        if re.match(r"U?R\d+$", operand):  # a bit of it is changed before all of it is written: any value would do
            return self.held.get(operand, 0)
        return self.held.get(operand, _UNKNOWN)

    def _wide(self, operand: str) -> Value:
        """Of a source of 64 bits."""
        low = self.value(operand)
        register = re.match(r"(U?R)(\d+)", operand)
        high = self.value(f"{register[1]}{int(register[2]) + 1}") if register else 0
        if isinstance(low, str) or isinstance(high, str):
            return _worst([low, high])
        return high << 32 | low

    def _predicates(self, operand: str) -> Value:
        """All predicates that a mask names, as bits."""
        found, mask = 0, int(operand, 16)
        for number in range(7):
            if mask >> number & 1:
                held = self.value(f"P{number}")
                if isinstance(held, str):
                    return held
                found |= held << number
        return found

    def _execute(self, one: Instruction, guard: Value) -> None:
        if one.base == "R2P":
            bits = self.value(one.operands[1])
            for number in range(7):
                if int(one.operands[2], 16) >> number & 1:
                    self.held[f"P{number}"] = bits if isinstance(bits, str) else bits >> number & 1
            return
        targets, sources = one.split
        result = self._result(one, sources) if guard == 1 else _worst([guard])
        beside = self._upper(one, sources) if one.base == "IMAD" and ".WIDE" in one.opcode else _UNKNOWN
        if one.base == "IADD3":
            beside = self._carried(sources)
        for number, target in enumerate(targets):
            made: Value = result if number == 0 else _DATA if result == _DATA else _UNKNOWN
            if one.base in ("LDC", "LDCU", "ULDC") and number and guard == 1:
                at = re.match(r"c\[0x0\]\[(0x[0-9a-f]+)\]$", sources[0])
                made = _UNKNOWN if at is None else self.constants.get(int(at[1], 16) + 4 * number, _UNKNOWN)
            elif one.base in ("CS2R", *_PREDICATES):
                made = result if one.base == "CS2R" or number == 0 else _worst([result])
            elif one.base in _HAPPENED:
                made = 1
            elif number == 1 and guard == 1 and one.base in ("IMAD", "IADD3"):
                made = beside
            elif one.base == "LOP3" and isinstance(result, int):  # whether there is a bit, or else the last source
                made = 1 if result else self.value(sources[-1])
            if target not in ("RZ", "URZ", "PT", "UPT"):
                self.held[target] = made

    def _result(self, one: Instruction, sources: tuple[str, ...]) -> Value:
        base = one.base
        if base in ("S2R", "S2UR", "CS2R"):
            return self.special.get(sources[0], _UNKNOWN)
        if base in ("LDC", "LDCU", "ULDC"):
            return self.value(sources[0])
        if base == "P2R":
            return self._predicates(sources[-1])
        if base in _HAPPENED:
            return 1
        if base == "LDG":
            return self._loaded(sources)
        values = [self.value(source) for source in sources]
        if base == "IMAD" and ".HI" in one.opcode:
            values[2] = self._wide(sources[2])
        if base == "HFMA2" and sources[:2] == ("-RZ", "RZ"):  # a constant, as two halves
            high, low = (struct.unpack("<H", struct.pack("<e", float(half)))[0] for half in sources[2:4])
            return int(high << 16 | low)
        if _FROM_DATA.match(base) and base != "MUFU":
            return _DATA
        if any(isinstance(value, str) for value in values):
            return self._partly(one, values)
        known = [value for value in values if isinstance(value, int)]
        if base == "MUFU" and "RCP" in one.opcode:
            return _bits(1 / _float(known[0])) if known[0] else _bits(float("inf"))
        if base == "ISETP":
            return self._compared(one, known)
        if base not in _COMPUTED:
            return _UNKNOWN
        try:
            return _COMPUTED[base](one, *known) & _MASK
        except NotImplementedError:
            return _UNKNOWN

    def _carried(self, sources: tuple[str, ...]) -> Value:
        """What a sum carries to the upper half of one of 64 bits."""
        values = [self.value(source) for source in sources]
        known = [value for value in values if isinstance(value, int)]
        return _worst(values) if len(known) < len(values) else sum(known) >> 32

    def _loaded(self, sources: tuple[str, ...]) -> Value:
        """What the elements of a known tensor of 32-bit integers are."""
        found = re.search(r"\[(R\d+)\.64(?:\.U32)?(?:\+(-?0x[0-9a-f]+))?\]$", sources[0])
        low = self.value(found[1]) if found else _UNKNOWN
        if found is None or isinstance(low, str):
            return _DATA
        return self.memory.get(low + int(found[2] or "0", 16) >> 24, _DATA)

    def _upper(self, one: Instruction, sources: tuple[str, ...]) -> Value:
        """The high 32 bits of a product of 32-bit numbers, plus one of 64 bits."""
        a, b, added = self.value(sources[0]), self.value(sources[1]), self._wide(sources[2])
        if isinstance(a, str) or isinstance(b, str) or isinstance(added, str):
            return _worst([a, b, added])
        product = a * b if ".U32" in one.opcode else _signed(a) * _signed(b)
        return (product + added) >> 32 & _MASK

    def _partly(self, one: Instruction, values: list[Value]) -> Value:
        """The result where not all sources are known: of a comparison that its last condition settles, all the same."""
        if one.base == "ISETP" and values[-1] == 0 and ".AND" in one.opcode:
            return 0
        return _worst(values)

    def _compared(self, one: Instruction, values: list[int]) -> int:
        a, b, condition = values[:3]
        if ".U32" not in one.opcode:
            a, b = _signed(a), _signed(b)
        kind = one.opcode.removeprefix("U").split(".")[1]
        holds = _COMPARED[kind](a, b)
        if ".EX" in one.opcode and a == b:  # upper halves, and then the result of the lower ones
            holds = bool(values[3])
        return int(holds or bool(condition) if ".OR" in one.opcode else holds and bool(condition))


def _worst(values: list[Value]) -> Value:
    """What depends on data is data, whatever else it depends on."""
    return _DATA if _DATA in values else _UNKNOWN


def _split(one: Instruction) -> tuple[list[str], tuple[str, ...]]:
    operands = list(one.operands)
    if one.base in ("STG", "STS", "STL", "RED", "BAR", "BSSY", "BSYNC", "WARPSYNC", "MEMBAR", "NOP"):
        return [], tuple(operands)
    predicates: list[str] = []
    while operands and _PREDICATE.match(operands[0]) and "!" not in operands[0] and len(predicates) < 2:
        predicates.append(operands.pop(0))
        if one.base not in _PREDICATES and not one.base.endswith("SETP"):
            break
    if one.base in _PREDICATES or one.base.endswith("SETP") or one.base == "FCHK":
        return predicates, tuple(operands)
    if not operands or not _REGISTER.match(operands[0]):
        return predicates, tuple(operands)
    first = operands.pop(0)
    while (
        operands and _PREDICATE.match(operands[0]) and one.base in ("IADD3", "LEA", "VIMNMX") and "!" not in operands[0]
    ):
        predicates.append(operands.pop(0))
    count = 4 if ".128" in one.opcode else 2 if re.search(r"\.(64|WIDE)", one.opcode) or one.base == "CS2R" else 1
    name, number = re.match(r"(U?R)(\w+)", first).groups()  # type: ignore[union-attr]
    registers = [first] if number == "Z" else [f"{name}{int(number) + i}" for i in range(count)]
    return [*registers, *predicates], tuple(operands)


def executed(kernel: Compiled, code: Listing, program: int) -> list[Executed]:
    """What each warp of one program executes.

    Args:
        kernel: what was compiled.
        code: its listing.
        program: number of the program; the first and the last are special.
    """
    constants = dict.fromkeys((12, 880), kernel.programs)
    at, memory = _PARAMETERS_AT[code.capability], dict[int, int]()
    for number, value in enumerate(kernel.values):
        if isinstance(value, torch.Tensor):
            at = -(-at // 8) * 8
            constants[at], constants[at + 4] = (number + 1) << 24, 0x7F00
            if number in kernel.known:
                memory[number + 1] = kernel.known[number]
            at += 8
        else:
            constants[at] = _bits(value) if isinstance(value, float) else value & _MASK
            at += 4
    return [_Warp(code, constants, memory, program, warp).run() for warp in range(kernel.warps)]
