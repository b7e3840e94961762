"""The kernels' machine code is no longer than the stored table says, and the walk that counts it counts right."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton

from benchmarks.gpu import instructions
from benchmarks.gpu.compiled import CAPABILITIES, Compiled
from benchmarks.gpu.machine_code import Executed, executed, parsed
from tests.kernels.rounding import fuses_nothing, leaves_none_open, multiplies_integers

FILE = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu_instructions.json"
STORED = json.loads(FILE.read_text())
GROWTH = 1.05
MAIN = ("int2 block", "int4 block", "frames")

compiles = pytest.mark.skipif(bool(triton.knobs.runtime.interpret), reason="the interpreter compiles nothing")


def _leave_no_rounding_open(name: str, kernels: dict[str, Compiled], capability: int) -> None:
    for key, kernel in kernels.items():
        # codes that a sender alone works out
        leaves_none_open(kernel, key, but_logarithms=kernel.name == "fit_rows" or key.endswith("encode allot"))
        if " decode decode_" in key or kernel.name in ("spread_over_runs", "pick_of_runs"):
            fuses_nothing(kernel, capability, key)
    if name in instructions.TRANSFORMS:
        multiplies_integers(list(kernels.values()), capability, name)


def _compare(name: str, capability: int) -> None:
    if triton.__version__ != STORED["triton"]:
        pytest.skip(f"counts stored for Triton {STORED['triton']}, not for {triton.__version__}")
    stored = STORED["kernels"][f"sm_{capability}"]
    kernels = instructions.kernels(name, capability)
    _leave_no_rounding_open(name, kernels, capability)
    found = instructions.lines(name, capability, kernels)
    assert set(found) == {key for key in stored if key.startswith(f"{name} ")}
    for key, line in found.items():
        before = stored[key]
        again = f"if that is wanted: {STORED['command']} --json benchmarks/results/gpu_instructions.json"
        assert line["instructions"] <= GROWTH * before["instructions"], (
            f"{key}, sm_{capability}: {line['instructions']} instructions an element, stored are "
            f"{before['instructions']}; {again}"
        )
        assert line["spills"] <= before["spills"], f"{key}, sm_{capability} spills: {line}; {again}"


@compiles
@pytest.mark.parametrize("name", MAIN)
def test_no_more_instructions_than_stored(name: str) -> None:
    _compare(name, 90)


@compiles
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_more_instructions_than_stored_elsewhere(capability: int) -> None:
    """Every kernel for one of the GPUs: what makes it longer for one makes it longer for all."""
    for name in instructions.NAMES[CAPABILITIES.index(capability) :: len(CAPABILITIES)]:
        if (name, capability) not in [(main, 90) for main in MAIN]:  # which the test above has compared
            _compare(name, capability)


def test_the_table_has_every_kernel_of_every_gpu() -> None:
    assert list(STORED["kernels"]) == [f"sm_{capability}" for capability in CAPABILITIES]
    for of in STORED["kernels"].values():
        assert {re.sub(r" (encode|decode)?( ?\w+)$", "", key) for key in of} == set(instructions.NAMES)
        assert {key.split()[-2] for key in of} >= {"encode", "decode"}
    assert instructions.text(STORED) == FILE.read_text()


def _never() -> None:
    raise AssertionError("this kernel has its code")


LOOP = """
kernel:
.text.kernel:
        /*0000*/                   S2R R0, SR_CTAID.X ;
        /*0010*/                   ULDC UR4, c[0x0][0x210] ;
        /*0020*/                   IMAD.SHL.U32 R1, R0, 0x2, RZ ;
        /*0030*/                   LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0040*/                   FSETP.GT.AND P0, PT, R4, RZ, PT ;
        /*0050*/               @P0 BRA `(.L_x_1) ;
        /*0060*/                   CALL.REL.NOINC `($slow) ;
