"""Run a user's script in this process, after an adapter has been installed in it."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def run_as_main(words: list[str]) -> None:
    """Run a script or a module as `python WORDS` does: as `__main__`, with its own `sys.argv`.

    Args:
        words: `["SCRIPT", *arguments]` or `["-m", "MODULE", *arguments]`.
    """
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")
