"""Workers under torchrun: how tests start them, and how they hand in what they found.

xfuser can be set up once in a process, so what needs other groups, or fresh ones, runs in processes of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[2]


def run_worker(script: str, out: Path, *words: str, ranks: int = 2, timeout: float = 220) -> None:
    """Run a script of this folder on `ranks` CPU ranks; it has to write `out`, its first argument."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), str(FOLDER / script), str(out), *words]
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, timeout=timeout, capture_output=True, text=True, check=False)
    assert out.exists(), done.stdout[-2000:] + done.stderr[-4000:]


def hand_in(found: Any, out: Path) -> NoReturn:
    """Write what every rank has found, as a JSON list by rank, and end this process."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(gathered, indent=1))
    leave()


def leave() -> NoReturn:
    """End this process once all ranks are here."""
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)  # xfuser's and gloo's threads may outlive an orderly exit