.L_x_1:
        /*0070*/                   VIADD R1, R1, 0x1 ;
        /*0080*/                   ISETP.GE.AND P1, PT, R1, UR4, PT ;
        /*0090*/              @!P1 BRA `(.L_x_1) ;
        /*00a0*/                   STG.E.U16 desc[UR6][R2.64], R4 ;
        /*00b0*/                   EXIT ;
"""


def _walked(text: str, trips: int = 9) -> Executed:
    kernel = Compiled("kernel", programs=4, warps=2, values=(trips,), compile=_never)
    first, second = executed(kernel, parsed(text, 90, 8), program=2)
    assert first == second
    return first


def test_a_loop_counts_by_its_trips_and_a_slow_path_not_at_all() -> None:
    """Six instructions, five trips of three from 2 * 2 to 9, and two at the end."""
    found = _walked(LOOP)
    assert found.instructions == 6 + 5 * 3 + 2
    assert (found.loads, found.stores, found.shared) == ({128: 1}, {16: 1}, 0)
    assert _walked(LOOP, trips=12).instructions == 6 + 8 * 3 + 2


def test_bytes_are_permuted() -> None:
    """One trip for each number from that of the program, 2, in the lowest byte, or less 256 from the sign of 0xF0."""
    first, last = "IMAD.SHL.U32 R1, R0, 0x2, RZ", "MOV R5, 0xf0f0"
    assert _walked(LOOP.replace(first, "PRMT R1, R0, 0x4440, RZ")).instructions == 6 + 7 * 3 + 2
    moved = LOOP.replace(first, f"{last} ;\n        /*0028*/                   PRMT R1, R5, 0x9991, R5")
    assert _walked(moved, trips=-12).instructions == 7 + 4 * 3 + 2


@pytest.mark.parametrize(("opcode", "first"), [("IMAD.WIDE.U32", 1), ("IMAD.WIDE", -1)])
def test_a_product_has_64_bits(opcode: str, first: int) -> None:
    """Twice 2**31, or -2**31, is one 2**32, or less one, whose upper half is in the second register."""
    wide = LOOP.replace("IMAD.SHL.U32 R1, R0, 0x2, RZ", f"{opcode} R0, R0, 0x80000000, RZ")
    assert _walked(wide).instructions == 6 + (9 - first) * 3 + 2


def test_sums_of_64_bits_carry() -> None:
    """Two halves count down from three, below zero both change."""
    halves = (
        "UIADD3 UR8, UP0, UR8, -0x1, URZ ;\n        /*0072*/                   UIADD3.X UR9, UR9, -0x1, URZ, UP0, !UPT"
    )
    above = "ISETP.NE.U32.AND P1, PT, UR8, 0x1, PT ;\n        /*0082*/    ISETP.NE.U32.AND.EX P1, PT, UR9, RZ, PT, P1"
    text = LOOP.replace("VIADD R1, R1, 0x1", halves).replace("ISETP.GE.AND P1, PT, R1, UR4, PT", above)
    text = text.replace("IMAD.SHL.U32 R1, R0, 0x2, RZ", "UMOV UR8, 0x3").replace("@!P1 BRA", "@P1 BRA")
    assert _walked(text).instructions == 6 + 2 * 5 + 2
    below = text.replace("UR8, 0x1, PT", "UR8, 0xfffffffe, PT").replace("UR9, RZ, PT, P1", "UR9, 0xffffffff, PT, P1")
    assert _walked(below).instructions == 6 + 5 * 5 + 2


def test_what_stands_in_known_memory_is_followed() -> None:
    """The number of the last trip is read from the second element of a tensor."""
    read = "ULDC.64 UR4, c[0x0][0x210] ;\n        /*0018*/                   LDC.64 R8, c[0x0][0x210]"
    loaded = "VIADD R1, R1, 0x1 ;\n        /*0078*/                   LDG.E R6, desc[UR6][R8.64+0x4]"
    text = (
        LOOP.replace("ULDC UR4, c[0x0][0x210]", read).replace("VIADD R1, R1, 0x1", loaded).replace("R1, UR4", "R1, R6")
    )
    last = torch.zeros(2, dtype=torch.int32)
    kernel = Compiled("kernel", programs=4, warps=1, values=(last,), compile=_never, known={0: 9})
    assert executed(kernel, parsed(text, 90, 8), program=2)[0].instructions == 7 + 5 * 4 + 2
    with pytest.raises(RuntimeError, match="!P1 is data"):
        executed(replace(kernel, known={}), parsed(text, 90, 8), program=2)


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("VIADD R1, R1, 0x1", "STRANGE R1, R1, 0x1", "cannot tell whether BRA .*L_x_1.* is taken: !P1 is unknown"),
        ("VIADD R1, R1, 0x1", "FADD R1, R1, 1", "cannot tell whether BRA .*L_x_1.* is taken: !P1 is data"),
        ("VIADD R1, R1, 0x1", "MOV R1, RZ", "an endless loop"),
        ("@P0 BRA `(.L_x_1)", "@!PT BRA `(.L_x_1)", "the path of a full tile calls .slow"),
    ],
)
def test_what_cannot_be_followed_raises(before: str, after: str, reason: str) -> None:
    assert before in LOOP
    with pytest.raises(RuntimeError, match=reason):
        _walked(LOOP.replace(before, after))
