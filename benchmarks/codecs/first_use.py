"""Time a codec's first step in a process, from a cold and from a warm cache of compiled code.

    python -m benchmarks.codecs.first_use --json benchmarks/results/first_use.json

Each sample is a process of its own that imports the library and torch, makes its tensors, and then times the first
encode, the first decode, and the second of each. The first process of a line begins with an empty cache, the others
with what it left. Medians of the warm ones.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks.common import check_load, finish, parser

ROWS, CHANNELS = 512, 512
CODECS: tuple[dict[str, Any], ...] = (
    {"id": "int4"},
    {"id": "int4", "scales": "block"},
    {"id": "int8"},
    {"id": "binary"},
)
SAMPLE = """
import json, sys, time
import torch
from compactdist import codecs
from compactdist.kernels.spec import MatrixView

rows, channels, form = json.loads(sys.argv[1])
x, base = torch.randn(2, rows * channels)
out = torch.empty_like(x)
session = codecs.get(form).open(MatrixView(x.numel(), 1, rows, channels), x.dtype, x.device)
payload = torch.empty(session.payload_nbytes, dtype=torch.uint8)
taken = {}
for name in ("first", "second"):
    start = time.perf_counter()
    session.encode(x, (base,), out, payload)
    between = time.perf_counter()
    session.decode(payload, (base,), out)
    taken[f"{name}_encode_ms"] = 1e3 * (between - start)
    taken[f"{name}_decode_ms"] = 1e3 * (time.perf_counter() - between)
print(json.dumps(taken | {"imported_numba": "numba" in sys.modules}))
"""


def _sample(form: dict[str, Any], cache: str) -> dict[str, Any]:
    command = [sys.executable, "-c", SAMPLE, json.dumps([ROWS, CHANNELS, form])]
    environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    taken: dict[str, Any] = json.loads(done.stdout)
    return taken


def line(form: dict[str, Any], rounds: int) -> dict[str, Any]:
    """A cold process and ``rounds`` warm ones."""
    with tempfile.TemporaryDirectory() as cache:
        cold = _sample(form, cache)
        warm = [_sample(form, cache) for _ in range(rounds)]
    measured: dict[str, Any] = {"codec": form["id"], "scales": form.get("scales", "token_channel")}
    for name in ("encode", "decode"):
        measured[f"cold_{name}_s"] = round(cold[f"first_{name}_ms"] / 1e3, 1)
        for which in ("first", "second"):
            measured[f"{which}_{name}_ms"] = round(statistics.median(one[f"{which}_{name}_ms"] for one in warm), 2)
    return measured | {"imports_numba": any(one["imported_numba"] for one in warm)}


def table(lines: list[dict[str, Any]]) -> str:
    """The lines as Markdown."""
    text = [
        "| codec | scales | first encode, cold s | first encode, warm ms | second | first decode, cold s "
        "| first decode, warm ms | second |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for one in lines:
        cells = [f"`{one['codec']}`", one["scales"]]
        for name in ("encode", "decode"):
            cells += [f"{one[key]}" for key in (f"cold_{name}_s", f"first_{name}_ms", f"second_{name}_ms")]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--rounds", type=int, default=5, help="warm processes of each line (default 5)")
    args = made.parse_args()
    check_load(args.max_load)
    lines = [line(form, args.rounds) for form in CODECS]
    print(table(lines))
    finish(args.json, {"ranks": "none", "shape": [ROWS, CHANNELS], "rounds": args.rounds, "lines": lines})


if __name__ == "__main__":
    main()
