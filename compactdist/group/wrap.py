"""wrap, wrap_mesh, unwrap: from a plain group to a compressed one and back."""

from __future__ import annotations

import difflib
import itertools
import logging
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from compactdist import _torch
from compactdist.codecs import Codec
from compactdist.config import Options, Settings
from compactdist.errors import ClosedGroupError, ConfigError, NotInitializedError
from compactdist.group.agree import agree
from compactdist.group.environment import settings_from_environment, warn_overruled
from compactdist.group.lifecycle import check_rules
from compactdist.group.process_group import CompressedProcessGroup
from compactdist.presets import expand, settled

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["unwrap", "unwrap_mesh", "wrap", "wrap_mesh"]

_log = logging.getLogger("compactdist")
_TIMEOUT_SECONDS = 60.0


def wrap(
    group: Any = None,
    codec: Any = None,
    *,
    preset: str | None = None,
    options: Options | None = None,
    timeout: timedelta | float | None = None,
    **settings: Unpack[Settings],
) -> Any:
    """Wrap a process group so that it sends compressed residuals.

    Collective: every rank of the group calls it, in the same order for all groups. Ranks compare configuration and
    versions through the store before anything is sent (not on torch's fake group, whose ranks never meet). An option
    that is not given is taken from the environment (``COMPACTDIST_CODEC=int4``;
    :mod:`compactdist.group.environment`), else it has the default of :class:`Options`. One that is given
    overrides the environment; where the two differ, a warning is logged.

    Args:
        group: the group to wrap; ``None``: the default group. A rank outside the group gets ``group`` itself back.
        codec: see :class:`Options`.
        preset: a name of :mod:`compactdist.presets`; options that are given beside it override its own.
        options: all options at once, instead of ``codec``, ``preset``, ``settings`` and the environment.
        timeout: how long to wait for the other ranks, seconds or timedelta; 60 s by default.
        **settings: other fields of :class:`Options`; :class:`~compactdist.config.Settings` lists them.

    Returns:
        A :class:`CompressedProcessGroup`: a registered ProcessGroup that also carries torch.distributed's API. The
        inner group stays usable.

    Raises:
        NotInitializedError: no process group has been initialized.
        ConfigError, UnknownCodecError, CodecConfigError: bad options.
        ConfigMismatchError, WrapTimeoutError: the ranks do not agree.
    """
    named = {name: value for name, value in (("codec", codec), ("preset", preset)) if value is not None}
    chosen, seconds = _options(group, options, {**named, **settings}, timeout)
    check_rules(chosen)
    if not dist.is_initialized():
        raise NotInitializedError("wrap() needs a process group: call torch.distributed.init_process_group() first")
    if group is None:
        group = _torch.default_group()
    if _torch.is_non_member(group):
        return group
    _refuse_wrapped(group)
    if not isinstance(group, dist.ProcessGroup):
        raise ConfigError(f"wrap() takes a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
    if not _torch.is_registered(group):
        raise ConfigError("wrap() takes a group that torch.distributed knows (and that was not destroyed)")
    _torch.warn_untested()
    store = _torch.group_store(group)
    wrapped = CompressedProcessGroup(group, chosen, _name(group, _turn(group, store, chosen, seconds)), store)
    _torch.register(wrapped, group, wrapped._name)
    if any(_torch.supports_coalescing(group, device) for device in group._device_types if _usable(device)):
        _torch.patch_batch_isend_irecv(lambda g: isinstance(g, CompressedProcessGroup))
    _log.info("%r wraps '%s'", wrapped, group.group_name)
    return wrapped


def _refuse_wrapped(group: Any) -> None:
    if isinstance(group, CompressedProcessGroup):
        group._ready()  # a closed one is not wrapped any more
        raise ConfigError(f"{group!r} is wrapped already: wrap group.inner, or unwrap() it first")


def _name(group: Any, turn: int) -> str:
    return f"compactdist:{group.group_name}:{turn}"


def _turn(group: Any, store: Any, options: Options, seconds: float) -> int:
    """How many times the group has been wrapped, once its ranks agree on the options.

    On torch's fake group there is nobody to agree with, and its store answers nothing: the first number that is free.
    """
    if _torch.is_fake(group):
        return next(turn for turn in itertools.count(1) if not _torch.is_known_name(_name(group, turn)))
    common = _torch.group_store(_torch.default_group())
    ranks = dist.get_process_group_ranks(group)
    return agree(store, common, str(group.group_name), group.rank(), ranks, options.fingerprint(), seconds)


def _usable(device: torch.device) -> bool:
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available())


