"""The backend name ``"compactdist"``, for ``init_process_group``, ``new_group`` and ``init_device_mesh``.

Its groups are those that ``wrap`` makes, over gloo for CPU tensors and NCCL for CUDA tensors where torch has it. The
options come from ``pg_options=compactdist.Options(...)`` or the environment (:mod:`compactdist.group.environment`).
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from compactdist import _torch
from compactdist.config import Options
from compactdist.errors import ConfigError
from compactdist.group.agree import agree
from compactdist.group.environment import settings_from_environment
from compactdist.group.process_group import CompressedProcessGroup
from compactdist.presets import settled

__all__ = ["BACKEND_NAME", "register_backend"]

BACKEND_NAME = "compactdist"


def group_on_gloo(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    """A plain group over gloo that torch.distributed does not know; ``store`` holds nothing else."""
    group = dist.ProcessGroup(store, rank, size)
    gloo = dist.ProcessGroupGloo(_torch.prefix_store("cpu/", store), rank, size, timeout=timeout)
    gloo._set_sequence_number_for_group()
    group._register_backend(torch.device("cpu"), _torch.BackendType.GLOO, gloo)
    group._set_default_backend(_torch.BackendType.GLOO)
    return group


def _inner_group(opts: Any) -> Any:
    """A plain group over gloo (and NCCL), as torch would make it."""
    inner = group_on_gloo(opts.store, opts.group_rank, opts.group_size, opts.timeout)
    if torch.cuda.is_available() and dist.is_nccl_available():
        nccl = _torch.nccl_backend(opts)
        inner._register_backend(torch.device("cuda"), _torch.BackendType.NCCL, nccl)
        inner._set_default_backend(_torch.BackendType.NCCL)
    inner._set_group_name(_torch.group_name(f"{opts.group_id}:inner"))
    return inner


def _create(opts: Any, backend_options: Any) -> CompressedProcessGroup:
    """Called by torch for every group with this backend; collective among its ranks, like ``wrap``."""
    if backend_options is not None and not isinstance(backend_options, Options):
        raise ConfigError(f"pg_options for backend 'compactdist' is compactdist.Options, got {backend_options!r}")
    _torch.warn_untested()
    settings = settled({} if backend_options else settings_from_environment(), {})
    seconds = settings.pop("timeout", opts.timeout.total_seconds())
    options = backend_options or Options(**settings)
    ranks = list(opts.global_ranks_in_group) or list(range(opts.group_size))
    agree(opts.store, opts.store, str(opts.group_id), opts.group_rank, ranks, options.fingerprint(), seconds)
    inner = _inner_group(opts)
    return CompressedProcessGroup(inner, options, str(opts.group_id), opts.store, owns_inner=True)


def register_backend() -> None:
    """Make the name known to torch.distributed; done on import. Calling it again does nothing."""
    if BACKEND_NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND_NAME, _create, extended_api=True, devices=["cpu", "cuda"])
