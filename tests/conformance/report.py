"""What a conformance run means, and the document made from it. Imports nothing of torch."""

from __future__ import annotations

from collections import Counter
from typing import Any

KINDS = {"gloo": "plain gloo", "wrapped": "`wrap()`", "backend": "backend name"}
COMPRESSED_OPS = ("all_gather", "all_to_all", "broadcast", "send")
LEAST_PASSED = 40

Results = dict[str, Any]


def judge(results: Results, *, whole: bool = True) -> list[str]:
    """What is wrong with a run, as sentences; nothing if it conforms.

    Args:
        results: as in ``results.json``.
        whole: all tests were run, so that their number counts.
    """
    wrong = []
    kinds = [kind for kind in results["kinds"] if kind != "gloo"]
    for name, outcomes in results["tests"].items():
        plain = outcomes.get("gloo", {"status": "passed"})["status"]
        for kind in kinds:
            status, reason = outcomes[kind]["status"], outcomes[kind].get("reason", "")
            excused = status == "skipped" and name in results["excluded"][kind]
            lost = plain == "passed" and status != "passed" and not excused
            if lost or (plain == "skipped" and status == "failed"):
                wrong.append(f"{name}: {plain} under plain gloo, {status} with {kind}: {reason}")
    for kind in kinds:
        passed = sum(outcomes[kind]["status"] == "passed" for outcomes in results["tests"].values())
        if whole and passed < LEAST_PASSED:
            wrong.append(f"{kind}: {passed} tests passed, at least {LEAST_PASSED} must")
        frames = frame_counts(results, kind)
        wrong += [f"{kind}: no {op} went through frames" for op in COMPRESSED_OPS if not frames[op]]
    return wrong


def frame_counts(results: Results, kind: str) -> Counter[str]:
    """Calls that went through frames, by operation."""
    counts: Counter[str] = Counter()
    for outcomes in results["tests"].values():
        counts.update(outcomes[kind].get("compressed", {}))
    return counts


def _statuses(results: Results, kind: str) -> Counter[str]:
    return Counter(outcomes[kind]["status"] for outcomes in results["tests"].values())


def _cell(outcome: dict[str, Any]) -> str:
    reason = outcome.get("reason", "").replace("|", "\\|")
    return f"{outcome['status']} ({reason})" if reason else outcome["status"]


def _table(head: list[str], rows: list[list[Any]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * len(head),
        *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows),
        "",
    ]


_INTRO = """\
# Conformance

Made by `make conformance`; do not edit. Data: `tests/conformance/results.json`.

torch's own suite, `torch.testing._internal.distributed.distributed_test.DistributedTest`, on {world_size} ranks on a
CPU: once on plain gloo, once with every group that torch makes wrapped by `compactdist.wrap(codec="raw", min_numel=1)`,
once with the backend name `"compactdist"` (`COMPACTDIST_CODEC=raw COMPACTDIST_MIN_NUMEL=1`). Each group begins a step
as soon as it exists, so that calls travel as frames. Codec `raw` must change no bit.

torch {torch}, compactdist {compactdist}, codec `raw`.

"""

_DIFFERENCES = """\
## What differs from torch's way to run it

* The suite is imported as if it tested gloo, so that tests for gloo alone are tried with compressed groups too.
* CPU all-to-all tests lose the gate "only MPI", for gloo has it too by now. Three of them exchange chunks of unequal
  size by `all_to_all`, which plain gloo refuses and compressed groups can do.
* Which profiler events the inner backend records, with which shapes, is not compared: the backend sends frames.
* Ranks are forked, not spawned; a test that takes longer than {timeout} s fails.

"""


def document(results: Results) -> str:
    """docs/conformance.md."""
    kinds = list(results["kinds"])
    compressed = [kind for kind in kinds if kind != "gloo"]
    tests = results["tests"]
    ran = {n: o for n, o in tests.items() if any(x["status"] != "skipped" for x in o.values())}
    lines = [_INTRO.format(**results), "## Totals\n"]
    lines += _table(
        ["", *(KINDS[kind] for kind in kinds)],
        [[status, *(_statuses(results, kind)[status] for kind in kinds)] for status in ("passed", "skipped", "failed")],
    )
    verdict = judge(results)
    lines += [*(f"* {line}" for line in verdict), ""] if verdict else ["Nothing that plain gloo passes fails.", ""]
    lines += ["## Calls that went through frames", ""]
    frames = {kind: frame_counts(results, kind) for kind in compressed}
    ops = sorted({op for counts in frames.values() for op in counts})
    lines += _table(
        ["operation", *(KINDS[kind] for kind in compressed)],
        [
            *([op, *(frames[kind][op] for kind in compressed)] for op in ops),
            ["all", *(sum(frames[kind].values()) for kind in compressed)],
        ],
    )
    lines += [
        "Both ranks together; a send counts once. Integers, reductions, barriers, gather and scatter pass through.",
        "",
        _DIFFERENCES.format(**results),
        "## Tests that ran",
        "",
        "Frames: calls that went through frames with `wrap()`.",
        "",
    ]
    lines += _table(
        ["test", *(KINDS[kind] for kind in kinds), "frames"],
        [
            [f"`{n}`", *(_cell(o[kind]) for kind in kinds), sum(o["wrapped"].get("compressed", {}).values()) or ""]
            for n, o in ran.items()
        ],
    )
    lines += ["## Tests that torch skips here", ""]
    reasons: dict[str, list[str]] = {}
    for name, outcomes in tests.items():
        if name not in ran:
            reasons.setdefault(outcomes[kinds[0]].get("reason", ""), []).append(f"`{name}`")
    ordered = sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0]))
    lines += _table(["reason", "tests"], [[f"{why} ({len(names)})", ", ".join(names)] for why, names in ordered])
    return "\n".join(lines).rstrip() + "\n"
