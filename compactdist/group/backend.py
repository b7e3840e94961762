"""The backend name ``"compactdist"``, for ``init_process_group``, ``new_group`` and ``init_device_mesh``.

Its groups are those that ``wrap`` makes, over gloo for CPU tensors and NCCL for CUDA tensors where torch has it. The
options come from ``pg_options=compactdist.Options(...)`` or the environment: ``COMPACTDIST_`` and the name of an option
in capitals, see :func:`options_from_environment`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
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


def _codec(text: str) -> Any:
    return json.loads(text) if text.lstrip().startswith("{") else text


def _switch(text: str) -> bool:
    return {"1": True, "true": True, "0": False, "false": False}[text.strip().lower()]


def _feedback(text: str) -> bool | None:
    return None if text.strip().lower() == "auto" else _switch(text)


_FIELDS: dict[str, tuple[Callable[[str], Any], str]] = {
    "CODEC": (_codec, "a codec's id or its configuration as a JSON object"),
    "WARMUP_STEPS": (int, "an integer"),
    "ORDER": (int, "an integer"),
    "DAMPING": (float, "a number"),
    "ERROR_FEEDBACK": (_feedback, "one of 1, 0, true, false, auto"),
    "LOCAL": (str, "a word"),
    "MIN_NUMEL": (int, "an integer"),
    "FIND_LAYOUT": (_switch, "one of 1, 0, true, false"),
    "STATE": (str, "a word"),
    "KEYFRAME": (_codec, "a codec's id or its configuration as a JSON object"),
    "FORWARD": (_switch, "one of 1, 0, true, false"),
    "STATE_BUDGET_BYTES": (int, "an integer"),
    "SAMPLE_ERRORS_EVERY": (int, "an integer"),
    "AGREE": (str, "a word"),
    "AGREE_TIMEOUT": (float, "a number"),
}
_OF_ADAPTERS = frozenset({"XDIT"})
"""Names behind the prefix that adapters read and check themselves."""


def options_from_environment(environment: Mapping[str, str] | None = None) -> Options:
    """Options from variables ``COMPACTDIST_<FIELD>``, e.g. ``COMPACTDIST_CODEC=int4``.

    ``COMPACTDIST_CODEC`` and ``COMPACTDIST_KEYFRAME`` take a codec's id or its configuration,
    ``{"id": "int4", "scales": "block"}``; switches (``FORWARD``, ``FIND_LAYOUT``, ``ERROR_FEEDBACK``) take ``1``,
    ``0``, ``true`` and ``false``, and ``COMPACTDIST_ERROR_FEEDBACK`` also ``auto``, which is ``None``. No variable sets
    a policy or layouts.

    Args:
        environment: variables by name; ``None``: those of this process.

    Raises:
        ConfigError: an unknown variable of that prefix, or a value of the wrong kind.
        UnknownCodecError, CodecConfigError: ``COMPACTDIST_CODEC`` or ``COMPACTDIST_KEYFRAME`` names no codec.
    """
    env = os.environ if environment is None else environment
    settings: dict[str, Any] = {}
    for name, value in env.items():
        if not name.startswith(_PREFIX):
            continue
        field = name.removeprefix(_PREFIX)
        if field in _OF_ADAPTERS:
            continue
        if field not in _FIELDS:
            known = ", ".join(_PREFIX + f for f in _FIELDS)
            raise ConfigError(f"unknown environment variable {name}; there are: {known}")
        parse, what = _FIELDS[field]
        try:
            settings[field.lower()] = parse(value)
        except (ValueError, KeyError) as error:
            reason = f" ({error})" if isinstance(error, json.JSONDecodeError) else ""
            raise ConfigError(f"{name}={value!r} is not {what}{reason}") from None
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
    _torch.warn_untested()
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
    return CompressedProcessGroup(inner, options, str(opts.group_id), opts.store, owns_inner=True)


def register_backend() -> None:
    """Make the name known to torch.distributed; done on import. Calling it again does nothing."""
    if BACKEND_NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND_NAME, _create, extended_api=True, devices=["cpu", "cuda"])
