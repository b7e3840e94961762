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

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from compactdist.cli.common import Column, check_writable, console, fitting_table, write_json
from compactdist.errors import CompactDistError, ConfigError

__all__ = ["DemoError", "run_demo", "table_of"]

METHODS = ("uncompressed", "int8", "int4", "int2", "binary", "binary-no-residual")
ROUTES = ("ring", "ulysses")
_NEEDED = ("xfuser", "diffusers", "yunchang", "triton", "safetensors", "matplotlib", "compactdist_harness")
_TIMEOUT_SECONDS = 600.0


class DemoError(CompactDistError):
    """The demo cannot run here, or a run of it failed; the text is for the user."""


def run_demo(out: Path, json_file: Path | None, steps: int, routes: Sequence[str]) -> list[dict[str, Any]]:
    """Run all methods on all routes; print the table, write picture and JSON.

    Args:
        out: folder for ``samples.png`` and the workers' results.
        json_file: where to write ``{"rows": [...]}``, ``-`` for standard output, or ``None``.
        steps: denoising steps.
        routes: ``ring``, ``ulysses`` or both.

    Returns:
        The table's rows.

    Raises:
        ConfigError: a route is unknown, or folder or file cannot be written.
        DemoError: a package is missing, or a worker failed.
    """
    unknown = [route for route in routes if route not in ROUTES]
    if unknown:
        raise ConfigError(f"unknown route {', '.join(unknown)}: choose ring or ulysses")
    picture = out / "samples.png"
    check_writable(picture)
    check_writable(json_file)
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(
            f"the demo runs xDiT's FLUX pipeline and needs {', '.join(missing)}. Install it with\n"
            "    pip install --no-deps 'triton==3.9.0'   # xfuser imports it even on a CPU\n"
            "    pip install 'compactdist[xdit]'"
        )
    shown_on = console(json_file)
    rows: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=shown_on) as progress:
        for route in routes:
            task = progress.add_task(f"{route}: starting xDiT on 2 ranks", total=len(METHODS))
            _run_workers(route, out / route, steps, lambda done, t=task, r=route: _show(progress, t, r, done))
            rows += [_row(route, method, out / route) for method in METHODS]
    shown_on.print(table_of(rows, steps, shown_on))
    _draw(picture, out, routes, rows)
    shown_on.print(f"picture: {picture}")
    write_json(json_file, {"steps": steps, "rows": rows})
    if json_file is not None:
        shown_on.print(f"table as JSON: {json_file}")
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


_COLUMNS = (
    Column("method", lambda row: row["method"], left=True),
    Column("raw\nMB", lambda row: f"{row['raw_bytes'] / 1e6:.2f}", spare=1),
    Column("wire\nMB", lambda row: f"{row['wire_bytes'] / 1e6:.2f}"),
    Column("\nb/el", lambda row: f"{row['bits_per_element']:.2f}"),
    Column(
        "call\nb/el", lambda row: "-" if row["call_bits_per_element"] is None else f"{row['call_bits_per_element']:.3f}"
    ),
    Column("\nratio", lambda row: f"{row['ratio']:.2f}"),
    Column("\nerror", lambda row: f"{row['latent_rel_error']:.1e}" if row["latent_rel_error"] else "0"),
    Column("PSNR\ndB", lambda row: "equal" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"),
    Column("\ns", lambda row: f"{row['seconds']:.2f}"),
)


def table_of(rows: Sequence[dict[str, Any]], steps: int, shown_on: Console) -> Table:
    """The table of all runs, a section for each route."""
    return fitting_table(
        _COLUMNS,
        rows,
        shown_on,
        lambda row: str(row["route"]),
        title=f"ten digits, {steps} steps, xDiT's FLUX pipeline on 2 ranks",
        caption="MB of both ranks, headers, scales and the keyframe included; b/el: bits per element over all; call: "
        "in one residual call; error of the latents, PSNR of the images against the uncompressed run",
    )


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
