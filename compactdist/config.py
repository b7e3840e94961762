"""Options of a wrapped group: one frozen value that all ranks compare before anything is sent."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypedDict

import torch

from compactdist import codecs, kernels
from compactdist.codecs import Codec
from compactdist.errors import ConfigError
from compactdist.policy import Answer, CallInfo, Mode, Policy, Rule, Rules, as_policy, check_mode, describe_policy
from compactdist.state import (
    DEFAULT_KEYFRAME,
    STATE_OFFLOADS,
    Layout,
    Order,
    StateForm,
    StateOffload,
    StreamConfig,
    Target,
    check_steered,
    keyframe_codec,
)
from compactdist.wire import VERSION

__all__ = ["DEFAULT_MIN_NUMEL", "Options", "Parts", "Settings"]

DEFAULT_MIN_NUMEL = 1024

Parts = int | Literal["auto"]
_MOST_PARTS = (1 << 16) - 1  # what a frame's header can say

Layouts = Mapping[str, Layout] | Callable[[CallInfo], "Layout | None"] | None


class Settings(TypedDict, total=False):
    """Keywords of ``wrap`` beside ``codec``: fields of :class:`Options`, which says what they mean."""

    policy: Policy | Sequence[Rule] | Rule | None
    warmup_steps: int
    order: Order
    damping: float | None
    error_feedback: bool | None
    local: Literal["reconstructed", "exact"]
    mode: Mode
    min_numel: int
    layouts: Layouts
    find_layout: bool
    state: StateForm
    keyframe: str | dict[str, Any] | Codec
    target: str | Target | None
    parts: Parts
    forward: bool
    state_budget_bytes: int | None
    state_offload: StateOffload | None
    sample_errors_every: int
    agree: Literal["plans", "off"]
    agree_timeout: float | None


@dataclass(frozen=True)
class Options:
    """The options of ``wrap``.

    Attributes:
        codec: id, configuration dictionary or Codec used where the policy names none.
        policy: a function of :class:`CallInfo`, a :class:`Rule` or a sequence of rules; see :mod:`compactdist.policy`.
        warmup_steps: steps after a reset whose frames are all keyframes, >= 0.
        order: 0 no prediction (plain quantization), 1 last value, 2 damped velocity; ``"auto"``: the last value and a
            share of the last change that the sender chooses for every frame, for twice the state of order 1.
        damping: velocity factor of order 2, in [0, 1], 0.5 if ``None``; for order 2 only.
        error_feedback: ``None``: on wherever there is a prediction; ``False``: the open loop, in which the sender
            predicts from its own values and errors add up.
        local: ``"reconstructed"``: an all-gather gives every rank the same bytes; ``"exact"``: a rank's own
            chunk stays exact.
        mode: ``"wait"``: an all-gather's outputs hold what arrived; ``"predict-now"``: they hold, at once, what the
            histories predict, and what arrives corrects the next prediction (:mod:`compactdist.exchange.predicted`).
            Other operations wait in either mode.
        min_numel: messages with fewer elements pass through.
        layouts: hints for the matrix view of flat buffers: a mapping from globs over site keys to :class:`Layout`, or a
            function of :class:`CallInfo`.
        find_layout: let encoders find the matrix view of buffers without a hint.
        state: ``"exact"``: both ends keep reconstructions in the tensors' dtype; ``"int8"`` or ``"fp8"``: in one byte
            for each element and a scale for every 128.
        keyframe: id, configuration dictionary or Codec of the frames that carry tensors themselves, in the matrix
            view of the layout hint or, without one, in blocks of consecutive elements; ``"raw"``: the tensors' own
            bytes, so that the first step is exact. Those of codec ``raw``, and of tensors too small to gain by it, are
            their own bytes in any case.
        target: what the rates of the codec are chosen for: ``"nmse_db=-32"``, ``"bits=1.5"`` (of residual frames, for
            each element) or ``"bytes_per_step=2e6"`` (of the residual frames that this rank encodes); see
            :class:`~compactdist.state.target.Target`. It needs a codec with several rates, as ``rates``, which ``wrap``
            takes where no codec is named. Each rank chooses for what it sends, so ranks may differ.
        parts: in how many parts a large tensor of an all-gather travels, each a stream and an inner call of its own, so
            that one part is decoded while the next is on its way (:mod:`compactdist.exchange.parts`); 1: whole;
            ``"auto"``: by size. Each part has ``min_numel`` elements or more. All ranks must give such tensors the
            same shape, as that says where they are cut.
        forward: a received tensor that is sent again untouched goes on in the frame it arrived in, instead of being
            encoded once more (:mod:`compactdist.exchange.forward`). The sender alone decides, so ranks may differ.
        state_budget_bytes: cap on history tensors of a rank, the same on all ranks. A collective's new site evicts the
            sites that were used least recently, in earlier steps, on all ranks; what still does not fit passes through
            on all ranks concerned. Messages whose bytes only two ranks know evict nothing (point-to-point, uneven
            all-to-all). See :class:`~compactdist.state.ledger.Ledger`. A receiver of ``send`` or ``broadcast`` has no
            way to refuse and follows the sender, even beyond its cap. The cap counts what a codec learns
            (``transform``) where a layout hint gives the view, and not what the encoders of low-rank codecs keep for
            themselves. ``None``: no cap.
        state_offload: ``None``: histories beyond ``state_budget_bytes`` are dropped, or not kept; ``"cpu"``: they are
            taken to host memory (pinned where they come from a GPU) and brought back for the site's next call, which
            goes on as if nothing had happened. The budget then counts what is on the device, its use changes no frame,
            and ranks may differ in both options. See :class:`~compactdist.state.offload.Offload`.
        sample_errors_every: measure the reconstruction error on every n-th call of a site; 0 never.
        agree: ``"plans"``: before a collective that is new or has changed, all ranks make sure through the store that
            they are about to do the same; ``"off"``: they do not, and a difference may end a process.
        agree_timeout: seconds to wait there for other ranks; ``None``: as long as the inner group waits.

    Raises:
        ConfigError, UnknownCodecError, CodecConfigError: an impossible value.
    """

    codec: str | dict[str, Any] | Codec = "int2"
    policy: Policy | Sequence[Rule] | Rule | None = None
    warmup_steps: int = 1
    order: Order = 1
    damping: float | None = None
    error_feedback: bool | None = None
    local: Literal["reconstructed", "exact"] = "reconstructed"
    mode: Mode = "wait"
    min_numel: int = DEFAULT_MIN_NUMEL
    layouts: Layouts = None
    find_layout: bool = True
    state: StateForm = "exact"
    keyframe: str | dict[str, Any] | Codec = DEFAULT_KEYFRAME
    target: str | Target | None = None
    parts: Parts = 1
    forward: bool = True
    state_budget_bytes: int | None = None
    state_offload: StateOffload | None = None
    sample_errors_every: int = 0
    agree: Literal["plans", "off"] = "plans"
    agree_timeout: float | None = None
    _codec: Codec = field(init=False, repr=False)
    _target: Target | None = field(init=False, repr=False)
    _policy: Policy | None = field(init=False, repr=False)
    _stream: StreamConfig = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_codec", codecs.get(self.codec))
        object.__setattr__(self, "_target", None if self.target is None else Target.parse(self.target))
        if self._target is not None:
            check_steered(self._codec, self._target)
        object.__setattr__(self, "_policy", as_policy(self.policy))
        if self.local not in ("reconstructed", "exact"):
            raise ConfigError(f"local is 'reconstructed' or 'exact', got {self.local!r}")
        check_mode(self.mode)
        if self.agree not in ("plans", "off"):
            raise ConfigError(f"agree is 'plans' or 'off', got {self.agree!r}")
        if self.agree_timeout is not None and not _is_above_zero(self.agree_timeout):
            raise ConfigError(f"agree_timeout is a number of seconds above 0, got {self.agree_timeout!r}")
        _switch("find_layout", self.find_layout)
        _switch("forward", self.forward)
        if self.error_feedback is not None:
            _switch("error_feedback", self.error_feedback)
        _whole("min_numel", self.min_numel)
        _whole("sample_errors_every", self.sample_errors_every)
        _check_parts(self.parts)
        if self.state_budget_bytes is not None:
            _whole("state_budget_bytes", self.state_budget_bytes)
        self._check_offload()
        _check_layouts(self.layouts)
        checked = StreamConfig(
            self.order,
            self.damping,
            self.error_feedback,
            self.warmup_steps,
            self.find_layout,
            self.state,
            _keyframe(self.keyframe),
        )
        lossless = self._only_lossless()
        order = 0 if lossless else self.order
        damping = checked.damping if order == self.order else None
        feedback = self.error_feedback if order or not self.error_feedback else None
        keyframe = None if lossless else checked.keyframe
        stream = replace(checked, order=order, damping=damping, error_feedback=feedback, keyframe=keyframe)
        object.__setattr__(self, "_stream", stream)
        self._check_that_something_predicts()
        self._check_shared_history()

    def _check_offload(self) -> None:
        if self.state_offload is not None and self.state_offload not in STATE_OFFLOADS:
            raise ConfigError(f"state_offload is None or 'cpu', got {self.state_offload!r}")
        if self.state_offload is not None and self.state_budget_bytes is None:
            raise ConfigError(
                f"state_offload={self.state_offload!r} takes state beyond state_budget_bytes to host memory, and "
                "state_budget_bytes=None sets no limit: give one (0: only what a call is using stays on the device), "
                "or leave out state_offload"
            )

    @property
    def drops_beyond(self) -> int | None:
        """Bytes of state beyond which histories are dropped or not kept, as all ranks must know; ``None``: never."""
        return None if self.state_offload is not None else self.state_budget_bytes

    def _only_lossless(self) -> bool:
        """Whether no call can meet a codec that needs a history; then none is kept."""
        if not self._codec.lossless:
            return False
        if self._policy is None:
            return True
        if not isinstance(self._policy, Rules):
            return False
        results = [rule.result for rule in self._policy.rules]
        chosen = [result.codec if isinstance(result, Answer) else result for result in results]
        return all(not isinstance(codec, Codec) or codec.lossless for codec in chosen)

    def _check_that_something_predicts(self) -> None:
        rules = self._policy.rules if isinstance(self._policy, Rules) else ()
        asked = self.mode == "predict-now" or any(rule.mode == "predict-now" for rule in rules)
        if asked and not self._stream.remembers:
            why = f"order={self.order!r}" if not self._only_lossless() else f"codec {self._codec!r}"
            raise ConfigError(
                f"mode='predict-now' needs a history to predict from, and {why} keeps none: take order=1, 2 or 'auto' "
                "and a codec that is not lossless, or mode='wait'"
            )

    def _check_shared_history(self) -> None:
        """Refuse here what would raise in the first call after a keyframe."""
        rules = self._policy.rules if isinstance(self._policy, Rules) else ()
        named = [rule.result.codec if isinstance(rule.result, Answer) else rule.result for rule in rules]
        learns = [c for c in (self._codec, *named) if isinstance(c, Codec) and c.needs_shared_history]
        if learns and self._stream.open_loop:
            raise ConfigError(
                f"codec {learns[0]!r} learns from the history, which the two ends of a stream do not share with "
                "error_feedback=False: leave error_feedback out, or name another codec"
            )

    @property
    def default_codec(self) -> Codec:
        """The codec object."""
        return self._codec

    @property
    def asked(self) -> Target | None:
        """The target, read."""
        return self._target

    @property
    def policy_function(self) -> Policy | None:
        """The policy as a function."""
        return self._policy

    @property
    def stream(self) -> StreamConfig:
        """The configuration of the group's streams; without prediction if no call can meet a lossy codec."""
        return self._stream

    @property
    def layout_function(self) -> Callable[[CallInfo], Layout | None] | None:
        """The layout hints as a function."""
        layouts = self.layouts
        if layouts is None:
            return None
        if not isinstance(layouts, Mapping):
            return layouts
        table = tuple(layouts.items())

        def find(call: CallInfo) -> Layout | None:
            return next((layout for glob, layout in table if fnmatch.fnmatchcase(call.key, glob)), None)

        return find

    @property
    def _timeout(self) -> None:
        """Torch reads this from the options of a mesh dimension (2.13); ``None`` leaves torch's default timeout."""
        return

    def fingerprint(self) -> dict[str, str]:
        """What must be equal on all ranks, as readable text. Functions are compared by name."""
        layouts = self.layouts
        if isinstance(layouts, Mapping):
            shown = repr(sorted((glob, repr(layout)) for glob, layout in layouts.items()))
        else:
            shown = describe_policy(layouts) if layouts is not None else "None"  # type: ignore[arg-type]
        from compactdist import __version__

        return {
            "compactdist": __version__,
            "frame version": str(VERSION),
            "torch": ".".join(torch.__version__.split("+")[0].split(".")[:2]),
            "codec": repr(self._codec),
            "policy": describe_policy(self._policy),
            "layouts": shown,
            "streams": repr(self._stream),
            "local": self.local,
            "mode": self.mode,
            "min_numel": str(self.min_numel),
            "parts": str(self.parts),
            "state_budget_bytes": str(self.drops_beyond),
            "agree": self.agree,
            "kernels": kernels.digest(),
        }


