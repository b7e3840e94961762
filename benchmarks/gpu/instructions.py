"""Count machine instructions of the Triton kernels, for GPUs that need not be there.

    python -m benchmarks.gpu.instructions --json benchmarks/results/gpu_instructions.json
    python -m benchmarks.gpu.instructions --capability 90 --codec "int2 block"

Kernels are compiled as a steady call on [1088, 3072] bfloat16 launches them, with one term and a flag. One program in
the middle of each launch is followed through its machine code (``machine_code.py``): all of its tile is there.

    instructions = 32 * (instructions its warps issue, summed) / (elements of the tensor / programs of the launch)

That is instructions of a thread for each element, what a profiler calls thread instructions where no lane is off.
Instructions that a predicate switches off are issued, and count; loops count by their trips, the slow paths of division
and root do not. Registers are those of a thread, spills the instructions that keep one in memory. Loads and stores are
those of one thread to global memory, by their bits: ``4x128 1x16``. For frames an element is a 32-bit word of the
payload, and the last program's header does not count. ``transform`` is at one bit, its elements have bits or none by
what is sent, and all are counted as if they had all eight (seven along a trellis, whose kernel passes over components
without); its sender decodes, too. The sweep that turns its basis is
not counted, for its rounds depend on data.

Of ``token_history`` no flag is given.

The numbers depend on Triton's version, which is stored with them; they depend on no machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import STDOUT, add_json
from benchmarks.gpu.common import table
from benchmarks.gpu.compiled import (
    CAPABILITIES,
    Compiled,
    Compiler,
    components,
    frames,
    history,
    history_step,
    measured,
    one_of_m,
    step,
    velocities,
)
from benchmarks.gpu.machine_code import executed, listing
from compactdist import codecs
from compactdist.codecs.topk import TopK, TopKInt4
from compactdist.codecs.transform.transform import Transform
from compactdist.kernels.spec import EightBits
from compactdist.state.matrix_view import plain

ROWS, CHANNELS = 1088, 3072
FRAMES = "frames"
VELOCITY = "velocity"
MEASURED = "measured"
HISTORIES: dict[str, EightBits] = {"int8 history": "int8", "fp8 history": "fp8"}
NAMES = [
    f"{codec} {scales}" for scales in ("block", "token_channel") for codec in ("binary", "int2", "int4", "int8", "fp8")
]
NAMES += [f"{codec} token_history" for codec in ("binary", "int2", "int4", "int8", "fp8")]
TRANSFORMS = {"transform": Transform(), "transform_trellis": Transform(trellis=True)}
TOPK = {"topk": TopK(), "topk_int4": TopKInt4()}
NAMES += [FRAMES, *HISTORIES, VELOCITY, MEASURED, *TRANSFORMS, *TOPK]
NAMES += ["int4 block, int8 history", "int4 token_channel, int8 history", "int2 block, fp8 history"]
NAMES += [
    "int4 block, velocity",
    "int4 token_channel, velocity",
    "int4 block, int8 velocity",
    "int2 block, fp8 velocity",
]
"""With a comma: the step of a stream that remembers in eight bits, that predicts with a velocity, or both."""
_WORDS = 1 << 20


def counted(kernel: Compiled, capability: int, elements: int) -> dict[str, Any]:
    """The line of one kernel.

    Args:
        kernel: what was compiled.
        capability: of the GPU.
        elements: of the whole launch.
    """
    code = listing(kernel.cubin, capability)
    warps = executed(kernel, code, kernel.programs // 2)
    issued = sum(one.instructions for one in warps)
    return {
        "instructions": round(32 * issued * kernel.programs / elements, 2),
        "registers": code.registers,
        "spills": code.spills,
        "loads": _widths(warps[0].loads),
        "stores": _widths(warps[0].stores),
        "shared": warps[0].shared,
    }


def _widths(counts: Counter[int]) -> str:
    return " ".join(f"{counts[bits]}x{bits}" for bits in sorted(counts, reverse=True))


def kernels(name: str, capability: int) -> dict[str, Compiled]:
    """The kernels of one name, by the rows of the table: ``{"int2 block decode decode_codes": kernel}``."""
    compiler = Compiler(capability)
    if name in (FRAMES, VELOCITY, MEASURED) or name in HISTORIES:
        if name == FRAMES:
            frames(4 * _WORDS, compiler)
        elif name == VELOCITY:
            velocities(ROWS * CHANNELS, torch.bfloat16, compiler)
        elif name == MEASURED:
            measured(ROWS * CHANNELS, torch.bfloat16, compiler)
        else:
            history(ROWS * CHANNELS, torch.bfloat16, HISTORIES[name], compiler)
        return {f"{name} {one.name}": one for one in compiler.launches}
    view = plain(ROWS * CHANNELS, 1, CHANNELS)
    if name in TRANSFORMS:
        both = components(TRANSFORMS[name], view, torch.bfloat16, compiler)
        assert both[1].pop(-2).name == "sweep_matrices"
    elif name in TOPK:
        both = one_of_m(TOPK[name], view, torch.bfloat16, compiler)
    else:
        of, _, remembers = name.partition(", ")
        codec_id, scales = of.split()
        made = history_step if scales == "token_history" else step
        terms: Any = HISTORIES.get(remembers, remembers or 1)
        both = made(codecs.get(codec_id, scales=scales), view, torch.bfloat16, compiler, terms=terms)
    return {
        f"{name} {direction} {one.name}": one
        for direction, launches in zip(("encode", "decode"), both, strict=True)
        for one in launches
    }


def lines(name: str, capability: int, found: dict[str, Compiled] | None = None) -> dict[str, dict[str, Any]]:
    """The rows of one name, of :func:`kernels`, or of those ``found``, if they are compiled already."""
    found = kernels(name, capability) if found is None else found
    elements = _WORDS if name == FRAMES else ROWS * CHANNELS
    return {key: counted(one, capability, elements) for key, one in found.items()}


def counts(capabilities: list[int], names: list[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Every line, by ``sm_90`` and then by kernel."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for capability in capabilities:
        of = found[f"sm_{capability}"] = {}
        for name in names:
            of.update(lines(name, capability))
    return found


def shown(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A row for each kernel, two columns for each GPU; and the sums of encoding and decoding."""
    head = ["instructions an element, registers", *(part for sm in found for part in (sm, ""))]
    sums: dict[str, list[float]] = {}
    rows = []
    for key in next(iter(found.values())):
        cells = [key]
        for number, of in enumerate(found.values()):
            line = of[key]
            cells += [f"{line['instructions']:.1f}", f"{line['registers']}{'' if not line['spills'] else ' spills'}"]
            if key.split()[0] not in (FRAMES, VELOCITY, MEASURED) and key.split()[1] != "history":
                sums.setdefault(key.rsplit(" ", 1)[0], [0.0] * len(found))[number] += line["instructions"]
        rows.append(cells)
    rows += [
        [f"{name}, all", *(part for value in values for part in (f"{value:.1f}", ""))] for name, values in sums.items()
    ]
    return table(head, rows)


