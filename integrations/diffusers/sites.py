"""Names and layouts of the messages of diffusers' context parallelism (`diffusers.models.attention_dispatch`, 0.42).

While `Sites` is installed, the attention of a parallel model runs inside named call sites, and the layout of the
message it is about to send follows from the shapes of its arguments. `(B, S, H, D)`: batch, tokens of this rank, heads,
head dimension; P: Ulysses degree.

| site    | function                                   | one directed message, flat                                  |
|---------|--------------------------------------------|-------------------------------------------------------------|
| kv      | _templated_context_parallel_attention      | K then V, each (B, S, H, D); with Ulysses (B, S P, H/P, D)  |
| q, k, v | _all_to_all_single, first three            | (S, B, H/P, D)                                              |
| out     | _all_to_all_single, fourth                 | (H/P, B, S, D); with a ring (H/P, S, B, D)                  |
| q, k, v | all_to_all_single_any_qkv_async            | (S, B, H/P, D), heads padded                                |
| out     | all_to_all_single_any_o_async              | (S of the receiver, B, H/P, D)                              |

A function that a version of diffusers does not have is left out; its codec then finds a layout by itself. Compiled code
runs no Python, so it can neither name call sites nor know layouts: there, the group tells calls apart by their order,
and encoders find layouts.

Ulysses attention exchanges Q, K and V one after the other, and diffusers waits for each before it sends the next. While
`Sites` is installed, all three are under way at once, and each is waited for where it is first used: two waits for the
link less in every attention. The messages and their bytes stay the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor

from compactdist_common import CallSites, any_of, expect

_EXCHANGES = ("q", "k", "v", "out", "lse")
_INPUTS = 3  # the first of them: nothing happens between their exchanges


class Sites(CallSites):
    """Names the call sites of parallel attention between `install()` and `remove()`, and knows their layouts.

    Attributes:
        groups: every context-parallel configuration that `enable` found, with its wrapped groups by route.
    """

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[tuple[Any, dict[str, Any]]] = []
        self._exchanges = 0  # of the attention under way, so far
        self._at_once = False  # they need not be waited for before the next

    def find(self, config: Any) -> dict[str, Any] | None:
        """The wrapped groups of a context-parallel configuration, `None` where another pipeline owns it."""
        return next((groups for known, groups in self.groups if known is config), None)

    def owns(self, group: Any) -> bool:
        """Whether `group` is one of these wrapped groups."""
        return any(group is mine for _, groups in self.groups for mine in groups.values())

    # Dynamo may call these three methods outside a graph. It must not try to compile them.
    @torch.compiler.disable(recursive=False)
    def attention(self, call: Callable[[], Any], key: Tensor, config: Any, at_once: bool = False) -> Any:
        """Run one attention, whose messages on the ring group are `kv`.

        Args:
            call: attends.
            key: `(B, S, H, D)`.
            config: of the model's context parallelism.
            at_once: attention takes queries, keys and values that have not been waited for.
        """
        groups = self.find(config) or {}
        self._exchanges, self._at_once = 0, at_once
        ring = groups.get("ring")
        if ring is None:
            return call()
        b, _, h, d = key.shape
        # The tokens follow from the message: the "anything" modes pad them to those of the longest rank.
        with self.site(ring, "kv", expect("n b s h d", 2, b, -1, h // config.ulysses_degree, d)):
            return call()

    @torch.compiler.disable(recursive=False)
    def exchange(
        self, call: Callable[[], Any], group: Any, buffer: Tensor, post: Callable[[], Any] | None = None
    ) -> Any:
        """Run one exchange of equal parts: an attention has four, and a fifth for the log-sum-exp.

        Args:
            call: sends, and waits for what the others send.
            group: a wrapped Ulysses group.
            buffer: `(P, ...)`, one message for every rank.
            post: as `call`, without the wait.
        """
        site = _EXCHANGES[min(self._exchanges, len(_EXCHANGES) - 1)]
        self._exchanges += 1
        if post is not None and self._at_once and self._exchanges <= _INPUTS:
            call = post
        expected = any_of()
        if buffer.ndim == 5:
            with_ring = any(group is groups.get("ulysses") and "ring" in groups for _, groups in self.groups)
            axes = "s b h d" if site != "out" else "h s b d" if with_ring else "h b s d"
            expected = expect(axes, *buffer.shape[1:])
        with self.site(group, site, expected):
            return call()

    @torch.compiler.disable(recursive=False)
    def uneven_exchange(self, call: Callable[[], Any], group: Any, x: Tensor, out: bool) -> Any:
        """Run one exchange of the "Ulysses anything" kind.

        Args:
            call: sends.
            group: a wrapped Ulysses group.
            x: `(B, S, H, D)`, the tensor to send.
            out: `x` is the attention's output, not a query, key or value.
        """
        site = "out" if out else _EXCHANGES[min(self._exchanges, 2)]
        self._exchanges += 1
        b, _, h, d = x.shape
        heads = h if out else -(-h // group.size())
        with self.site(group, site, expect("s b h d", -1, b, heads, d)):
            return call()

    def install(self) -> None:
        """Wrap diffusers' functions, or join the `Sites` of other pipelines for which they are wrapped already.

        Pipelines may be disabled in any order. So the functions are wrapped once for all, and hold a list of the
        `Sites` that are installed.
        """
        from diffusers.models import attention_dispatch

        for name, make in _REPLACEMENTS.items():
            function = getattr(attention_dispatch, name, None)
            if function is None:
                continue
            if not hasattr(function, "active_sites"):
                active: list[Sites] = []
                original, function = function, make(function, active)
                function.active_sites, function.original = active, original
                setattr(attention_dispatch, name, function)
            function.active_sites.append(self)

    def remove(self) -> None:
        """Put diffusers' own functions back, unless another pipeline still needs ours."""
        from diffusers.models import attention_dispatch

        for name in _REPLACEMENTS:
            function = getattr(attention_dispatch, name, None)
            active = getattr(function, "active_sites", [])
            if self in active:
                active.remove(self)
                if not active:
                    setattr(attention_dispatch, name, function.original)


