"""Every error a user of compactdist can meet.

Messages name the call site, the rank and the remedy. All errors derive from :class:`CompactDistError`; those that a
caller would also expect under a built-in name (``ValueError``, ``RuntimeError``) derive from that as well.
"""

from __future__ import annotations

__all__ = [
    "BadOutputError",
    "CallGroupError",
    "CaptureError",
    "ClosedGroupError",
    "CodecConfigError",
    "CompactDistError",
    "ConfigError",
    "ConfigMismatchError",
    "FrameError",
    "LateExchangeError",
    "LayoutError",
    "NonFiniteError",
    "NotInitializedError",
    "OffloadError",
    "PayloadError",
    "PlanMismatchError",
    "PlanTimeoutError",
    "StateMismatchError",
    "UnforeseenSizeError",
    "UnknownCodecError",
    "WrapTimeoutError",
]


class CompactDistError(Exception):
    """Base of all errors raised by compactdist."""


class ConfigError(CompactDistError, ValueError):
    """A configuration value is impossible (negative warm-up, unknown option, contradicting options)."""


class UnknownCodecError(CompactDistError, ValueError):
    """No codec is registered under this id."""


class CodecConfigError(CompactDistError, ValueError):
    """A codec cannot be built from this configuration, or cannot take this input."""


class PayloadError(CompactDistError, ValueError):
    """A payload has the wrong length or dtype for the shape it is decoded to."""


class LayoutError(CompactDistError, ValueError):
    """A layout hint does not describe a buffer of this size."""


class NonFiniteError(CompactDistError, ValueError):
    """A tensor to be compressed holds NaN or Inf."""


class FrameError(CompactDistError, RuntimeError):
    """A received frame is not the one this call site expects; nothing of it was applied.

    Attributes:
        epoch: of the frame, where its sender has made more resets, or fewer; else ``None``.
    """

    epoch: int | None = None


class LateExchangeError(CompactDistError, RuntimeError):
    """An exchange whose call had been answered with its prediction (``mode="predict-now"``) failed afterwards."""


class PlanMismatchError(CompactDistError, RuntimeError):
    """Ranks came to a collective call with different plans; nothing was sent."""


class PlanTimeoutError(CompactDistError, TimeoutError):
    """Some ranks did not come to a call that all ranks must agree on."""


class StateMismatchError(CompactDistError, RuntimeError):
    """Both ends of a stream hold different histories (``check``)."""


class BadOutputError(CompactDistError, ValueError):
    """An output tensor has the wrong number of elements or dtype for this call."""


class CallGroupError(CompactDistError, RuntimeError):
    """A group of calls (a coalescing manager) was begun, ended or waited for at a wrong place."""


class UnforeseenSizeError(CompactDistError, RuntimeError):
    """A message would have a size that its receiver cannot foresee, where it must (NCCL); nothing was sent."""


class ClosedGroupError(CompactDistError, RuntimeError):
    """The wrapped group was closed (or destroyed) before this call."""


class CaptureError(CompactDistError, RuntimeError):
    """A compressed call cannot be captured in a CUDA graph now, or a graph was replayed that has ended."""


class OffloadError(CompactDistError, RuntimeError):
    """State cannot be taken to host memory, or brought back (``state_offload``): there is no memory for it."""


class NotInitializedError(CompactDistError, RuntimeError):
    """``wrap`` was called before ``torch.distributed.init_process_group``."""


class ConfigMismatchError(CompactDistError, RuntimeError):
    """The ranks of a group asked for different configurations, versions or wrapping orders."""


class WrapTimeoutError(CompactDistError, TimeoutError):
    """Some ranks did not call ``wrap`` for this group in time."""
