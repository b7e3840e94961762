"""What every exchange needs to know of its group, and the decision whether a call is compressed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from compactdist import _torch, codecs
from compactdist.codecs import Codec
from compactdist.errors import BadOutputError, ConfigError, LayoutError, NonFiniteError
from compactdist.exchange.arrivals import Arrivals
from compactdist.exchange.work import Outbox
from compactdist.group.keys import CallKey, KeyBook
from compactdist.observe.stats import GroupStats, PassReason
from compactdist.policy import PASS, CallInfo, Policy
from compactdist.state import COMPRESSIBLE_DTYPES, Layout, MatrixView, Staged, StateStore, StreamConfig, StreamEncoder
from compactdist.wire import NONFINITE

__all__ = ["AutogradRule", "Call", "Context", "Tap", "waits_at_once", "write"]

AutogradRule = Literal["tensor", "backward", "sender"]
LayoutHints = Callable[[CallInfo], "Layout | None"]
Tap = Callable[["Call", int, Tensor, "MatrixView | None"], None]


@dataclass(slots=True)
class Call:
    """A call that has its key: what the exchange works from.

    Attributes:
        key: identity, step and epoch, fixed at issue.
        op: name in the policy's terms.
        dtype: of the tensors.
    """

    key: CallKey
    op: str
    dtype: torch.dtype


@dataclass
class Context:
    """One wrapped group as its exchanges see it.

    Attributes:
        inner: the group frames travel on.
        rank, size: in the group.
        label: names group and rank in messages.
        codec: used where the policy names none.
        policy, layouts: functions of :class:`CallInfo`; ``None`` for none.
        min_numel: smaller messages pass through.
        exact_local: all-gather leaves one's own chunk exact.
        sample_every: measure the reconstruction error of every n-th call of a site; 0 never.
        lock: held while a call is encoded and handed to the inner group.
        forward: pass on what was received and is sent again untouched.
        tap: shown every tensor right before it is encoded or passed on: call, the peer it goes to (the sender itself
            where all ranks get the same), tensor, and the matrix view of its layout hint. It must not raise or change
            anything.
        arrivals: what was received and may be passed on.
    """

    inner: Any
    rank: int
    size: int
    label: str
    config: StreamConfig
    codec: Codec
    policy: Policy | None
    layouts: LayoutHints | None
    min_numel: int
    exact_local: bool
    sample_every: int
    store: StateStore
    keys: KeyBook
    stats: GroupStats
    lock: threading.RLock
    outbox: Outbox
    future_pool: Callable[[], ThreadPoolExecutor]
    forward: bool
    tap: Tap | None = None
    arrivals: Arrivals = field(init=False)

    def __post_init__(self) -> None:
        self.arrivals = Arrivals(self.forward)

    def forget(self, prefix: str | None = None) -> None:
        """Drop all history, or that of the sites under a prefix."""
        self.store.reset(prefix)
        self.arrivals.clear(prefix)

    def state_bytes(self) -> dict[str, int]:
        """Bytes held per key: histories, what encoders remember, and payloads kept to be passed on."""
        held = self.store.state_bytes()
        for key, nbytes in self.arrivals.kept_bytes().items():
            held[key] = held.get(key, 0) + nbytes
        return held

    def refusal(self, tensor: Tensor, autograd: AutogradRule = "tensor") -> str | None:
        """Why no call of this kind can be compressed, whatever its size; ``None`` if it can. Takes no ordinal.

        Args:
            tensor: of the call.
            autograd: ``"tensor"``: differentiable tensors and calls in a backward pass are refused; ``"backward"``:
                only the latter, where not all ranks see the tensor; ``"sender"``: neither, the sender's frame tells.
        """
        if self.size == 1:
            return PassReason.WORLD_SIZE
        if tensor.dtype not in COMPRESSIBLE_DTYPES:
            return PassReason.DTYPE
        if not self.keys.active():
            return PassReason.NO_STEP
        if autograd == "tensor" and self.under_autograd(tensor):
            return PassReason.AUTOGRAD
        if autograd == "backward" and _torch.in_backward():
            return PassReason.AUTOGRAD
        return None

    @staticmethod
    def under_autograd(tensor: Tensor) -> bool:
        """Whether the tensor is part of a differentiable computation now."""
        return (tensor.requires_grad and _torch.records_gradients()) or _torch.in_backward()

    def choose(self, call: Call, numel: int) -> Codec | str:
        """The codec for one directed message of a call, or the reason it passes through.

        Raises:
            ConfigError: the policy function returned something that is no codec.
        """
        if numel < self.min_numel or numel == 0:
            return PassReason.SMALL
        if self.policy is None:
            return self.codec
        chosen = self.policy(self.info(call, numel))
        if chosen is None:
            return self.codec
        if isinstance(chosen, Codec):
            return chosen
        if chosen == PASS:
            return PassReason.POLICY
        if isinstance(chosen, str | dict):
            return codecs.get(chosen)
        raise ConfigError(
            f"{self.label}, site '{call.key.name}': the policy returned {chosen!r}; it must return a codec, "
            "'pass' or None"
        )

    def hint(self, call: Call, numel: int) -> MatrixView | None:
        """The matrix view a layout hint gives for one directed message.

        Raises:
            LayoutError: the hint does not fit the message.
        """
        if self.layouts is None:
            return None
        layout = self.layouts(self.info(call, numel))
        if layout is None:
            return None
        try:
            return layout.resolve(numel)
        except LayoutError as error:
            raise LayoutError(f"{self.label}, site '{call.key.name}' ({call.op}): {error}") from None

    @staticmethod
    def info(call: Call, numel: int) -> CallInfo:
        """The policy's view of a message."""
        return CallInfo(call.key.name, call.op, call.dtype, numel, max(call.key.step, 0))

    def in_warmup(self, call: Call) -> bool:
        """Whether every frame of this step is a keyframe."""
        return 0 <= call.key.step < self.config.warmup_steps

    def check_outputs(self, op: str, outputs: list[Tensor], numels: list[int], dtype: torch.dtype) -> None:
        """Refuse outputs that cannot hold what will arrive.

        Raises:
            BadOutputError: wrong number, sizes or dtype; nothing was sent.
        """
        if len(outputs) != len(numels):
            raise BadOutputError(f"{self.label}, {op}: {len(outputs)} outputs given for {len(numels)} ranks")
        for rank, (output, numel) in enumerate(zip(outputs, numels, strict=True)):
            if output.numel() != numel or output.dtype != dtype:
                raise BadOutputError(
                    f"{self.label}, {op}: the output for rank {rank} holds {output.numel()} x {output.dtype}, "
                    f"but {numel} x {dtype} will arrive; nothing was sent"
                )

    def stage(
        self,
        encoder: StreamEncoder,
        call: Call,
        peer: int,
        x: Tensor,
        codec: Codec,
        *,
        keyframe: bool,
        hint: MatrixView | None,
        frame_nbytes: int,
        refuse_state: bool = False,
        want_value: bool = False,
    ) -> tuple[Staged, NonFiniteError | None]:
        """Show the tensor to the tap, then make its frame; see ``StreamEncoder.stage_or_flag``."""
        if self.tap is not None:
            self.tap(call, peer, x, hint)
        return encoder.stage_or_flag(
            x,
            codec,
            keyframe=keyframe,
            epoch=call.key.epoch,
            hint=hint,
            frame_nbytes=frame_nbytes,
            refuse_state=refuse_state,
            want_value=want_value or bool(self.sample_every),
        )

    def sample_error(self, call: Call, calls: int, x: Tensor, staged: Staged) -> None:
        """Measure how far the reconstruction is from the tensor, on every ``sample_every``-th frame of a stream."""
        value = staged.value
        if not self.sample_every or value is None or calls % self.sample_every or staged.header.flags & NONFINITE:
            return
        flat = x.detach().reshape(-1).double()
        error = float((value.double() - flat).square().sum())
        self.stats.error(call.key.name, call.op, error, float(flat.square().sum()))


def waits_at_once(opts: Any) -> bool:
    """Whether the caller asked for a synchronous call: it will wait before anybody can look at the outputs."""
    return getattr(opts, "asyncOp", True) is False


def write(target: Tensor, flat: Tensor) -> None:
    """Copy flat values into a user's tensor of any shape and strides, inference tensors included."""
    with torch.inference_mode():
        target.detach().copy_(flat.view(target.shape))
