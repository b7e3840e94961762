"""Run an xDiT script or module on a CPU: `python -m compactdist_harness.cpu (SCRIPT | -m MODULE) ...`."""

from __future__ import annotations

import sys

from compactdist_common.launch import run_as_main
from compactdist_harness.cpu import pretend_cuda, xdit


def main(words: list[str] | None = None) -> None:
    """Install `xdit` and `pretend_cuda`, then run a script or a module as `__main__`."""
    words = sys.argv[1:] if words is None else words
    if not words or words == ["-m"]:
        raise SystemExit("usage: python -m compactdist_harness.cpu (SCRIPT | -m MODULE) [its own arguments]")
    xdit.install()
    pretend_cuda.install()
    run_as_main(words)


if __name__ == "__main__":
    main()