def _named_attention(original: Callable[..., Any], active: list[Sites]) -> Callable[..., Any]:
    @functools.wraps(original)
    def attention(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(original, query, key, *args, **kwargs)
        if torch.compiler.is_compiling():
            return call()
        config = getattr(kwargs.get("_parallel_config"), "context_parallel_config", None)
        sites = next((sites for sites in active if sites.find(config) is not None), None)
        if sites is None:
            return call()
        at_once = config.ring_degree == 1 and "forward_op" in kwargs and not torch.is_grad_enabled()
        if at_once:
            call = functools.partial(call, forward_op=_on_values(kwargs["forward_op"]))
        return sites.attention(call, key, config, at_once)

    return attention


def _on_values(attend: Callable[..., Any]) -> Callable[..., Any]:
    """Attention on tensors that may not have been waited for. Kernels are given plain tensors: some know no others."""

    @functools.wraps(attend)
    def forward(ctx: Any, *args: Any, **kwargs: Any) -> Any:
        return attend(ctx, *[x.wait() if isinstance(x, funcol.AsyncCollectiveTensor) else x for x in args], **kwargs)

    return forward


def _post(x: Tensor, group: Any) -> Tensor:
    """diffusers' `_all_to_all_single` without its wait, which comes where the result is first used."""
    return funcol.all_to_all_single(x.flatten(), None, None, group).reshape(x.shape)


def _named_exchange(original: Callable[..., Any], active: list[Sites]) -> Callable[..., Any]:
    @functools.wraps(original)
    def exchange(x: Tensor, group: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(x, group)
        sites = next((sites for sites in active if sites.owns(group)), None)
        if sites is None:
            return original(x, group)
        return sites.exchange(functools.partial(original, x, group), group, x, functools.partial(_post, x, group))

    return exchange


def _named_uneven(original: Callable[..., Any], active: list[Sites], *, out: bool) -> Callable[..., Any]:
    @functools.wraps(original)
    def exchange(x: Tensor, group: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(x, group, **kwargs)
        sites = next((sites for sites in active if sites.owns(group)), None)
        call = functools.partial(original, x, group, **kwargs)
        return call() if sites is None else sites.uneven_exchange(call, group, x, out)

    return exchange


_REPLACEMENTS: dict[str, Callable[..., Callable[..., Any]]] = {
    "_templated_context_parallel_attention": _named_attention,
    "_all_to_all_single": _named_exchange,
    "all_to_all_single_any_qkv_async": functools.partial(_named_uneven, out=False),
    "all_to_all_single_any_o_async": functools.partial(_named_uneven, out=True),
}
