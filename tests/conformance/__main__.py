"""Run torch's suite on compressed groups; rewrite docs/conformance.md and the lists that it is made from."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from tests.conformance import report

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="TEST", help="run these tests and write no document")
    parser.add_argument("--inner", nargs="+", choices=list(report.INNER), default=list(report.INNER))
    parser.add_argument("--kinds", nargs="+", choices=list(report.KINDS), help="of those over the inner groups")
    parser.add_argument("--json", type=Path, metavar="FOLDER", help="where the data go instead")
    args = parser.parse_args()
    whole = args.only is None and args.kinds is None
    began, wrong = time.monotonic(), []
    for inner in args.inner:
        kinds = [kind for kind in report.INNER[inner][1] if args.kinds is None or kind in args.kinds]
        if not kinds:
            continue
        results = run(inner, kinds, args.only)
        if whole or args.json is not None:
            target = report.path_of(inner, args.json)
            target.write_text(json.dumps(results, indent=1) + "\n")
        for kind in kinds:
            frames = report.frame_counts(results, kind)
            statuses = [o[kind]["status"] for o in results["tests"].values()]
            counts = ", ".join(f"{statuses.count(s)} {s}" for s in ("passed", "skipped", "failed"))
            print(f"{kind}: {counts}; {sum(frames.values())} calls through frames {dict(sorted(frames.items()))}")
        wrong += report.judge(results, whole=whole)
    if whole and args.json is None:
        (ROOT / "docs/conformance.md").write_text(report.document(report.committed()))
    print("\n".join(wrong) if wrong else f"conforms ({time.monotonic() - began:.0f} s)")
    return 1 if wrong else 0


def run(inner: str, kinds: list[str], only: list[str] | None) -> report.Results:
    """Run the suite with some kinds of groups over one inner group."""
    from tests.conformance import suite  # imports torch's tests, which takes seconds

    began, names, outcomes = time.monotonic(), only or suite.test_names(), {}

    def progress(name: str, outcome: suite.Outcome) -> None:
        elapsed = time.monotonic() - began
        print(f"{elapsed:6.1f} s  {kind:12} {outcome.status:7} {name} {outcome.reason}".rstrip(), flush=True)

    for kind in kinds:
        outcomes[kind] = suite.run(kind, names, progress)
    return {
        "inner": inner,
        "torch": suite.torch.__version__.split("+")[0],
        "compactdist": suite.compactdist.__version__,
        "world_size": suite.WORLD_SIZE,
        "timeout": suite.TEST_TIMEOUT,
        "kinds": kinds,
        "excluded": {kind: suite.EXCLUDED[kind] for kind in kinds},
        "tests": {name: {kind: outcomes[kind][name].as_dict() for kind in kinds} for name in names},
    }


if __name__ == "__main__":
    sys.exit(main())