def _options(
    group: Any, options: Options | None, given: dict[str, Any], timeout: timedelta | float | None
) -> tuple[Options, float]:
    """The options, and the seconds to wait for other ranks."""
    if isinstance(group, str | Mapping | Codec):
        raise ConfigError(f"wrap() takes a process group first, got {group!r}; did you mean codec={group!r}?")
    known = {f.name for f in Options.__dataclass_fields__.values() if f.init}
    unknown = sorted(set(given) - known - {"preset"})
    if unknown:
        every = sorted({*known, "preset", "options", "timeout"})
        nearest = difflib.get_close_matches(unknown[0], every, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else "."
        raise ConfigError(f"wrap() knows no option {', '.join(unknown)}{hint} There are: {', '.join(every)}")
    if options is not None and not isinstance(options, Options):
        raise ConfigError(f"options is a compactdist.Options, as Options(codec='int4'), got {options!r}")
    if options is not None and given:
        raise ConfigError("give options=, or codec, preset and single settings, not both")
    environment = {} if options is not None else settings_from_environment()
    if timeout is not None:
        given = {**given, "timeout": timeout.total_seconds() if isinstance(timeout, timedelta) else timeout}
    warn_overruled(environment, {**expand(given), **given})
    settings = settled(environment, given)
    waited = settings.pop("timeout", _TIMEOUT_SECONDS)
    if not isinstance(waited, int | float) or not waited > 0:
        raise ConfigError(f"timeout is a number of seconds above 0 or a timedelta, got {waited!r}")
    return options or Options(**settings), waited


def unwrap(group: Any) -> Any:
    """Close a wrapped group and return the inner one; any other group is returned as it is.

    Raises:
        ClosedGroupError: the group was closed before.
    """
    if not isinstance(group, CompressedProcessGroup):
        return group
    if group._closed:
        raise ClosedGroupError(f"{group!r} was closed before, and has let go of its inner group: use that as it is")
    inner = group.inner
    group.close()
    return inner


def _dim_indices(mesh: Any, dims: Any) -> list[int]:
    wanted = [dims] if isinstance(dims, str | int) else list(dims)
    names = list(mesh.mesh_dim_names or ())
    indices = []
    for dim in wanted:
        if isinstance(dim, str):
            if dim not in names:
                raise ConfigError(f"the mesh has no dimension '{dim}'; it has {names or 'no names'}")
            indices.append(names.index(dim))
        elif isinstance(dim, int) and -mesh.ndim <= dim < mesh.ndim:
            indices.append(dim % mesh.ndim)
        else:
            raise ConfigError(f"the mesh has no dimension {dim!r}; it has {mesh.ndim}")
    return indices


def wrap_mesh(
    mesh: Any, dims: str | int | Sequence[str | int], codec: Any = None, **settings: Any
) -> dict[str | int, CompressedProcessGroup]:
    """Swap the groups behind dimensions of a DeviceMesh for compressed ones, in place.

    Collective, as ``wrap``. Meshes sliced or flattened from this one before keep the plain groups.

    Args:
        mesh: a ``torch.distributed.device_mesh.DeviceMesh``.
        dims: dimension names or indices.
        codec: as for :func:`wrap`.
        **settings: as for :func:`wrap`.

    Returns:
        The wrapped group of each dimension, by its name (or index where dimensions have no names). Closing a group puts
        the plain one back.

    Raises:
        ConfigError: no such dimension, or its group is wrapped already. The other errors are those of :func:`wrap`.
    """
    names = mesh.mesh_dim_names
    wrapped: dict[str | int, CompressedProcessGroup] = {}
    try:
        for index in _dim_indices(mesh, dims):
            group = wrap(mesh.get_group(index), codec, **settings)
            old = _torch.swap_mesh_dim(mesh, index, group)
            group.on_close(lambda i=index, name=old, g=group: _torch.restore_mesh_dim(mesh, i, name, g))
            wrapped[names[index] if names else index] = group
    except BaseException:
        for group in wrapped.values():
            group.close()
        raise
    return wrapped


def unwrap_mesh(mesh: Any) -> None:
    """Close all wrapped groups behind a mesh's dimensions and put the plain ones back."""
    for index in range(mesh.ndim):
        unwrap(mesh.get_group(index))
