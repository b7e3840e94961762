"""The backend name ``"compactdist"``, for ``init_process_group``, ``new_group`` and ``init_device_mesh``.

The same class as ``wrap`` underneath, over gloo for CPU tensors and NCCL for CUDA tensors where torch has it. Options
come from ``pg_options=compactdist.Options(...)`` or the environment (``COMPACTDIST_CODEC`` and so on).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from compactdist import _torch
from compactdist.config import Options
from compactdist.errors import ConfigError
from compactdist.group.agree import agree
from compactdist.group.process_group import CompressedProcessGroup

__all__ = ["BACKEND_NAME", "options_from_environment", "register_backend"]

BACKEND_NAME = "compactdist"
_PREFIX = "COMPACTDIST_"
_FIELDS: dict[str, Any] = {
    "CODEC": str,
    "WARMUP_STEPS": int,
    "ORDER": int,
    "DAMPING": float,
    "LOCAL": str,
    "MIN_NUMEL": int,
    "STATE": str,
    "STATE_BUDGET_BYTES": int,
    "SAMPLE_ERRORS_EVERY": int,
}


def options_from_environment(environment: Mapping[str, str] | None = None) -> Options:
    """Options from variables ``COMPACTDIST_<FIELD>``, e.g. ``COMPACTDIST_CODEC=int4``.

    Raises:
        ConfigError: an unknown variable of that prefix, or a value of the wrong kind.
    """
    env = os.environ if environment is None else environment
    settings: dict[str, Any] = {}
    for name, value in env.items():
        if not name.startswith(_PREFIX):
            continue
        field = name.removeprefix(_PREFIX)
        if field not in _FIELDS:
            known = ", ".join(_PREFIX + f for f in _FIELDS)
            raise ConfigError(f"unknown environment variable {name}; there are: {known}")
        try:
            settings[field.lower()] = _FIELDS[field](value)
        except ValueError:
            raise ConfigError(f"{name}={value!r} is not a valid {_FIELDS[field].__name__}") from None
    return Options(**settings)


def _inner_group(opts: Any) -> Any:
    """A plain group over gloo (and NCCL), as torch would make it."""
    inner = dist.ProcessGroup(opts.store, opts.group_rank, opts.group_size)
    gloo = dist.ProcessGroupGloo(
        _torch.prefix_store("cpu/", opts.store), opts.group_rank, opts.group_size, timeout=opts.timeout
    )
    gloo._set_sequence_number_for_group()
    inner._register_backend(torch.device("cpu"), _torch.BackendType.GLOO, gloo)
    default = _torch.BackendType.GLOO
    if torch.cuda.is_available() and dist.is_nccl_available():
        nccl = _torch.nccl_backend(opts)
        inner._register_backend(torch.device("cuda"), _torch.BackendType.NCCL, nccl)
        default = _torch.BackendType.NCCL
    inner._set_default_backend(default)
    inner._set_group_name(_torch.group_name(f"{opts.group_id}:inner"))
    return inner


def _create(opts: Any, backend_options: Any) -> CompressedProcessGroup:
    """Called by torch for every group with this backend; collective among its ranks, like ``wrap``."""
    if backend_options is not None and not isinstance(backend_options, Options):
        raise ConfigError(f"pg_options for backend 'compactdist' is compactdist.Options, got {backend_options!r}")
    options = backend_options or options_from_environment()
    ranks = list(opts.global_ranks_in_group) or list(range(opts.group_size))
    agree(
        opts.store,
        opts.store,
        str(opts.group_id),
        opts.group_rank,
        ranks,
        options.fingerprint(),
        opts.timeout.total_seconds(),
    )
    inner = _inner_group(opts)
    group = CompressedProcessGroup(inner, options, str(opts.group_id), owns_inner=True)
    for device in inner._device_types:
        kind = _torch.BackendType.NCCL if device.type == "cuda" else _torch.BackendType.GLOO
        group._register_backend(device, kind, inner._get_backend(device))
        group._set_default_backend(kind)
    return group


def register_backend() -> None:
    """Make the name known to torch.distributed; done on import. Calling it again does nothing."""
    if BACKEND_NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND_NAME, _create, extended_api=True, devices=["cpu", "cuda"])
