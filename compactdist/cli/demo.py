"""``compactdist demo``: run the workers, make the table and the picture."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

__all__ = ["DemoError", "run_demo"]

METHODS = ("uncompressed", "int8", "int4", "int2", "binary", "binary-no-residual")
ROUTES = ("ring", "ulysses")
_NEEDED = ("xfuser", "diffusers", "yunchang", "triton", "safetensors", "matplotlib", "compactdist_harness")
_TIMEOUT_SECONDS = 600.0
_TABLE_WIDTH = 104


class DemoError(Exception):
    """The demo cannot run here, or a run of it failed; the text is for the user."""


def run_demo(out: Path, json_file: Path | None, steps: int, routes: Sequence[str]) -> list[dict[str, Any]]:
    """Run all methods on all routes; print the table, write picture and JSON.

    Args:
        out: folder for ``samples.png`` and the workers' results.
        json_file: where to write ``{"rows": [...]}``, or ``None``.
        steps: denoising steps.
        routes: ``ring``, ``ulysses`` or both.

    Returns:
        The table's rows.

    Raises:
        DemoError: a package is missing, a route is unknown, or a worker failed.
    """
    unknown = [route for route in routes if route not in ROUTES]
    if unknown:
        raise DemoError(f"unknown route {', '.join(unknown)}: choose ring or ulysses")
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(
            f"the demo runs xDiT's FLUX pipeline and needs {', '.join(missing)}. Install it with\n"
            "    pip install --no-deps 'triton==3.9.0'   # xfuser imports it even on a CPU\n"
            "    pip install 'compactdist[xdit]'"
        )
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    if console.width < _TABLE_WIDTH:  # a pipe or a log file: a cut table would be worse than long lines
        console = Console(width=_TABLE_WIDTH)
    rows: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for route in routes:
            task = progress.add_task(f"{route}: starting xDiT on 2 ranks", total=len(METHODS))
            _run_workers(route, out / route, steps, lambda done, t=task, r=route: _show(progress, t, r, done))
            rows += [_row(route, method, out / route) for method in METHODS]
    console.print(_table(rows, steps))
    picture = out / "samples.png"
    _draw(picture, out, routes, rows)
    console.print(f"picture: {picture}")
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps({"steps": steps, "rows": rows}, indent=1) + "\n")
        console.print(f"table as JSON: {json_file}")
    return rows


def _show(progress: Progress, task: Any, route: str, done: int) -> None:
    what = METHODS[done] if done < len(METHODS) else "done"
    progress.update(task, completed=done, description=f"{route}: {what}")


def _run_workers(route: str, folder: Path, steps: int, report: Any) -> None:
    """Start torchrun and follow the result files it writes, one per method."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.json"):
        old.unlink()
    log = folder / "log.txt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "compactdist_harness.demo_worker", "--route", route, "--out", str(folder), "--steps", str(steps)]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **os.environ}
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    with log.open("w") as stream:
        worker = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            while worker.poll() is None:
                report(sum((folder / f"{method}.json").exists() for method in METHODS))
                if time.monotonic() > deadline:
                    raise DemoError(f"the {route} run took more than {_TIMEOUT_SECONDS:g} s; its output is in {log}")
                time.sleep(0.1)
        finally:
            if worker.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()
    if worker.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise DemoError(f"the {route} run failed (exit status {worker.returncode}); the end of {log}:\n{tail}")
    report(len(METHODS))


def _row(route: str, method: str, folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    record = json.loads((folder / f"{method}.json").read_text())
    images = load_file(str(folder / f"{method}.safetensors"))["images"].double()
    reference = load_file(str(folder / f"{METHODS[0]}.safetensors"))["images"].double()
    error = float((images - reference).square().mean())
    return {
        "route": route,
        "method": method,
        "raw_bytes": record["raw_bytes"],
        "wire_bytes": record["wire_bytes"],
        "bits_per_element": 32 * record["wire_bytes"] / record["raw_bytes"],
        "call_bits_per_element": record["call_bits_per_element"],
        "ratio": record["raw_bytes"] / record["wire_bytes"],
        "latent_rel_error": record["relative_error"],
        "psnr_db": -10 * math.log10(error) if error > 0 else None,
        "seconds": record["seconds"],
    }


def _table(rows: Sequence[dict[str, Any]], steps: int) -> Table:
    table = Table(
        title=f"ten digits, {steps} steps, xDiT's FLUX pipeline on 2 ranks",
        caption="MB of both ranks, headers, scales and the keyframe included; b/el: bits per element over all,\n"
        "call: in one residual call; error of the latents, PSNR of the images against the uncompressed run",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE,
    )
    for head in ("route", "method"):
        table.add_column(head, no_wrap=True)
    for head in ("raw MB", "wire MB", "b/el", "call", "ratio", "error", "PSNR dB", "s"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        call_bits, psnr = row["call_bits_per_element"], row["psnr_db"]
        table.add_row(
            row["route"],
            row["method"],
            f"{row['raw_bytes'] / 1e6:.2f}",
            f"{row['wire_bytes'] / 1e6:.2f}",
            f"{row['bits_per_element']:.2f}",
            "-" if call_bits is None else f"{call_bits:.3f}",
            f"{row['ratio']:.2f}",
            f"{row['latent_rel_error']:.1e}" if row["latent_rel_error"] else "0",
            "equal" if psnr is None else f"{psnr:.1f}",
            f"{row['seconds']:.2f}",
            end_section=row["method"] == METHODS[-1],
        )
    return table


def _draw(path: Path, out: Path, routes: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Draw one picture of samples: a column per route, a row per method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from safetensors.torch import load_file

    figure, axes = plt.subplots(
        len(METHODS), len(routes), figsize=(6.4 * len(routes) + 1.6, 0.85 * len(METHODS) + 0.4), squeeze=False
    )
    by_name = {(row["route"], row["method"]): row for row in rows}
    for column, route in enumerate(routes):
        for line, method in enumerate(METHODS):
            images = load_file(str(out / route / f"{method}.safetensors"))["images"]
            axis = axes[line][column]
            axis.imshow(images.permute(1, 0, 2).reshape(images.shape[1], -1), cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            row = by_name[route, method]
            if line == 0:
                axis.set_title(f"{route}, 2 ranks", fontsize=10)
            label = method if line == 0 else f"{method}\n{row['ratio']:.1f}x, error {row['latent_rel_error']:.1e}"
            axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
