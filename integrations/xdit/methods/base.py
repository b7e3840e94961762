"""What the parallel methods share: they replace `ring_attn`, tell call sites apart, and attend once to all tokens."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from compactdist_common import Patches

# torch 2.13 renamed all_gather_into_tensor and warns at the old name.
_all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class Place(NamedTuple):
    """A call site of attention within a step.

    Attributes:
        model: which transformer, in order of first use (some pipelines have two and change over midway).
        forward: how many times a transformer was called before in this step (guidance branches).
        layer: how many attentions came before in this forward.
    """

    model: int
    forward: int
    layer: int

    def __str__(self) -> str:
        return f"attention {self.layer} of forward {self.forward} (transformer {self.model})"


class GatheringMethod(ABC):
    """A method that gathers the keys and values of the ring group's ranks in one all-gather for each attention.

    The session calls `new_request()` before a request, `begin_step()` at a new timestep, and
    `before_forward(transformer)` at every call of a transformer, after `begin_step()`. State belongs to a `Place`, so
    every step and every rank must call the same attentions in the same order, as all-gathers require anyway.

    Args:
        exact_own: a rank attends to its own keys and values as they are. `False`: to its own as the gather delivers
            them, so that all ranks attend to the same ones.

    Attributes:
        name: of the method, for `create` and for messages.
        timesteps: returns the number of steps of the request, the same on all ranks, `None` where it is not known. The
            session sets it; the method calls it in every step.
        counts: calls of attention on this rank, by how their keys and values were gathered.
    """

    name = ""

    def __init__(self, *, exact_own: bool = True) -> None:
        self.exact_own = exact_own
        self.timesteps: Callable[[], int | None] = lambda: None
        self.counts: Counter[str] = Counter()
        self.step = -1
        self._forward = -1
        self._layer = 0
        self._model = 0
        self._models: dict[int, int] = {}
        self._patches = Patches()

    # --- what each method decides -------------------------------------------------------------------------------

    @abstractmethod
    def keys_and_values(self, group: Any, place: Place, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all ranks, each `(B, H, P * S, D)` in the order of ranks.

        Args:
            group: the ring group of P ranks, plain or wrapped.
            place: the call site.
            key, value: this rank's, `(B, H, S, D)` each.
        """

    def forget(self) -> None:  # noqa: B027 (patch parallelism keeps no state)
        """Drop the state of the request."""

    @property
    def state_bytes(self) -> int:
        """Bytes of buffers kept between steps on this rank."""
        return 0

    def describe(self) -> str:
        """`counts` and the bytes of buffers in one line."""
        done = ", ".join(f"{count} {what}" for what, count in sorted(self.counts.items())) or "not called yet"
        return f"{self.name}: {done}; {self.state_bytes} bytes of buffers"

    # --- clock --------------------------------------------------------------------------------------------------

    def new_request(self) -> None:
        """Drop the state of the request; the next step is the first. Call it before a wrapped group is reset."""
        self.forget()
        self.step = -1
        self._forward = -1
        self._models.clear()

    def begin_step(self) -> None:
        """Count a step; the next forward is its first."""
        self.step += 1
        self._forward = -1

    def before_forward(self, transformer: object = None) -> None:
        """Count a forward of a transformer; the next attention is its first."""
        self._forward += 1
        self._layer = 0
        self._model = self._models.setdefault(id(transformer), len(self._models))

    # --- in xfuser ----------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Replace `ring_attn`. `Sites`, installed after this, names the method's messages and knows their layouts.

        Raises:
            ValueError: a ring group of one rank, PipeFusion, or a method is installed already.
        """
        from xfuser.core.distributed import get_pipeline_parallel_world_size
        from xfuser.model_executor.layers import usp

        if isinstance(getattr(inspect.unwrap(usp.ring_attn), "__self__", None), GatheringMethod):
            raise ValueError(f"{self.name}: a parallel method is installed already; disable() its handle first")
        ring = usp.PROCESS_GROUP.RING_PG
        if ring is None or ring.size() < 2:
            raise ValueError(f"{self.name} runs on the ring group, which has one rank: set ring_degree to 2 or more")
        stages = get_pipeline_parallel_world_size()
        if stages > 1:
            raise ValueError(
                f"{self.name} cannot run with PipeFusion (pipefusion_parallel_degree is {stages}): its patches attend"
                " to a cache of keys and values of their own; set pipefusion_parallel_degree to 1"
            )
        self._patches.replace(usp, "ring_attn", self._ring_attn)

    def remove(self) -> None:
        """Give xfuser its `ring_attn` back, wait for the gathers under way and drop the state of the request.

        Calling it again does nothing.
        """
        self.stand_back()
        self.new_request()

    def stand_back(self) -> None:
        """Give xfuser its `ring_attn` back and keep the state of the request, which goes on after `install()`."""
        self._patches.undo()

    def _ring_attn(self, *args: Any, **kwargs: Any) -> Tensor:
        from xfuser.model_executor.layers import usp

        # Read at every call: the session puts a wrapped group there and takes it out.
        return self.attend(usp.PROCESS_GROUP.RING_PG, *args, **kwargs)

    @torch.compiler.disable
    def attend(
        self,
        group: Any,
        attention_function: Callable[..., Any],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        joint_attn_kwargs: dict[str, Any] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        """Attention of this rank's queries to the keys and values of all ranks of `group`.

        Args:
            group: the ring group of P ranks.
            attention_function: as xfuser's, returns the output first.
            query: `(B, H, S_q, D)`.
            key, value: this rank's, `(B, H_kv, S, D)`, the same shape on all ranks.
            dropout_p: for `attention_function`.
            is_causal: must be `False`.
            joint_attn_kwargs: keys and values that all ranks have (`joint_strategy` "front" or "rear").
            attention_kwargs: for `attention_function`; every entry must be `None`.

        Returns:
            `(B, H, S_q, D)`.

        Raises:
            ValueError: causal attention, keys unlike values, or options that describe single ranks' keys.
            RuntimeError: no step has begun, or a gradient is asked for.
        """
        where = self._where(group)
        self._refuse(where, key, value, is_causal, attention_kwargs)
        place = Place(self._model, self._forward, self._layer)
        self._layer += 1
        keys, values = self.keys_and_values(group, place, key, value)
        kwargs: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": False, "attention_kwargs": attention_kwargs}
        # xfuser's attention functions put the joint tensors in front of the first of `total_steps` blocks and behind
        # the last one. Here the only block is both.
        if joint_attn_kwargs is not None:
            joint_attn_kwargs = {**joint_attn_kwargs, "step": 0, "total_steps": 1}
        output, *_ = attention_function(query, keys, values, joint_attn_kwargs=joint_attn_kwargs, **kwargs)
        return output

    def _where(self, group: Any) -> str:
        place = Place(self._model, self._forward, self._layer)
        return f"{self.name}, step {self.step}, {place}, rank {group.rank()} of the ring"

    def _refuse(
        self, where: str, key: Tensor, value: Tensor, is_causal: bool, attention_kwargs: dict[str, Any] | None
    ) -> None:
        if self.step < 0 or self._forward < 0:
            raise RuntimeError(
                f"{where}: attention was called before a step began; run the pipeline that was given to enable()"
            )
        if is_causal:
            raise ValueError(f"{where}: causal attention cannot be split by ranks' tokens like this; use the ring")
        named = sorted(name for name, setting in (attention_kwargs or {}).items() if setting is not None)
        if named:
            raise ValueError(
                f"{where}: attention_kwargs ({', '.join(named)}) may describe the keys of one rank (masks, lengths,"
                " sparsity) and would be wrong for those of all; use a dense attention backend, or the ring"
            )
        if key.shape != value.shape:
            raise ValueError(
                f"{where}: keys {tuple(key.shape)} and values {tuple(value.shape)} differ in shape and cannot share a"
                " message; use the ring"
            )
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            raise RuntimeError(f"{where}: gathered keys and values carry no gradient; run under torch.no_grad()")


def gather(group: Any, output: Tensor, key: Tensor, value: Tensor, *, async_op: bool) -> Any:
    """All-gather keys and values, `(B, H, S, D)` each, as one flat message `cat(K, V)`.

    Args:
        group: of P ranks.
        output: `(P, 2, B, H, S, D)`, contiguous.
        key, value: this rank's.
        async_op: return at once.

    Returns:
        The Work and the message, which must live until the Work is done; `(None, message)` if not `async_op`.
    """
    message = torch.cat([key.reshape(-1), value.reshape(-1)])
    return _all_gather_single(output.view(-1), message, group=group, async_op=async_op), message


def empty_for(group: Any, key: Tensor) -> Tensor:
    """An output for `gather`: `(P, 2, B, H, S, D)`."""
    return torch.empty((group.size(), 2, *key.shape), dtype=key.dtype, device=key.device)


def sequence(gathered: Tensor, own: tuple[int, Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Copy keys and values into the order of ranks; afterwards `gathered` may be written to again.

    Args:
        gathered: `(P, 2, B, H, S, D)`.
        own: a rank and its keys and values `(B, H, S, D)`, which replace the gathered ones of that rank.

    Returns:
        Keys and values, each `(B, H, P * S, D)`.
    """
    p, two, b, h, s, d = gathered.shape
    both = gathered.new_empty((two, b, h, p, s, d))
    both.copy_(gathered.permute(1, 2, 3, 0, 4, 5))
    if own is not None:
        rank, key, value = own
        both[0, :, :, rank] = key
        both[1, :, :, rank] = value
    keys, values = both.view(two, b, h, p * s, d).unbind(0)
    return keys, values
