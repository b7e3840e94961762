"""Run torch's suite on compressed groups; rewrite docs/conformance.md and tests/conformance/results.json."""

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
    parser.add_argument("--kinds", nargs="+", choices=list(report.KINDS), default=list(report.KINDS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the data go instead")
    args = parser.parse_args()
    whole = args.only is None and args.kinds == list(report.KINDS)

    from tests.conformance import suite  # imports torch's tests, which takes seconds

    began = time.monotonic()
    names = args.only or suite.test_names()

    def progress(name: str, outcome: suite.Outcome) -> None:
        elapsed = time.monotonic() - began
        print(f"{elapsed:6.1f} s  {kind:7} {outcome.status:7} {name} {outcome.reason}".rstrip(), flush=True)

    outcomes = {}
    for kind in args.kinds:
        outcomes[kind] = suite.run(kind, names, progress)
    results = {
        "torch": suite.torch.__version__.split("+")[0],
        "compactdist": suite.compactdist.__version__,
        "world_size": suite.WORLD_SIZE,
        "timeout": suite.TEST_TIMEOUT,
        "kinds": args.kinds,
        "excluded": {kind: suite.EXCLUDED[kind] for kind in args.kinds},
        "tests": {name: {kind: outcomes[kind][name].as_dict() for kind in args.kinds} for name in names},
    }
    target = args.json or (ROOT / "tests/conformance/results.json" if whole else None)
    if target is not None:
        target.write_text(json.dumps(results, indent=1) + "\n")
    if whole and args.json is None:
        page = ROOT / "docs/conformance.md"
        page.parent.mkdir(exist_ok=True)
        page.write_text(report.document(results))
    for kind in args.kinds:
        frames = report.frame_counts(results, kind)
        statuses = [o[kind]["status"] for o in results["tests"].values()]
        counts = ", ".join(f"{statuses.count(s)} {s}" for s in ("passed", "skipped", "failed"))
        print(f"{kind}: {counts}; {sum(frames.values())} calls through frames {dict(sorted(frames.items()))}")
    wrong = report.judge(results, whole=whole)
    print("\n".join(wrong) if wrong else f"conforms ({time.monotonic() - began:.0f} s)")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
