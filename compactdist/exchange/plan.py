"""What a call site does: decided when the site is first met, held in its :class:`CallPlan`, replayed by later calls.

Reasons to pass a call through: :func:`refusal` finds those of the kind of call, :meth:`Chooser.choose` those of one
message, the patterns a used-up budget; ``group/process_group.py`` passes the operations that are never compressed.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from compactdist import _torch, codecs
from compactdist.codecs import Codec
from compactdist.config import Parts
from compactdist.errors import CodecConfigError, ConfigError, FrameError, LayoutError, UnknownCodecError
from compactdist.kernels.spec import MatrixView
from compactdist.observe.stats import PassReason
from compactdist.policy import PASS, Answer, CallInfo, Mode, Policy, Rules
from compactdist.state import COMPRESSIBLE_DTYPES, Layout, Site, StreamDecoder, StreamEncoder

if TYPE_CHECKING:
    from compactdist.exchange.patterns.base import Pattern

__all__ = [
    "AutogradRule",
    "Call",
    "CallPlan",
    "Chooser",
    "Incoming",
    "LayoutHints",
    "Outgoing",
    "Part",
    "Rows",
    "refusal",
    "under_autograd",
]

AutogradRule = Literal["tensor", "backward", "sender"]
LayoutHints = Callable[[CallInfo], "Layout | None"]


@dataclass(slots=True, eq=False)  # not frozen, which costs as much as all else that takes an ordinal
class Call:
    """One call: what belongs to it from the moment it is issued. Nothing changes it.

    Attributes:
        site: the site key, e.g. ``"cond/blocks.3.attn/all_gather#0"``.
        op: name in the policy's terms.
        step: the group's (or the request's) step since the last reset, from 0; -1 before the first.
        epoch: resets of the group so far.
        warm: the call falls into a warm-up step, whose frames are all keyframes.
        captured: a CUDA graph is being captured, so the call is launched once and made by every replay.
    """

    site: str
    op: str
    step: int
    epoch: int
    warm: bool
    captured: bool = False


def refusal(size: int, tensor: Tensor, active: bool, autograd: AutogradRule) -> PassReason | None:
    """Why no call of this kind can be compressed, whatever its size; ``None`` if it can. Ask while the call runs.

    Args:
        size: ranks of the group.
        tensor: tensor of the call.
        active: whether a step, a key or an attached module has been seen.
        autograd: ``"tensor"``: refuse tensors through which gradients flow and calls in a backward pass;
            ``"backward"``: refuse only calls in a backward pass, where not all ranks see the tensor; ``"sender"``:
            refuse neither, for the sender decides and its frame says so.
    """
    if size == 1:
        return PassReason.WORLD_SIZE
    if tensor.dtype not in COMPRESSIBLE_DTYPES:
        return PassReason.DTYPE
    if moves_weights():
        return PassReason.WEIGHTS
    if not active:
        return PassReason.NO_STEP
    if autograd == "sender":
        return None
    if _torch.graph_task() != -1:
        return PassReason.AUTOGRAD
    # a Function's forward has no forward mode: asked first, it saves most calls the next question
    if autograd == "tensor" and (tensor.requires_grad or not _torch.has_forward_mode()) and _torch.is_recorded(tensor):
        return PassReason.AUTOGRAD
    return None


def moves_weights() -> bool:
    """Whether the call of a group that runs now moves weights or gradients, by its caller.

    It does if the nearest caller that is in a table of ``_torch`` moves them, or if the autograd engine itself makes
    the call: so DDP's reducer does, from C++, below ``backward`` or in a thread without Python code.
    """
    frame: FrameType | None = sys._getframe(3)  # the asking method of the group and what asks it are our own
    direct, met = True, _met()
    known = met.kinds.get
    while frame is not None:
        caller = known(id(frame.f_code)) or met.add(frame)
        if caller is _OTHER:
            direct = False
        elif caller is not _CORE:
            if caller is _MODEL:
                return False
            if caller is _WEIGHTS or (direct and caller is _ENGINE):
                return True
            direct = False
        frame = frame.f_back
    return direct and _torch.in_backward()


_MOST_CALLERS = 4096
_CORE, _MODEL, _WEIGHTS, _ENGINE, _OTHER = "compactdist", "model", "weights", "autograd engine", "other"


class _Met:
    """Kinds of the functions that were seen on the stacks of calls, kept because every call looks up a dozen.

    Attributes:
        kinds: kind by ``id`` of a function's code object. Every code object belongs to one module. Hashing the object
            itself would cost far more.
    """

    __slots__ = ("_codes", "kinds")

    def __init__(self) -> None:
        self.kinds: dict[int, str] = {}
        self._codes: list[CodeType] = []  # keeps the code objects alive, so that no other gets one of their ids

    def add(self, frame: FrameType) -> str:
        """What a function is that was not met before."""
        if len(self._codes) >= _MOST_CALLERS:
            self.kinds.clear()
            self._codes.clear()
        self._codes.append(frame.f_code)
        found = self.kinds[id(frame.f_code)] = _caller(frame.f_globals.get("__name__") or "", frame.f_code.co_name)
        return found


@cache
def _met() -> _Met:
    return _Met()


def _caller(module: str, function: str) -> str:
    """What a function is, by the name of its module and its own."""
    if module.startswith("compactdist."):
        return _CORE
    if not module.startswith("torch."):
        return _OTHER
    name = f"{module}.{function}"
    if name.startswith(_torch.MODEL_CALLERS):
        return _MODEL
    if name.startswith(_torch.WEIGHT_CALLERS):
        return _WEIGHTS
    return _ENGINE if name == _torch.AUTOGRAD_ENGINE else _OTHER


def under_autograd(tensor: Tensor) -> bool:
    """Whether the tensor is part of a differentiable computation now."""
    return _torch.is_recorded(tensor) or _torch.in_backward()


StreamT = TypeVar("StreamT", StreamEncoder, StreamDecoder)


@dataclass(slots=True)
class Part(Generic[StreamT]):
    """One tensor of a call.

    Attributes:
        peer: group rank at the other end; this rank's own where every rank receives the tensor.
        numel: elements of the tensor.
        codec: codes the residuals; ``None``: the tensor travels as it is, without a frame.
        stream: this rank's end of the tensor's stream; ``None`` without a codec.
        hint: matrix view of the layout hint.
        fresh: the next frame must be a keyframe: its stream (any stream of a joint plan) is empty, or the codec is
            lossless.
        keyframe_nbytes, residual_nbytes: bytes of the next frame, if it is a keyframe and if it is a residual.
        number: where tensors travel in parts of their own (``CallPlan.cuts``), which one it is, from 0.
    """

    peer: int
    numel: int
    codec: Codec | None
    stream: StreamT | None
    hint: MatrixView | None = None
    fresh: bool = True
    keyframe_nbytes: int = 0
    residual_nbytes: int = 0
    number: int = 0

    def expected_nbytes(self, warm: bool) -> int:
        """Bytes of the next frame, in a warm-up step or in another."""
        return self.keyframe_nbytes if warm or self.fresh else self.residual_nbytes


class Outgoing(Part[StreamEncoder]):
    """A tensor that leaves this rank; ``peer`` is the receiver."""

    __slots__ = ()


class Incoming(Part[StreamDecoder]):
    """A tensor that arrives at this rank; ``peer`` is the sender."""

    __slots__ = ()


class Rows:
    """Parts of the output that a site was called with last.

    They are kept from the second call with the same tensor on, and only as long as the caller keeps that tensor: its
    memory is never held for the sake of its parts.
    """

    __slots__ = ("__weakref__", "_address", "_dtype", "_numel", "_output", "_parts")

    def __init__(self) -> None:
        self._output: weakref.ref[Tensor] | None = None
        self._parts: tuple[Tensor, ...] = ()
        self._address = self._numel = 0
        self._dtype: torch.dtype | None = None

    def kept(self, output: Any) -> list[Tensor] | None:
        """The parts of this output in rank order, each flat, if they are known and nobody has changed its form."""
        alive: Any = None if self._output is None else self._output()
        if alive is None or alive is not output or not self._parts:
            return None
        if output.data_ptr() != self._address or output.numel() != self._numel:
            return None
        return list(self._parts) if output.dtype is self._dtype and output.is_contiguous() else None

    def of(self, output: Tensor, size: int) -> list[Tensor]:
        """Equal parts of a contiguous output that is not empty, each flat, in rank order.

        Args:
            output: its elements are a multiple of ``size``.
            size: of the group.
        """
        known = self._output
        if known is None or known() is not output:
            self._output, self._parts = weakref.ref(output), ()
            return list((output if output.dim() == 1 else output.view(-1)).chunk(size))
        with _torch.without_autograd():
            # parts of the detached tensor: those of the output itself would keep it alive
            self._parts = output.detach().view(-1).chunk(size)
        self._output = weakref.ref(output, self._let_go)
        self._address, self._numel, self._dtype = output.data_ptr(), output.numel(), output.dtype
        return list(self._parts)

    def _let_go(self, output: Any) -> None:
        """The caller has dropped an output."""
        if output is self._output:
            self._output, self._parts = None, ()


@dataclass(slots=True)
class CallPlan:
    """What does not change between two calls of a site.

    Attributes:
        pattern: how the parts travel.
        site: the call site.
        signature: sizes, dtype and device of the call's tensors; another signature needs another plan.
        dtype: of the tensors.
        answers: the policy's answer for each directed message, in the pattern's order.
        reason: why the call passes through; ``None`` if it is compressed.
        was_compressed: the call passes through, and the site's plan before this one was compressed.
        outgoing, incoming: the parts, in the order of the tensors handed to the engine.
        by_pair: a part's size and codec are known to its two ends only.
        alike: although ``by_pair``, the policy gives every rank the same set of answers, so every rank sees it change.
        joint: all frames are of one kind, and those of one inner call of one size, as in a collective whose sizes must
            be equal.
        cuts: elements of the parts that each tensor is cut into (:mod:`compactdist.exchange.parts`); empty: it travels
            whole.
        hint: matrix view of the layout hint of a tensor that is cut.
        codec: the codec that statistics show.
        raw_nbytes: bytes on the link if the call were not compressed.
        raw_numel: elements in all messages that leave.
        detail: a pattern's own result: why chunks pass through (all-to-all), bytes of the buffer (receive).
        predicts: outputs are written at once, with what was predicted, wherever the frames are residuals.
        shares_own: this rank's own output gets what the receivers will reconstruct, as they reconstruct it.
        want_value: encoders return what the receiver will reconstruct, even where they keep no history.
        fresh: some part's next frame must be a keyframe.
        changes: the site's count of changes when ``fresh`` and the sizes were worked out.
        common_nbytes: the most bytes of history that any rank holds for the site; 0: none, or ranks do not know.
        roomless: all ranks know that there is no room for the site's history.
        evicts: keys of the sites that were evicted for this plan's history, equal on all ranks.
        evictions: how often the site had been evicted when the plan was made, equal on all ranks.
        agreed_at: epoch and ``Call.warm`` of the last call that all ranks agreed on; ``None``: of none.
        rows: parts of the output that the site was called with last, where it is one tensor for all ranks.
    """

    pattern: Pattern
    site: Site
    signature: tuple[Any, ...]
    dtype: torch.dtype
    answers: tuple[Any, ...] = ()
    reason: PassReason | None = None
    was_compressed: bool = False
    outgoing: list[Outgoing] = field(default_factory=list)
    incoming: list[Incoming] = field(default_factory=list)
    by_pair: bool = False
    alike: bool = False
    joint: bool = False
    cuts: tuple[int, ...] = ()
    hint: MatrixView | None = None
    codec: Codec | None = None
    raw_nbytes: int = 0
    raw_numel: int = 0
    detail: Any = None
    predicts: bool = False
    shares_own: bool = False
    want_value: bool = False
    fresh: bool = True
    changes: int = -1
    common_nbytes: int = 0
    roomless: bool = False
    evicts: tuple[str, ...] = ()
    evictions: int = 0
    agreed_at: tuple[int, bool] | None = None
    rows: Rows = field(default_factory=Rows)

    @property
    def parts(self) -> list[Outgoing | Incoming]:
        """All parts, those that leave first."""
        return [*self.outgoing, *self.incoming]

    @property
    def device(self) -> torch.device:
        """Of the call's tensors."""
        return next(one for one in self.signature if isinstance(one, torch.device))

    def refresh(self) -> None:
        """Work out kinds and sizes of the next frames anew: a stream started, stopped or changed its matrix view.

        Raises:
            FrameError: a frame was refused that the sizes of the next ones depend on. Ranks that went on with other
                sizes would end one another's processes (gloo).
        """
        for one in self.incoming if self.pattern.waits_for_earlier_calls else ():
            if one.stream is not None and one.stream.missed:
                raise FrameError(
                    f"{one.stream.where}: an earlier frame was refused, and how large the next ones are depends on it. "
                    "Nothing was sent; call reset() on all ranks to start again from keyframes"
                )
        self.changes = self.site.changes.count
        parts = [part for part in self.parts if part.codec is not None]
        for part in parts:
            codec, stream = part.codec, part.stream
            assert codec is not None
            assert stream is not None
            part.fresh = codec.lossless or stream.is_fresh(part.numel, self.dtype)
            part.keyframe_nbytes = stream.frame_nbytes(codec, part.numel, self.dtype, keyframe=True, hint=part.hint)
            part.residual_nbytes = stream.frame_nbytes(codec, part.numel, self.dtype, keyframe=False)
        self.fresh = any(part.fresh for part in parts)
        if self.joint and parts:
            largest: dict[int, tuple[int, int]] = {}
            for part in parts:
                key, residual = largest.get(part.number, (0, 0))
                largest[part.number] = max(part.keyframe_nbytes, key), max(part.residual_nbytes, residual)
            for part in parts:
                part.fresh = self.fresh
                part.keyframe_nbytes, part.residual_nbytes = largest[part.number]


