"""Write the tables of docs/codecs.md and README.md from registry and stored results: ``python -m tools.codecs_page``.

Everything between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` is replaced; the rest is prose. With
``--check`` nothing is written, and the exit status tells whether the page is up to date.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.codecs import codec_table
from compactdist import codecs

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SPEED = {"16384": "codecs_16384x3072.json", "4096": "codecs_4096x3072.json"}


def registry_table() -> str:
    """What every registered codec sends, its options with their defaults, when to use it, and where it comes from."""
    lines = ["| id | sends | options (defaults) | when to use it | source |", "|---|---|---|---|---|"]
    for codec_id in codecs.list():
        codec = codecs.get(codec_id)
        about = codec.about
        if about is None:
            raise SystemExit(f"codec {codec_id!r} has no `about`")
        options = ", ".join(
            f"`{name}={parameter.default!r}`" for name, parameter in inspect.signature(type(codec)).parameters.items()
        )
        lines.append(f"| `{codec_id}` | {about.sends} | {options} | {about.use} | {about.source} |")
    return "\n".join(lines)


def rate_table() -> str:
    """Rate and error of codecs and options."""
    return codec_table.table(json.loads((RESULTS / "codec_table.json").read_text())["rows"])


def speed_table(rows: str) -> str:
    """Times of ``compactdist bench codecs`` at ``[rows, 3072]``."""
    stored: dict[str, Any] = json.loads((RESULTS / SPEED[rows]).read_text())
    lines = [
        f"`{stored['command']}` ([result](../benchmarks/results/{SPEED[rows]})): {stored['machine']}, torch "
        f"{stored['torch']}",
        "",
        "| codec | encode x copy | decode x copy | encode Gelem/s | decode Gelem/s | bits | gap dB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in stored["rows"]:
        if "note" in row:
            continue
        gap = "exact" if row["gap_db"] is None else f"{row['gap_db']:.2f}"
        lines.append(
            f"| {row['codec']} | {row['encode_x_copy']:.1f} | {row['decode_x_copy']:.1f} | {row['encode_gelem_s']:.3f} "
            f"| {row['decode_gelem_s']:.3f} | {row['bits_per_element']:.3f} | {gap} |"
        )
    return "\n".join(lines)


def short_speed_table() -> str:
    """The same for the quantizers alone, at both sizes and beside their eager forms."""
    stored = {rows: json.loads((RESULTS / name).read_text()) for rows, name in SPEED.items()}
    steps = ("encode", "decode")
    lines = [
        f"| codec |{''.join(f' {step}, [{rows}, 3072] |' for rows in SPEED for step in steps)}"
        + "".join(f" {step}, beside eager torch |" for step in steps),
        "|---|" + 3 * len(steps) * "---:|",
    ]
    found = {
        rows: {row["codec"]: row for row in results["rows"] if row["dtype"] == "bfloat16" and "note" not in row}
        for rows, results in stored.items()
    }
    large = next(iter(found.values()))
    for codec_id in ("binary", "int2", "int4", "int8"):
        cells = [f"{rows[codec_id][f'{step}_x_copy']:.1f}" for rows in found.values() for step in steps]
        eager = large[f"{codec_id}, eager torch"]
        cells += [f"{eager[f'{step}_ms'] / large[codec_id][f'{step}_ms']:.0f} x faster" for step in steps]
        lines.append(f"| `{codec_id}` | {' | '.join(cells)} |")
    for rows, name in SPEED.items():
        lines += ["", f"`{stored[rows]['command']}` ([result](benchmarks/results/{name}))"]
    return "\n".join(lines)


SECTIONS: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / "docs" / "codecs.md": {
        "registry": registry_table,
        "rate": rate_table,
        "speed 4096": lambda: speed_table("4096"),
        "speed 16384": lambda: speed_table("16384"),
    },
    ROOT / "README.md": {"speed": short_speed_table},
}


def filled(path: Path) -> str:
    """A page with all its sections written anew."""
    page = path.read_text()
    for name, make in SECTIONS[path].items():
        marked = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if not marked.search(page):
            raise SystemExit(f"{path} has no section {name!r}")
        body = make()
        page = marked.sub(lambda found, body=body: f"{found[1]}{body}\n{found[2]}", page)  # type: ignore[misc]
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is out of date")
    check = parser.parse_args().check
    stale = False
    for path in SECTIONS:
        after = filled(path)
        stale = stale or after != path.read_text()
        if not check:
            path.write_text(after)
    sys.exit(int(check and stale))


if __name__ == "__main__":
    main()
