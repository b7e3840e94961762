"""Recorded activations on disk: a safetensors file with one tensor per call site.

A tensor is named after its site and has the shape ``[steps, N, C]``: what the site sent at each step, as ``N`` rows
(tokens) of ``C`` channels, any floating-point dtype. The file's metadata may hold ``groups``, a JSON object from
site to the number of groups (K and V, say) that were put one behind the other into the ``N`` rows; a site without an
entry is one group. A file of tensors without metadata is a valid trace.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from compactdist.errors import CompactDistError

__all__ = ["Trace", "TraceError", "require_safetensors", "save_trace"]

_LAYOUT = "a trace holds one tensor [steps, N, C] per call site; compactdist.record writes such files"


class TraceError(CompactDistError, ValueError):
    """A trace cannot be read, recorded or written; the text names the remedy."""


def require_safetensors() -> None:
    """Make sure that traces can be read and written.

    Raises:
        TraceError: the package is missing.
    """
    try:
        import safetensors.torch  # noqa: F401
    except ImportError:
        raise TraceError("traces are safetensors files: install the package with pip install safetensors") from None


class Trace:
    """A trace file. Tensors are read one by one, for a trace may be larger than memory.

    Attributes:
        path: path of the file.
        sites: names of the sites, sorted.
        metadata: metadata of the file, text to text.

    Raises:
        TraceError: no such file, not a safetensors file, no tensors in it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        require_safetensors()
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        if not self.path.is_file():
            what = "is a folder" if self.path.is_dir() else "does not exist"
            raise TraceError(f"{self.path} {what}: give a .safetensors file; {_LAYOUT}")
        try:
            self._file = cast("Any", safe_open(str(self.path), framework="pt"))
        except (SafetensorError, OSError) as error:
            raise TraceError(f"{self.path} is not a readable safetensors file ({error}); {_LAYOUT}") from None
        self.sites: list[str] = sorted(self._file.keys())
        self.metadata: dict[str, str] = dict(self._file.metadata() or {})
        if not self.sites:
            raise TraceError(f"{self.path} holds no tensors; {_LAYOUT}")
        self._groups = self._read_groups()

    def _read_groups(self) -> dict[str, int]:
        try:
            groups = json.loads(self.metadata.get("groups", "{}"))
            counts = {str(site): int(count) for site, count in groups.items()}
            whole = all(counts[str(site)] == count for site, count in groups.items())
        # deep nesting gives RecursionError, Infinity OverflowError, NaN ValueError
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            whole = False
        if not whole:
            raise TraceError(
                f"{self.path}: metadata 'groups' must be a JSON object of site: whole number; write it with "
                "compactdist.record, or leave it out where every site is one group"
            )
        return counts

    def load(self, site: str) -> Tensor:
        """The tensor ``[steps, N, C]`` of a site: float32, float16 or bfloat16, contiguous.

        float64 is rounded to float32, the 8-bit formats are widened to float16 (exactly, or to bfloat16 where their
        exponents are larger).

        Raises:
            TraceError: wrong rank or dtype, an empty tensor, NaN or Inf.
        """
        x: Tensor = self._file.get_tensor(site)
        where = f"{self.path}, tensor '{site}'"
        if not x.dtype.is_floating_point:
            raise TraceError(
                f"{where} is {str(x.dtype).removeprefix('torch.')}, and only floating-point tensors are compressed: "
                "leave it out of the trace, or convert it"
            )
        if x.dim() != 3:
            raise TraceError(f"{where} has shape {list(x.shape)}: {_LAYOUT}. Reshape it, for instance x[:, None]")
        if x.numel() == 0:
            raise TraceError(f"{where} has shape {list(x.shape)} and holds no elements: leave it out of the trace")
        if x.dtype == torch.float64:
            x = x.float()
        elif x.element_size() == 1:
            wide = x.float()
            fits = bool((wide.half().float() == wide).all() | ~torch.isfinite(wide).all())
            x = wide.half() if fits else wide.bfloat16()
        if not bool(torch.isfinite(x).all()):
            step = int((~torch.isfinite(x.flatten(1)).all(1)).nonzero()[0])
            raise TraceError(f"{where} holds NaN or Inf at step {step}: no codec but 'raw' carries them; cut it there")
        return x.contiguous()

    def groups(self, site: str, rows: int) -> int:
        """Number of groups that the ``rows`` of a site consist of.

        Raises:
            TraceError: ``rows`` is not a multiple of this number.
        """
        count = self._groups.get(site, 1)
        if count < 1 or rows % count:
            raise TraceError(f"{self.path}, tensor '{site}': {rows} rows do not divide into {count} groups")
        return count


def save_trace(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    groups: Mapping[str, int] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a trace; the file appears complete or not at all.

    Args:
        path: path of the file; missing folders are made.
        tensors: ``[steps, N, C]`` by site.
        groups: number of groups by site; 1 for sites without an entry.
        metadata: further entries, text to text.

    Raises:
        TraceError: the package ``safetensors`` is missing.
    """
    require_safetensors()
    from safetensors.torch import save_file

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    entries = dict(metadata or {})
    if groups:
        entries["groups"] = json.dumps(dict(sorted(groups.items())))
    try:
        save_file({name: x.contiguous() for name, x in tensors.items()}, str(unfinished), metadata=entries)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
