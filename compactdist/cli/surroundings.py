"""``compactdist doctor``: versions, processor, GPUs, environment variables and the cache of compiled kernels."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from compactdist import __version__, _torch, kernels
from compactdist.cli.findings import Finding
from compactdist.config import Options
from compactdist.errors import CompactDistError
from compactdist.group.environment import check_names, settings_from_environment
from compactdist.presets import settled
from compactdist.wire import VERSION

__all__ = [
    "cache_findings",
    "compiled_kernels",
    "machine_findings",
    "options_of",
    "variable_findings",
    "version_findings",
]

_OPTIONAL = {"xfuser": "the xDiT adapter", "diffusers": "the diffusers adapter", "cache-dit": "cache-dit's parallelism"}
_INSTRUCTION_SETS = ("sse4.2", "avx", "avx2", "fma", "avx512f", "avx512bw", "avx512vnni", "avx512bf16", "amx-tile")
_BUSY = 1.5
_ARM_SETS = ("neon", "dotprod", "i8mm", "bf16", "sve")


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# --- versions


def version_findings() -> list[Finding]:
    """Versions of this library, of what it needs and of what adapters need."""
    where = "Versions"
    found = [
        Finding(where, "compactdist", f"{__version__}, frames of version {VERSION}, kernels {kernels.digest()}"),
        Finding(where, "Python", f"{platform.python_version()}, {platform.system()} {platform.release()}"),
        _torch_finding(where),
    ]
    found += [Finding(where, name, _installed(name) or "absent") for name in ("numpy",)]
    found.append(_numba_finding(where))
    triton = _installed("triton") or _installed("pytorch-triton")
    slow = triton is None and torch.cuda.is_available()
    found.append(
        Finding(
            where,
            "triton",
            triton or "absent; codecs on a GPU need it",
            "warning" if slow else "ok",
            "without it codecs run on torch operations on the GPU, much slower: pip install triton" if slow else "",
        )
    )
    for name, used_by in _OPTIONAL.items():
        found.append(Finding(where, name, _installed(name) or f"absent; only {used_by} needs it"))
    return found


def _torch_finding(where: str) -> Finding:
    checked = ", ".join(f"{major}.{minor}" for major, minor in _torch.CHECKED_VERSIONS)
    if _torch.VERSION in _torch.CHECKED_VERSIONS:
        return Finding(where, "torch", torch.__version__)
    if min(_torch.CHECKED_VERSIONS) > _torch.VERSION:
        return Finding(where, "torch", f"{torch.__version__}, too old", "error", f"install one of {checked}")
    remedy = f"the tests run on {checked}: take one of these if anything fails"
    return Finding(where, "torch", f"{torch.__version__}, untested", "warning", remedy)


def _numba_finding(where: str) -> Finding:
    numba = _installed("numba")
    if numba is not None and find_spec("numba") is not None:
        return Finding(where, "numba", f"{numba}, llvmlite {_installed('llvmlite')}")
    return Finding(
        where,
        "numba",
        "absent",
        "warning",
        "codecs run on torch operations on a CPU, several times slower: pip install 'numba>=0.66'",
    )


# --- the machine


def machine_findings() -> list[Finding]:
    """The processor, how many of its cores this process may use, and GPUs."""
    where, cores, threads = "Machine", _usable_cores(), torch.get_num_threads()
    crowded, load = threads > math.ceil(cores), _load()
    found = [
        Finding(where, "CPU", _processor()),
        Finding(where, "cores", f"{cores:g} usable of {os.cpu_count()}"),
        Finding(
            where,
            "torch threads",
            str(threads),
            "warning" if crowded else "ok",
            f"more threads than usable cores wait for one another: set OMP_NUM_THREADS={math.floor(cores) or 1}"
            if crowded
            else "",
        ),
        Finding(
            where,
            "load average",
            f"{load:.2f}",
            "warning" if load > _BUSY * cores else "ok",
            "other work shares this machine: a codec's threads wait for it, and take many times as long"
            if load > _BUSY * cores
            else "",
        ),
        _kernels_finding(where),
    ]
    for number in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(number)
        found.append(
            Finding(
                where,
                f"GPU {number}",
                f"{of.name}, capability {of.major}.{of.minor}, {of.total_memory / 2**30:.0f} GiB",
            )
        )
    if not torch.cuda.device_count():
        found.append(Finding(where, "GPU", f"none (torch built with CUDA {torch.version.cuda or 'no'})"))
    found.append(Finding(where, "NCCL", _nccl()))
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else platform.processor() or 'unknown'} ({platform.machine()})"


def _usable_cores() -> float:
    """Cores that this process may run on: those of its mask, and no more than its control group's share of time."""
    cores: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        share = math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        share = math.inf
    return min(cores, share)