def text(record: dict[str, Any]) -> str:
    """JSON with a line for each kernel, so that a difference shows the kernels concerned and no others."""
    about = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items() if key != "kernels"]
    tables = [
        f"  {json.dumps(sm)}: {{\n"
        + ",\n".join(f"   {json.dumps(key)}: {json.dumps(line)}" for key, line in of.items())
        + "\n  }"
        for sm, of in record["kernels"].items()
    ]
    return "{\n" + ",\n".join([*about, ' "kernels": {\n' + ",\n".join(tables) + "\n }"]) + "\n}\n"


def _written(path: Path | None, record: dict[str, Any]) -> None:
    if path == STDOUT:
        assert sys.__stdout__ is not None
        sys.__stdout__.write(text(record))
    elif path is not None:
        path.write_text(text(record))
        print(f"written to {path}")


def _arguments() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json(made)
    made.add_argument("--capability", type=int, action="append", choices=CAPABILITIES, help="default: all")
    made.add_argument("--codec", action="append", choices=NAMES, help='such as "int2 block"; default: all')
    return made.parse_args()


def main() -> None:
    import triton

    args = _arguments()
    found = counts(args.capability or list(CAPABILITIES), args.codec or NAMES)
    print(shown(found))
    size = {"triton": triton.__version__, "rows": ROWS, "channels": CHANNELS, "dtype": "bfloat16"}
    _written(args.json, {"command": "python -m benchmarks.gpu.instructions", **size, "kernels": found})


if __name__ == "__main__":
    main()