def _is_above_zero(seconds: object) -> bool:
    return isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 < seconds < math.inf


def _switch(name: str, value: object) -> None:
    """Refuse what is no bool: ``find_layout="no"`` would be on."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is True or False, got {value!r}")


def _check_layouts(layouts: object) -> None:
    hints = list(layouts.values()) if isinstance(layouts, Mapping) else []
    wrong = next((hint for hint in hints if not isinstance(hint, Layout)), None)
    if wrong is None and (layouts is None or isinstance(layouts, Mapping) or callable(layouts)):
        return
    raise ConfigError(
        "layouts maps key globs to Layouts, as {'*kv*': Layout('(n c) -> 1 n c', c=64)}, or is a function of CallInfo; "
        f"got {layouts!r}"
    )


def _keyframe(keyframe: object) -> Codec | None:
    if not isinstance(keyframe, str | dict | Codec):
        raise ConfigError(
            f"keyframe is an id, a dict or a Codec, as 'int8' (the default), or 'raw' for the tensors' own bytes; got "
            f"{keyframe!r}"
        )
    return keyframe_codec(keyframe)


def _check_parts(parts: object) -> None:
    whole = isinstance(parts, int) and not isinstance(parts, bool) and 1 <= parts <= _MOST_PARTS
    if not whole and parts != "auto":
        raise ConfigError(f"parts must be 'auto' or an integer from 1 to {_MOST_PARTS}, got {parts!r}")


def _whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{name} must be an integer >= 0, got {value!r}")
