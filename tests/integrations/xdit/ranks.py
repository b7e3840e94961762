"""Workers: scripts of this folder that run on several ranks, and how they hand in what they found.

xfuser can be set up once in a process, so what needs other groups, or fresh ones, runs in processes of its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from tests.scripts import run_script

FOLDER = Path(__file__).parent


def run_worker(script: str, out: Path, *words: str, ranks: int = 2, timeout: float = 220) -> None:
    """Run a script of this folder on `ranks` CPU ranks; it has to write `out`, its first argument."""
    said = run_script(FOLDER / script, str(out), *words, ranks=ranks, timeout=timeout, xfuser=True)
    assert out.exists(), said[-4000:]


def hand_in(found: Any, out: Path) -> NoReturn:
    """Write what every rank has found, as a JSON list by rank, and end this rank."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(gathered, indent=1))
    leave()


def leave() -> NoReturn:
    """End this rank once all are here; the launcher then ends its process, whatever xfuser's and gloo's threads do."""
    dist.barrier()
    sys.exit()
