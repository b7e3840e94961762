"""Record what the call sites of a wrapped group send, as a trace for ``compactdist evaluate``.

    with compactdist.record(dist, "trace.safetensors"):  # trace-rank0.safetensors, trace-rank1.safetensors, ...
        pipe(...)

A site's tensor is copied right before it is encoded. With ``wrap(codec="raw")`` the trace holds the activations of an
uncompressed run; with a lossy codec, those of the compressed run.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from compactdist.errors import ConfigError
from compactdist.exchange.plan import Call
from compactdist.observe.trace import TraceError, require_safetensors, save_trace
from compactdist.state import MatrixView
from compactdist.state.find_view import find_view

if TYPE_CHECKING:
    from compactdist.group.process_group import CompressedProcessGroup

__all__ = ["Recording", "record"]

_log = logging.getLogger("compactdist")
_GIB = 1 << 30


@dataclass
class _Site:
    entries: list[Tensor] = field(default_factory=list)
    hint: MatrixView | None = None
    problem: str | None = None


@dataclass
class Recording:
    """What ``record`` wrote; complete when its ``with`` block has ended.

    Attributes:
        path: path of the file.
        written: shape ``[steps, N, C]`` by site.
        skipped: why a site is not in the file, by site.
        nbytes: bytes held in memory until the file is written.
    """

    path: str
    written: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    nbytes: int = 0


class _Recorder:
    """The engine's tap. An error inside a collective would leave other ranks waiting: ``save`` raises it instead."""

    def __init__(
        self,
        result: Recording,
        sites: Sequence[str],
        max_steps: int | None,
        dtype: torch.dtype | None,
        max_bytes: int,
        rank: int,
    ) -> None:
        self.result = result
        self.failure: str | None = None
        self.ended = False
        self.seen: set[str] = set()
        self._globs = sites
        self._max_steps = max_steps
        self._dtype = dtype
        self._max_bytes = max_bytes
        self._rank = rank
        self._sites: dict[str, _Site] = {}
        self._step = -1

    def __call__(self, call: Call, peer: int, tensor: Tensor, hint: MatrixView | None) -> None:
        """Keep a copy of the tensor."""
        self.ended = self.ended or call.step < self._step
        if self.ended or self.failure is not None:
            return
        self._step = call.step
        name = f"{call.site}>{peer}" if peer != self._rank and call.op != "send" else call.site
        self.seen.add(name)
        if not any(fnmatch.fnmatchcase(name, glob) for glob in self._globs):
            return
        site = self._sites.setdefault(name, _Site())
        if site.problem is not None or len(site.entries) == self._max_steps:
            return
        if site.entries and (tensor.numel() != site.entries[0].numel() or hint != site.hint):
            was, now = site.entries[0].numel(), tensor.numel()
            site.problem = f"{was} elements at first and {now} later: the shape or its layout is not constant"
            self.result.nbytes -= sum(x.nbytes for x in site.entries)
            site.entries.clear()
            return
        dtype = self._dtype or tensor.dtype
        self.result.nbytes += tensor.numel() * dtype.itemsize
        if self.result.nbytes > self._max_bytes:
            self._give_up()
            return
        site.hint = hint
        site.entries.append(tensor.detach().to("cpu", dtype, copy=True).reshape(-1))

    def _give_up(self) -> None:
        self.failure = (
            f"recording stopped at step {self._step} because it would hold more than max_bytes={self._max_bytes} bytes "
            f"in memory ({len(self._sites)} sites so far); choose fewer sites=, set max_steps= or "
            "dtype=torch.float16, or raise max_bytes="
        )
        self._sites.clear()
        self.result.nbytes = 0
        _log.warning("%s", self.failure)

    @torch.no_grad()
    def save(self, metadata: dict[str, str]) -> None:
        """Write the kept entries as matrices; leave out sites with NaN or Inf.

        Raises:
            TraceError: too large, or nothing to write.
        """
        if self.failure is not None:
            raise TraceError(self.failure + "; nothing was written")
        tensors: dict[str, Tensor] = {}
        groups: dict[str, int] = {}
        for name, site in sorted(self._sites.items()):
            problem = site.problem
            if problem is None and not all(bool(torch.isfinite(x).all()) for x in site.entries):
                problem = f"holds NaN or Inf as {str(self._dtype or site.entries[0].dtype).removeprefix('torch.')}"
            if problem is not None:
                self.result.skipped[name] = problem
                continue
            view = _view_of(site)
            tensors[name] = torch.stack([view.to_matrix(x) for x in site.entries]).flatten(1, 2)
            groups[name] = view.groups
            site.entries.clear()
        if not tensors:
            raise TraceError(self._nothing())
        self.result.written = {name: (x.shape[0], x.shape[1], x.shape[2]) for name, x in tensors.items()}
        metadata["sites"] = json.dumps(list(tensors))
        save_trace(self.result.path, tensors, {name: n for name, n in groups.items() if n > 1}, metadata)
        for name, why in self.result.skipped.items():
            _log.warning("site '%s' was not recorded: %s", name, why)
        if self.ended:
            _log.warning("%s: only the request before the first reset() was recorded", self.result.path)

    def _nothing(self) -> str:
        if self.result.skipped:
            reasons = "; ".join(f"'{name}' {why}" for name, why in self.result.skipped.items())
            return f"nothing was recorded: {reasons}"
        if self.seen:
            some = ", ".join(repr(name) for name in sorted(self.seen)[:4])
            return f"nothing was recorded: sites={list(self._globs)} matches none of {len(self.seen)} sites, as {some}"
        return (
            "nothing was recorded: no call was compressed while recording. Only such calls are recorded (codec 'raw' "
            "counts); explain() says why calls passed through"
        )


