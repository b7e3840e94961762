"""xDiT's FLUX at full width on two ranks, end to end, by codec.

    python -m benchmarks.gpu.e2e --route ring --json benchmarks/results/gpu_e2e_ring.json
    python -m benchmarks.gpu.e2e --route ulysses --json benchmarks/results/gpu_e2e_ulysses.json
    python -m benchmarks.gpu.e2e --route ring --tiny --inner nccl_like --methods int2       # on a CPU

Two ranks over NCCL, which take the network where they share one GPU: then the link is that of loopback, about 1.5 GB/s
on an H200's host, and both take turns on the GPU. The model has FLUX's width (24 heads of 128 channels, 4,608 tokens)
and fewer blocks (4 double, 8 single), random weights, bfloat16. A request of each method follows one that warms up.

    ms/step     median over the steps after the first, the slower rank's; the device is waited for before each step
    x plain     ms/step of the uncompressed pipeline, in the same process, over it
    first ms    the step of keyframes
    error       relative error (of norms) of the final latents, against the uncompressed pipeline's
    sent MB     bytes of a request that both ranks put on the link, beside what they would be uncompressed
    state MB    memory of the histories, of both ranks

A method that fails, or hangs, ends both ranks; the others go on in new ones. ``--tiny`` takes the harness's tiny FLUX
on a CPU instead, over gloo or over a group with NCCL's manners: it shows that this script runs, and no speed.
"""

from __future__ import annotations

import faulthandler
import importlib.metadata
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu.common import EXIT_WITHOUT_GPU, apart, cell, parser, settle, synchronize, table

RANKS = 2
PLAIN = "plain"
METHODS: dict[str, dict[str, Any]] = {
    "passed through": {"codec": "raw", "policy": lambda call: "pass"},
    "raw": {"codec": "raw"},
    **{name: {"codec": name} for name in ("binary", "int2", "int4", "int8")},
    "int2 block": {"codec": "int2:scales=block"},
}
GRACE_SECONDS = 15.0
"""For the other rank to print its own error."""
_COUNTED = ("compressed_calls", "passed_through", "wire_bytes", "raw_bytes", "state_bytes")


# --- a rank


def pipeline(args: Any) -> tuple[Any, dict[str, Any]]:
    """What is asked for, under xDiT on all ranks of this process's group, and the arguments to call it with."""
    from compactdist_harness import xdit
    from compactdist_harness.cpu import xdit as xdit_on_cpu

    degrees = {"ring_degree" if args.route == "ring" else "ulysses_degree": RANKS}
    if args.tiny:
        xdit_on_cpu.install()
        pipe, call_kwargs = xdit.parallel_tiny("flux", steps=args.steps, **degrees)
        if args.inner == "nccl_like":
            from compactdist.testing import act_like_nccl
            from compactdist_xdit.routes import slots

            for slot in slots([args.route]):
                setattr(slot.owner, slot.attribute, act_like_nccl(slot.get()))
        return pipe, call_kwargs
    from xfuser import xFuserArgs

    from benchmarks.gpu import full_flux

    # Ring attention needs a kernel that returns the log-sum-exp.
    arguments = xFuserArgs(
        model="flux", attention_backend="SDPA_FLASH", num_inference_steps=args.steps, warmup_steps=1, **degrees
    )
    engine_config, _ = arguments.create_config()
    engine_config.runtime_config.dtype = torch.bfloat16
    pipe, call_kwargs = full_flux.build(args.steps, args.double, args.single)
    return xdit.wrapped(pipe, engine_config), call_kwargs


