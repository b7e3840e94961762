"""Where compiled code leaves a rounding open: read from PTX, and from the machine code that ptxas made of it."""

from __future__ import annotations

import re

from benchmarks.gpu.compiled import Compiled
from benchmarks.gpu.machine_code import listing

OPEN = re.compile(r"\b(fma\.|div\.(full|approx)|sqrt\.approx|rsqrt\.|rcp\.approx|ex2\.|lg2\.|[a-z0-9.]+\.ftz)")
DIVISIONS = re.compile(r"\b(div\.(full|approx)|sqrt\.approx|rsqrt\.|rcp\.approx)")
FUSED, MATRIX = re.compile("[FD]FMA"), re.compile("HMMA")


def leaves_none_open(kernel: Compiled, what: object, *, but_logarithms: bool = False) -> None:
    """Fail on an operation that devices may round otherwise; logarithms are made of such."""
    found = (DIVISIONS if but_logarithms else OPEN).search(kernel.ptx)
    assert not found, f"{kernel.name} of {what}: {found and found[0]}"


def fuses_nothing(kernel: Compiled, capability: int, what: object, *others: re.Pattern[str]) -> None:
    """Fail on a fused multiply-add in the machine code, or on what the ``others`` match.

    For kernels without division, in which ptxas has a use for one of its own.
    """
    code = [line.opcode for line in listing(kernel.cubin, capability).instructions]
    found = [opcode for opcode in code if any(each.match(opcode) for each in (FUSED, *others))]
    assert not found, f"{kernel.name} of {what}: {found[0]}"


def multiplies_integers(kernels: list[Compiled], capability: int, what: object) -> None:
    """Fail if a kernel of ``transform`` that has to multiply 8-bit integers does not, or also multiplies floats."""
    integers = {"decode_components": 2, "correlate": 1}
    for one in kernels:
        if one.name in integers:
            fuses_nothing(one, capability, what, MATRIX)
            products = re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\S*(?:s8|i8)\b", one.ptx)
            assert len(products) >= integers.pop(one.name), f"{one.name} of {what} multiplies no 8-bit integers"
    assert not integers