def _load() -> float:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def _kernels_finding(where: str) -> Finding:
    native = _native()
    if native is None:
        return Finding(where, "CPU kernels", "torch operations, as Numba is absent")
    if isinstance(native, Exception):
        told = f"cannot be loaded: {type(native).__name__}: {native}"
        return Finding(where, "CPU kernels", told, "error", "install numba and llvmlite anew, in versions that fit")
    known = _ARM_SETS if platform.machine().lower() in ("aarch64", "arm64") else _INSTRUCTION_SETS
    used = ", ".join(name for name in known if native.has_feature(name))
    return Finding(where, "CPU kernels", f"compiled for {used or 'the plain processor'}")


def _native() -> Any:
    """The module that loads compiled kernels; ``None`` without Numba; the exception that importing it raises."""
    if find_spec("numba") is None or find_spec("llvmlite") is None:
        return None
    try:
        return import_module("compactdist.kernels.cpu.native")
    except Exception as error:  # an installation that does not fit raises anything
        return error


def _nccl() -> str:
    if not torch.cuda.is_available() or not torch.distributed.is_nccl_available():
        return "not in use: no GPU"
    said: Any = torch.cuda.nccl.version()
    return ".".join(map(str, said)) if isinstance(said, tuple) else str(said)


# --- environment variables


def variable_findings(environment: Mapping[str, str]) -> list[Finding]:
    """Every variable of ours with the value it stands for, or why it is none; then all of them together."""
    where, found = "Environment variables", []
    for name in sorted(environment):
        try:
            check_names([name])
            if not name.startswith("COMPACTDIST_"):
                continue
            settings = settings_from_environment({name: environment[name]})
        except CompactDistError as error:
            found.append(Finding(where, name, repr(environment[name]), "error", str(error)))
            continue
        told = next(iter(settings.values()), environment[name])
        found.append(Finding(where, name, repr(told)))
    if not found:
        return [Finding(where, "COMPACTDIST_*", "none is set")]
    if all(one.status == "ok" for one in found):
        try:
            options_of(environment)
        except CompactDistError as error:
            found.append(Finding(where, "together", "wrap() would refuse them", "error", str(error)))
    return found


def options_of(environment: Mapping[str, str]) -> Options:
    """The options of a group that ``wrap()`` makes without arguments in this environment.

    Raises:
        CompactDistError: a variable is unknown, or a value is none.
    """
    settings = settled(settings_from_environment(environment), {})
    settings.pop("timeout", None)
    return Options(**settings)


# --- compiled kernels


def compiled_kernels() -> int:
    """How many compiled kernels for CPU tensors the cache holds."""
    place = _cache()
    return 0 if place is None else len(list(place.glob("*.o")))


def cache_findings(before: int, seconds: float) -> list[Finding]:
    """Where compiled kernels are kept, and whether they were there.

    Args:
        before: how many there were before the streams were checked.
        seconds: what checking the streams took.
    """
    where, found = "Compiled kernels", []
    native = _native()
    if native is None or isinstance(native, Exception):
        return [
            Finding(where, "CPU", "none, as Numba is absent" if native is None else "none, as they cannot be loaded")
        ]
    place, made = _cache(), compiled_kernels() - before
    if place is None:
        chosen = os.environ.get("NUMBA_CACHE_DIR")
        found.append(
            Finding(
                where,
                "CPU cache folder",
                f"{chosen or 'no folder'} can not be written",
                "warning",
                "every process compiles anew, for a minute or more: set NUMBA_CACHE_DIR to one that can",
            )
        )
    else:
        found.append(Finding(where, "CPU cache folder", f"{place}, can be written"))
        warm = "warm" if not made else f"cold: {made} were compiled now, and this check took {seconds:.0f} s"
        found.append(Finding(where, "CPU cache", f"{before + made} kernels, {warm}"))
    if torch.cuda.is_available():
        folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
        held = f"{sum(1 for _ in folder.iterdir())} entries" if folder.is_dir() else "not there yet"
        found.append(Finding(where, "Triton", f"{folder}, {held}"))
    return found


def _cache() -> Path | None:
    native = _native()
    return None if native is None or isinstance(native, Exception) else native.folder()
