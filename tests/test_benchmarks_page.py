"""README.md and docs/benchmarks.md show the stored results."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.codecs import kernels_cpu

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "benchmarks.md").read_text()


def stored(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text())


def test_demo() -> None:
    """README.md shows what ``make demo`` printed; ``tests/integrations/harness/test_demo.py`` that it still does."""
    readme = (ROOT / "README.md").read_text()
    for row in stored("demo.json")["rows"]:
        call, error, psnr = row["call_bits_per_element"], row["latent_rel_error"], row["psnr_db"]
        assert (
            f"| {row['route']} | `{row['method']}` | {row['wire_bytes'] / 1e6:.2f} | {row['bits_per_element']:.2f} "
            f"| {'' if call is None else f'{call:.3f}'} | {row['ratio']:.2f} | {f'{error:.1e}' if error else 0} "
            f"| {'equal' if psnr is None else f'{psnr:.1f}'} |"
        ) in readme


def test_kernels() -> None:
    lines = stored("kernels_cpu.json")["lines"]
    assert kernels_cpu.table(lines) in PAGE
    measured = {
        (line["codec"], line["scales"], line["rows"]): f"{line['encode_copies']:.1f}"
        for line in lines
        if (line["dtype"], line["threads"]) == ("bfloat16", 2)
    }
    for scales, named, goals in (
        ("token_channel", "row and channel", {"binary": 2.5, "int2": 2.5, "int4": 2.5, "int8": 2.7}),
        ("block", "block", dict.fromkeys(("binary", "int2", "int4", "int8"), 1.2)),
    ):
        for codec, goal in goals.items():
            large, small = (measured[codec, scales, rows] for rows in (16384, 4096))
            assert f"| encode, `{codec}` | {named} | {goal} | {large} | {small} |" in PAGE


def test_kernels_with_scales_from_the_frame_before() -> None:
    lines = stored("kernels_cpu_history.json")["lines"]
    assert kernels_cpu.table(lines) in PAGE
    ratios = {
        (line["codec"], line["rows"], line["dtype"]): f"{line['encode_copies'] / line['moved_encode_copies']:.1f}"
        for line in lines
        if line["threads"] == 2
    }
    tensors = (4096, "bfloat16"), (16384, "bfloat16"), (4096, "float32")
    for codec, goal in (("binary", 1.35), ("int8", 1.6), ("int2", 1.9), ("int4", 1.9)):
        assert f"| `{codec}` | {goal} | {' | '.join(ratios[(codec, *tensor)] for tensor in tensors)} |" in PAGE


def test_states_in_eight_bits() -> None:
    lines, page = stored("state_forms.json")["lines"], (ROOT / "docs" / "concepts.md").read_text()
    ratios = {form: [line["ratio"] for line in lines if line["state"] == form] for form in ("int8", "fp8")}
    least, most = ({form: f"{choose(some):.2f}" for form, some in ratios.items()} for choose in (min, max))
    assert f"both ends take {least['int8']} to {most['int8']} times as long" in page
    assert f"with `fp8` {least['fp8']} to {most['fp8']} times" in page


def test_orders() -> None:
    lines, page = stored("orders.json")["lines"], (ROOT / "docs" / "concepts.md").read_text()
    scalar = [line for line in lines if line["order"] != 1 and not line["codec"].startswith("transform")]
    exact, rounded = ([line["ratio"] for line in scalar if line["state"] == state] for state in ("exact", "int8"))
    assert f"takes {min(exact):.1f} to\n{max(exact):.1f} times as long at orders 2 and" in page
    assert f"with a state in eight bits {min(rounded):.1f} to {max(rounded):.1f} times" in page


def test_measuring() -> None:
    for line in stored("measuring.json")["lines"]:
        figures = [f"{line[f'{name}_ms']:.1f}" for name in ("encode", "measure", "torch")]
        assert f"| [{line['rows']}, 3072] | {' | '.join(figures)} |" in PAGE


def test_presets_pay() -> None:
    wins, page = stored("preset_cost.json")["wins"], (ROOT / "docs" / "concepts.md").read_text()
    speeds = [round(win["below_mbit_per_s"]) for win in wins]
    assert f"| links below {speeds[0]} Mbit/s;" in page
    assert f"| links below {speeds[1]} Mbit/s |" in page
    assert f"on links faster than {speeds[2]} Mbit/s give" in page
    assert speeds[3] == 30


def test_lowrank() -> None:
    speed = stored("lowrank_speed.json")
    for stream in ("synthetic", "trace"):
        for encoder, line in speed[stream].items():
            ms = line["ms"]
            assert (
                f"| {stream} | {encoder} | {ms['median']:.2f} ({ms['q1']:.2f} to {ms['q3']:.2f}) "
                f"| {line['times_faster']:.2f} | {line['relative_error']:.4f} |"
            ) in PAGE
    on_two = stored("lowrank_speed_2_threads.json")["synthetic"]["warm"]["times_faster"]
    assert f"threads it is {on_two:.1f} times" in PAGE


def test_all_gather() -> None:
    for codec, line in stored("all_gather_loopback.json")["results"].items():
        ms = line["ms"]
        assert f"| {codec} | {ms['median']:.0f} ({ms['q1']:.0f} to {ms['q3']:.0f}) | {line['time_ratio']:.1f} |" in PAGE