class Requests:
    """Requests of one pipeline, with the time of each step."""

    def __init__(self, pipe: Any, call_kwargs: dict[str, Any]) -> None:
        self._pipe, self._call_kwargs, self._marks = pipe, call_kwargs, [0.0]
        self.reference: Any = None
        inner = pipe
        while "module" in vars(inner):
            inner = inner.module
        inner.transformer.register_forward_pre_hook(lambda *_: self._mark())

    def _mark(self) -> None:
        synchronize()
        self._marks.append(time.perf_counter())

    def once(self) -> tuple[Any, dict[str, Any]]:
        """Latents, ``None`` on the rank without them, and the times of a request."""
        self._marks.clear()
        synchronize()
        dist.barrier()
        began = time.perf_counter()
        output = self._pipe(**self._call_kwargs)
        self._mark()
        steps = [1000 * (b - a) for a, b in zip(self._marks, self._marks[1:], strict=False)]
        found = {"request_s": self._marks[-1] - began, "steps_ms": steps, "first_ms": steps[0]}
        return None if output is None else output[0].float(), found | {"step_ms": statistics.median(steps[1:])}

    def line(self, name: str, settings: dict[str, Any]) -> dict[str, Any]:
        """What one method takes, as this rank sees it."""
        if name == PLAIN:
            self.once()
            self.reference, line = self.once()
            return line
        import compactdist_xdit

        with compactdist_xdit.enable(self._pipe, **settings) as handle:
            self.once()
            for group in handle.groups.values():
                group.reset_stats()
            latents, line = self.once()
            stats = list(handle.stats().values())
            line |= {count: sum(getattr(of, count) for of in stats) for count in _COUNTED}
        if latents is not None and self.reference is not None:
            line["error_of_latents"] = float((latents - self.reference).norm() / self.reference.norm())
        passing = "policy" in settings
        if not line["passed_through" if passing else "compressed_calls"] or (passing and line["compressed_calls"]):
            raise RuntimeError(f"compressed {line['compressed_calls']}, passed through {line['passed_through']}")
        return line


def rank_main(args: Any) -> None:
    """The methods on this rank, the plain one first; a line of JSON for each, as it is done, in the parent's folder."""
    faulthandler.dump_traceback_later(args.limit, exit=True)
    warnings.simplefilter("ignore")  # of diffusers and xfuser
    rank = int(os.environ["RANK"])
    lines = Path(args.folder, f"rank{rank}.jsonl")
    torch.set_num_threads(1 if args.tiny else 4)
    name = "setting up"
    try:
        requests = Requests(*pipeline(args))
        for name in (PLAIN, *args.methods):
            faulthandler.cancel_dump_traceback_later()
            faulthandler.dump_traceback_later(args.limit, exit=True)
            settings = METHODS.get(name, {}) | ({"min_numel": 64} if args.tiny else {})
            _append(lines, {"name": name, **requests.line(name, settings)})
    except Exception as error:
        traceback.print_exc()
        _append(lines, {"name": name, "error": f"rank {rank}: {type(error).__name__}: {error}"})
        sys.stdout.flush()
        os._exit(1)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # xfuser's and gloo's threads may outlive an orderly exit


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


# --- the parent


def on_ranks(args: Any, methods: Sequence[str]) -> list[list[dict[str, Any]]]:
    """What each rank wrote of these methods, before all were done or one failed."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        free.close()
        command = [sys.executable, "-m", "benchmarks.gpu.e2e", "--route", args.route, "--steps", str(args.steps)]
        command += ["--double", str(args.double), "--single", str(args.single), "--limit", str(args.limit)]
        command += ["--tiny", "--inner", args.inner] if args.tiny else []
        command += ["--methods", *methods, "--folder", folder]
        ranks = [subprocess.Popen(command, env=_environment(rank, port, args.tiny)) for rank in range(RANKS)]
        try:
            _wait(ranks)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        written = [Path(folder, f"rank{rank}.jsonl") for rank in range(RANKS)]
        return [[json.loads(line) for line in one.read_text().splitlines()] if one.exists() else [] for one in written]


def _environment(rank: int, port: str, on_cpu: bool) -> dict[str, str]:
    own = {"RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {**os.environ, **{key: str(value) for key, value in own.items()}, "LOG_LEVEL": "error"}
    environment |= {"GLOO_SOCKET_IFNAME": "lo"}
    if not on_cpu and torch.cuda.device_count() < RANKS:
        environment |= {"LOCAL_RANK": "0", **apart(rank)}
    return environment


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Until all have ended; where one failed, the others have a moment to end by themselves."""
    until = None
    while any(process.poll() is None for process in ranks):
        if until is None and any(process.poll() for process in ranks):
            until = time.monotonic() + GRACE_SECONDS
        if until is not None and time.monotonic() > until:
            return
        time.sleep(0.1)