def _view_of(site: _Site) -> MatrixView:
    """The matrix view of the hint, else the one an encoder would find on its first residual, else a single row."""
    numel = site.entries[0].numel()
    if site.hint is not None:
        return site.hint
    if len(site.entries) > 1:
        found = find_view((site.entries[1].float() - site.entries[0].float()).nan_to_num_())
        if found.groups * found.rows * found.channels == numel:
            return found
    return MatrixView(numel, 1, 1, numel)


@contextmanager
def record(
    group: CompressedProcessGroup,
    path: str | os.PathLike[str],
    *,
    sites: str | Sequence[str] = "*",
    max_steps: int | None = None,
    dtype: torch.dtype | None = None,
    max_bytes: int = _GIB,
) -> Iterator[Recording]:
    """Record what this rank sends at the call sites of a wrapped group, one entry per site and step.

    An entry is the tensor before it is encoded: an all-gather's input, each peer's chunk of an all-to-all or a
    reduction (its site gets ``>peer`` appended), a sent tensor, the root's tensor of a broadcast. A site is stored as
    ``[steps, N, C]`` in the matrix view of its layout hint, or in the one that an encoder's search would find; groups
    become rows, and their number goes into the file's metadata. Everything stays in memory until the block ends.
    Recording is local to this rank and ends at the first ``reset()`` after something was recorded. If the block raises,
    nothing is written.

    Args:
        group: what ``wrap`` returned.
        path: path of the file. Each rank writes one of its own: ``{rank}`` becomes the rank in the group; in a path
            without it, ``-rank0`` goes before the suffix where the group has several ranks.
        sites: glob, or globs, over the names of sites.
        max_steps: number of entries to keep of each site, the first ones; ``None``: all.
        dtype: floating-point dtype to store (``torch.float16``, say); ``None``: the tensor's own.
        max_bytes: largest number of bytes to hold in memory.

    Yields:
        A :class:`Recording` that says, once the block has ended, which sites were written and why others were not.

    Raises:
        ConfigError: not a wrapped group, a bad option, or the group is being recorded already.
        ClosedGroupError: the group was closed.
        TraceError: at the end of the block: nothing to write or more than ``max_bytes``; at its beginning: the
            package ``safetensors`` is missing.
    """
    if not (isinstance(group, dist.ProcessGroup) and hasattr(group, "explain")):
        raise ConfigError(f"record takes a group that compactdist.wrap returned, got {type(group).__name__}")
    if max_steps is not None and max_steps < 1:
        raise ConfigError(f"max_steps must be at least 1, got {max_steps}")
    if dtype is not None and not dtype.is_floating_point:
        raise ConfigError(f"dtype must be a floating-point type, got {dtype}")
    require_safetensors()
    group._ready()
    engine = group._engine
    if engine.tap is not None:
        raise ConfigError(f"{engine.label} is being recorded already")
    globs = (sites,) if isinstance(sites, str) else tuple(sites)
    result = Recording(_path_of_rank(os.fspath(path), engine.rank, engine.size))
    recorder = _Recorder(result, globs, max_steps, dtype, max_bytes, engine.rank)
    engine.tap = recorder
    try:
        yield result
    finally:
        engine.tap = None
    recorder.save(_about(engine))


def _path_of_rank(path: str, rank: int, size: int) -> str:
    if "{rank}" not in path and size > 1:
        stem, suffix = os.path.splitext(path)
        path = f"{stem}-rank{{rank}}{suffix}"
    return path.replace("{rank}", str(rank))


def _about(engine: Any) -> dict[str, str]:
    from compactdist import __version__

    return {
        "format": "compactdist trace 1",
        "codec": repr(engine.chooser.codec),
        "compactdist": __version__,
        "torch": torch.__version__,
        "rank": f"{engine.rank} of {engine.size}",
    }
