"""What a conformance run means, and the document made from it. Imports nothing of torch."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

KINDS = {
    "gloo": "plain gloo",
    "wrapped": "`wrap()`",
    "backend": "backend name",
    "int8": "`int8`",
    "nccl": "plain NCCL-like",
    "nccl-wrapped": "`wrap()`",
    "nccl-int8": "`int8`",
}
INNER = {
    "gloo": ("plain gloo", ["gloo", "wrapped", "backend", "int8"]),
    "nccl_like": ("a plain group with NCCL's manners", ["nccl", "nccl-wrapped", "nccl-int8"]),
}
"""The lists: what inner groups are called, and the kinds of groups over them, the plain one first."""
REDUCING_KINDS = ("int8", "nccl-int8")
COMPRESSED_OPS = ("all_gather", "all_to_all", "broadcast", "send")
REDUCTIONS = ("all_reduce",)
LEAST_PASSED = {"gloo": 90, "nccl_like": 90}

Results = dict[str, Any]


def judge(results: Results, *, whole: bool = True) -> list[str]:
    """What is wrong with a run, as sentences; nothing if it conforms.

    Args:
        results: of one inner group, as in the committed lists.
        whole: all tests were run, so that their number counts.
    """
    wrong = []
    base, kinds = plain_of(results["inner"]), compressed_kinds(results)
    for name, outcomes in results["tests"].items():
        plain = outcomes.get(base, {"status": "passed"})["status"]
        for kind in kinds:
            status, reason = outcomes[kind]["status"], outcomes[kind].get("reason", "")
            excused = status == "skipped" and name in results["excluded"][kind]
            lost = plain == "passed" and status != "passed" and not excused
            if lost or (plain == "skipped" and status == "failed"):
                wrong.append(f"{name}: {plain} with {base}, {status} with {kind}: {reason}")
    for kind in kinds:
        passed = sum(outcomes[kind]["status"] == "passed" for outcomes in results["tests"].values())
        least = LEAST_PASSED[results["inner"]]
        if whole and passed < least:
            wrong.append(f"{kind}: {passed} tests passed, at least {least} must")
        frames = frame_counts(results, kind)
        ops = (*COMPRESSED_OPS, *REDUCTIONS) if kind in REDUCING_KINDS and whole else COMPRESSED_OPS
        wrong += [f"{kind}: no {op} went through frames" for op in ops if not frames[op]]
    return wrong


def path_of(inner: str, folder: Path | None = None) -> Path:
    """Where the list of an inner group lies, or would lie in another folder."""
    return (folder or Path(__file__).parent) / f"results_{inner}.json"


def committed() -> dict[str, Results]:
    """The lists by inner group."""
    return {inner: json.loads(path_of(inner).read_text()) for inner in INNER}


def plain_of(inner: str) -> str:
    """The kind of group that a list compares with."""
    return INNER[inner][1][0]


def compressed_kinds(results: Results) -> list[str]:
    """The compressed kinds of a run."""
    return [kind for kind in results["kinds"] if kind != plain_of(results["inner"])]


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

Made by `make conformance`; do not edit. Data: `tests/conformance/results_gloo.json` and `results_nccl_like.json`.

torch's own suite, `torch.testing._internal.distributed.distributed_test.DistributedTest`, on {world_size} ranks on a
CPU, over two inner groups: gloo, and one that has NCCL's manners (`compactdist.testing.act_like_nccl`). On each the
suite runs with the plain group and with every group that torch makes wrapped at once:

* `wrap()`: by `compactdist.wrap(codec="raw", min_numel=1)`. Codec `raw` must change no bit.
* `int8`: with codec `int8` and a policy that names it for all floating-point tensors, in reductions too, and lets
  integers pass. First calls of a site are keyframes, which are exact (`keyframe="raw"`).
* backend name: with `"compactdist"` (`COMPACTDIST_CODEC=raw COMPACTDIST_MIN_NUMEL=1`).

Each group begins a step as soon as it exists, so that calls travel as frames.

torch {torch}, compactdist {compactdist}.

"""

_DIFFERENCES = """\
## What differs from torch's way to run it

* The suite is imported as if it tested gloo, so that tests for gloo alone are tried with other groups too.
* CPU all-to-all tests lose the gate "only MPI", for gloo has it too by now. Three of them exchange chunks of unequal
  size by `all_to_all`, which plain gloo refuses and compressed groups can do.
* Which profiler events the inner backend records, with which shapes, is not compared: the backend sends frames.
* Ranks are forked, not spawned; a test that takes longer than {timeout} s fails.

"""


def document(lists: dict[str, Results]) -> str:
    """docs/conformance.md, from the lists by inner group."""
    first = next(iter(lists.values()))
    lines = [_INTRO.format(**first)]
    for results in lists.values():
        lines += _section(results)
    lines += [_DIFFERENCES.format(**first), "## Tests that torch skips here", ""]
    reasons: dict[str, list[str]] = {}
    for name, outcomes in first["tests"].items():
        if name not in _ran(first):
            reasons.setdefault(outcomes[first["kinds"][0]].get("reason", ""), []).append(f"`{name}`")
    ordered = sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0]))
    lines += _table(["reason", "tests"], [[f"{why} ({len(names)})", ", ".join(names)] for why, names in ordered])
    return "\n".join(lines).rstrip() + "\n"


def _ran(results: Results) -> Results:
    return {n: o for n, o in results["tests"].items() if any(x["status"] != "skipped" for x in o.values())}


def _section(results: Results) -> list[str]:
    """What the document says of one inner group."""
    kinds, compressed = list(results["kinds"]), compressed_kinds(results)
    lines = [f"## Over {INNER[results['inner']][0]}", ""]
    lines += _table(
        ["", *(KINDS[kind] for kind in kinds)],
        [[status, *(_statuses(results, kind)[status] for kind in kinds)] for status in ("passed", "skipped", "failed")],
    )
    verdict = judge(results)
    lines += [*(f"* {line}" for line in verdict), ""] if verdict else ["Nothing that the plain group passes fails.", ""]
    frames = {kind: frame_counts(results, kind) for kind in compressed}
    ops = sorted({op for counts in frames.values() for op in counts})
    lines += _table(
        ["calls through frames", *(KINDS[kind] for kind in compressed)],
        [
            *([op, *(frames[kind][op] for kind in compressed)] for op in ops),
            ["all", *(sum(frames[kind].values()) for kind in compressed)],
        ],
    )
    lines += ["Both ranks together; a send counts once. Integers, barriers, gather and scatter pass through.", ""]
    lines += _table(
        ["test", *(KINDS[kind] for kind in kinds), "frames with `wrap()`"],
        [
            [
                f"`{n}`",
                *(_cell(o[kind]) for kind in kinds),
                sum(o[compressed[0]].get("compressed", {}).values()) or "",
            ]
            for n, o in _ran(results).items()
        ],
    )
    return lines