def merged(name: str, of_ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One line of what all ranks wrote: the slower one's times, bytes summed up, the error of the one with latents."""
    slowest = max(of_ranks, key=lambda line: line["step_ms"])
    line = {"name": name, **{key: slowest[key] for key in ("step_ms", "first_ms", "request_s", "steps_ms")}}
    line |= {count: sum(of[count] for of in of_ranks) for count in _COUNTED if count in of_ranks[0]}
    errors = [of["error_of_latents"] for of in of_ranks if "error_of_latents" in of]
    if name != PLAIN and not errors:
        line["error"] = "no rank has both latents and those of the plain request"
    return line | ({"error_of_latents": errors[0]} if errors else {})


def measure(methods: Sequence[str], run: Callable[[Sequence[str]], list[list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """A line for the plain pipeline and for each method. Those left after one that failed run again, in new ranks.

    Args:
        methods: by name.
        run: :func:`on_ranks`.
    """
    found: dict[str, dict[str, Any]] = {}
    left = list(methods)
    while True:
        of_ranks = [{line["name"]: line for line in lines} for lines in run(left)]
        for name in (PLAIN, *left):
            lines = [of[name] for of in of_ranks if name in of]
            errors = [line["error"] for of in of_ranks for line in of.values() if line.get("error")]
            if len(lines) == RANKS and not any(line.get("error") for line in lines):
                found.setdefault(name, merged(name, lines))
                continue
            text = "; ".join(errors) or "a rank ended, or was ended, without a word: see its output"
            # without the plain pipeline, ranks fail at whatever comes next
            for one in (PLAIN, *left) if name == PLAIN else [name]:
                found.setdefault(one, {"name": one, "error": text})
            print(f"{name} FAILED: {text[:300]}", flush=True)
            break
        left = [name for name in methods if name not in found]
        if not left:
            return [found[name] for name in (PLAIN, *methods)]


def _mb(nbytes: int) -> str:
    return cell(nbytes / 1e6, 0 if nbytes > 100e6 else 2)


def shown(lines: Sequence[dict[str, Any]]) -> str:
    """The table."""
    plain = next((line.get("step_ms") for line in lines if line["name"] == PLAIN), None)
    rows = []
    for line in lines:
        ms, error, wire = line.get("step_ms"), line.get("error_of_latents"), line.get("wire_bytes")
        rows.append(
            [
                line["name"],
                cell(ms, 1),
                cell(plain / ms if plain and ms else None, 2),
                cell(line.get("first_ms"), 1),
                cell(line.get("request_s"), 2),
                "-" if error is None else f"{error:.1e}",
                "-" if wire is None else f"{_mb(wire)} of {_mb(line['raw_bytes'])}",
                cell(line["state_bytes"] / 1e6 if wire is not None else None, 1),
                cell(line.get("compressed_calls")),
                cell(line.get("passed_through")),
            ]
        )
    head = ["", "ms/step", "x plain", "first ms", "request s", "error", "sent MB", "state MB", "compressed", "passed"]
    return table(head, rows)


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--route", choices=("ring", "ulysses"), default="ring")
    made.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    made.add_argument("--steps", type=int, default=8, help="of a request (default 8)")
    made.add_argument("--double", type=int, default=4, help="blocks of two streams (default 4; FLUX.1 has 19)")
    made.add_argument("--single", type=int, default=8, help="blocks of one stream (default 8; FLUX.1 has 38)")
    made.add_argument("--tiny", action="store_true", help="the harness's tiny FLUX on a CPU")
    made.add_argument("--inner", choices=("nccl_like", "gloo"), default="nccl_like", help="the group of --tiny")
    made.add_argument("--limit", type=float, default=200.0, help="seconds a method may take (default 200)")
    made.add_argument("--folder", help="of a rank: where it writes its lines")
    args = made.parse_args()
    if args.folder:
        rank_main(args)
    if not args.tiny and not (torch.cuda.is_available() and dist.is_nccl_available()):
        print("no CUDA device, or a torch without NCCL: nothing was measured (--tiny runs on a CPU)")
        sys.exit(EXIT_WITHOUT_GPU)
    lines = measure(args.methods, lambda left: on_ranks(args, left))
    what = f"tiny FLUX over {args.inner}" if args.tiny else f"FLUX, {args.double} + {args.single} blocks, over NCCL"
    print(f"xDiT, {what}, {args.route}, {RANKS} ranks, {args.steps} steps")
    print(shown(lines))
    about = {name: importlib.metadata.version(name) for name in ("xfuser", "diffusers")}
    shared = not args.tiny and torch.cuda.device_count() < RANKS
    ranks = f"{RANKS}, {args.inner if args.tiny else 'NCCL'}" + (" over loopback on one GPU" if shared else "")
    about |= {"ranks": ranks, "route": args.route, "steps": args.steps, "model": what}
    settle(args.json, {**about, "lines": lines}, lines)


if __name__ == "__main__":
    main()
