"""Runs a script on several ranks as torchrun would, without importing anything anew in each of them."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path
from unittest import mock

from tests.launch import run_ranks

ROOT = Path(__file__).parents[1]
WARM = "tests.integrations.xdit.warm"


def run_script(script: Path, *words: str, ranks: int = 2, timeout: float = 220, xfuser: bool = False) -> str:
    """What `script words...` prints, its ranks together; raises AssertionError with all they wrote if one fails.

    A script finds its words, and in the environment its rank, the number of ranks and where they meet.

    Args:
        script: Runs as `__main__`; it may end with `sys.exit()`, not with `os._exit()`.
        words: Of its command line.
        ranks: How many.
        timeout: Seconds after which ranks still running are shown and killed.
        xfuser: Ranks are forked from a process that has imported xfuser and diffusers and has done nothing else, for
            that takes a rank longer than most scripts; otherwise from this one.
    """
    if xfuser:
        _start_server()
    with tempfile.TemporaryDirectory(prefix="script-") as folder:
        files = Path(folder, "printed"), Path(folder, "errors")
        method = "forkserver" if xfuser else "fork"
        args = ((str(script), *words), files, WARM if xfuser else None)
        try:
            run_ranks(_as_script, ranks, args=args, timeout=timeout, init=False, start_method=method)
        except AssertionError as error:
            printed, errors = (file.read_text()[-4000:] if file.exists() else "" for file in files)
            raise AssertionError(f"{error}\n--- {script.name} printed ---\n{printed}{errors}") from None
        return files[0].read_text()


@cache
def _start_server() -> None:
    """Start the process that ranks are forked from; it ends with this one."""
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    multiprocessing.set_forkserver_preload([WARM])
    with mock.patch.dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1"):
        multiprocessing.forkserver.ensure_running()


def _as_script(
    rank: int, world_size: int, words: tuple[str, ...], files: tuple[Path, Path], loaded: str | None
) -> None:
    """Be `python words[0] words[1] ...`, with what it prints in two files."""
    assert loaded is None or loaded in sys.modules, f"the process that ranks are forked from could not import {loaded}"
    multiprocessing.set_start_method("fork", force=True)  # else locks that a script makes would outlive it
    warnings.simplefilter("ignore")
    for name, number, file in (("stdout", 1, files[0]), ("stderr", 2, files[1])):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
        setattr(sys, name, os.fdopen(number, "w", closefd=False))
    sys.argv = list(words)
    sys.path.insert(0, str(Path(words[0]).parent))
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