@dataclass(frozen=True)
class Chooser:
    """Asks the policy and the layout hints about messages.

    Attributes:
        label: names group and rank in error messages.
        codec: used where the policy names none.
        policy, layouts: functions of :class:`CallInfo`; ``None`` for none.
        mode: of calls for which the policy names none.
        min_numel: smaller messages pass through.
        on_small: told the operation and the elements of each message that does so.
        parts: how many parts large tensors travel in, where the operation cuts them.
    """

    label: str
    codec: Codec
    policy: Policy | None
    layouts: LayoutHints | None
    mode: Mode
    min_numel: int
    on_small: Callable[[str, int], None]
    parts: Parts = 1

    @property
    def by_pair(self) -> bool:
        """Whether rules of the policy are for single pairs of ranks."""
        return isinstance(self.policy, Rules) and any(rule.between is not None for rule in self.policy.rules)

    @staticmethod
    def info(
        call: Call, dtype: torch.dtype, numel: int, source: int | None = None, target: int | None = None
    ) -> CallInfo:
        """The policy's view of one directed message."""
        return CallInfo(call.site, call.op, dtype, numel, max(call.step, 0), source, target)

    def ask(self, info: CallInfo) -> Any:
        """The policy's answer, or the reason why it is not asked.

        Raises:
            ConfigError: the policy did.
        """
        if info.numel < self.min_numel or info.numel == 0:
            self.on_small(info.op, info.numel)
            return PassReason.SMALL
        try:
            answer = None if self.policy is None else self.policy(info)
        except ConfigError as error:  # an Answer that cannot be
            raise ConfigError(
                f"{self.label}, site '{info.key}': the policy raised: {error}. Nothing was sent"
            ) from error
        return copy.deepcopy(answer) if isinstance(answer, dict) else answer  # the function may change its dict later

    def choose(self, info: CallInfo, answer: Any) -> Codec | PassReason:
        """The codec for one directed message, or the reason it passes through.

        Raises:
            ConfigError: the policy returned something that is no codec, or a mode that the operation cannot have.
            UnknownCodecError, CodecConfigError: the policy returned the id or configuration of no codec.
        """
        if isinstance(answer, Answer):
            if answer.mode == "predict-now" and info.op != "all_gather":
                raise ConfigError(
                    f"{self.label}, site '{info.key}': the policy returned mode='predict-now' for {info.op}; only an "
                    "all_gather can be answered with its prediction: look at CallInfo.op. Nothing was sent"
                )
            answer = answer.codec
        if answer is None:
            return self.codec
        if isinstance(answer, Codec):
            return answer
        if isinstance(answer, PassReason):
            return answer
        if isinstance(answer, str) and answer == PASS:
            return PassReason.POLICY
        if isinstance(answer, str | dict):
            try:
                return codecs.get(answer)
            except (UnknownCodecError, CodecConfigError) as error:
                raise type(error)(
                    f"{self.label}, site '{info.key}': the policy returned {answer!r}: {error}. Nothing was sent"
                ) from None
        raise ConfigError(
            f"{self.label}, site '{info.key}': the policy returned {answer!r}; it must return a codec, 'pass', None or "
            "an Answer"
        )

    def predicts(self, answer: Any, site: str, codec: Codec, remembers: bool) -> bool:
        """Whether an all-gather with this answer of the policy is answered with its prediction.

        Raises:
            ConfigError: the policy asks for it where nothing is remembered.
        """
        asked = answer.mode if isinstance(answer, Answer) else None
        if asked == "predict-now" and (codec.lossless or not remembers):
            raise ConfigError(
                f"{self.label}, site '{site}': the policy returned mode='predict-now', and codec {codec!r} in this "
                "group keeps no history to predict from: name a codec that is not lossless, and take order=1, 2 or "
                "'auto'"
            )
        return (asked or self.mode) == "predict-now"

    def hint(self, info: CallInfo) -> MatrixView | None:
        """The matrix view a layout hint gives for one directed message.

        Raises:
            LayoutError: the hint does not fit the message, or is none.
        """
        if self.layouts is None:
            return None
        layout = self.layouts(info)
        if layout is None:
            return None
        if not isinstance(layout, Layout):
            raise LayoutError(
                f"{self.label}, site '{info.key}' ({info.op}): layouts returned {layout!r}; it must return a Layout or "
                "None. Nothing was sent"
            )
        try:
            return layout.resolve(info.numel)
        except LayoutError as error:
            raise LayoutError(f"{self.label}, site '{info.key}' ({info.op}): {error}") from None
