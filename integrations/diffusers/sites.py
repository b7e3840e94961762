"""What the buffers mean that diffusers' context parallelism (`diffusers.models.attention_dispatch`, 0.42) sends.

A process group sees flat one-dimensional tensors. While `Sites` is installed, the attention of a parallel model runs
inside named call sites, and the layout of the buffer about to be sent is known from the shapes of the arguments.
`(B, S, H, D)`: batch, tokens of this rank, heads, head dimension; P: Ulysses degree.

| site    | function                                   | one directed message, flat                                  |
|---------|--------------------------------------------|-------------------------------------------------------------|
| kv      | _templated_context_parallel_attention      | K then V, each (B, S, H, D); with Ulysses (B, S P, H/P, D)  |
| q, k, v | _all_to_all_single, first three            | (S, B, H/P, D)                                              |
| out     | _all_to_all_single, fourth                 | (H/P, B, S, D); with a ring (H/P, S, B, D)                  |
| q, k, v | all_to_all_single_any_qkv_async            | (S, B, H/P, D), heads padded                                |
| out     | all_to_all_single_any_o_async              | (S of the receiver, B, H/P, D)                              |

Tokens become rows and the joined heads become channels, as in `compactdist_xdit`. A function that a version of
diffusers does not have is left alone; then the codec finds a layout by itself. Compiled code has neither names nor
hints, for nothing of Python runs in it: there, calls are told apart by their order and encoders look for layouts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import compactdist

Guess = Callable[[int], "compactdist.Layout | None"]
"""The layout of a message of so many elements."""

_EXCHANGES = ("q", "k", "v", "out", "lse")


def _no_guess(numel: int) -> None:
    return None


def ring_guess(key: Tensor, ulysses: int) -> Guess:
    """For `(kv b s h d)`. The tokens follow from the size: "anything" modes pad them to the longest rank's."""
    b, _, h, d = key.shape
    h = h // ulysses

    def guess(numel: int) -> compactdist.Layout | None:
        s, rest = divmod(numel, 2 * b * h * d)
        return None if rest else compactdist.Layout("(kv b s h d) -> kv (b s) (h d)", kv=2, b=b, s=s, h=h, d=d)

    return guess


def exchange_guess(pattern: str, sizes: torch.Size | tuple[int, ...]) -> Guess:
    """For a message whose axes are named by `pattern`, for instance `"s b h d"`; -1: this one follows from the size."""
    names = pattern.split()

    def guess(numel: int) -> compactdist.Layout | None:
        known = dict(zip(names, sizes, strict=True))
        free, rest = divmod(numel, math.prod(size for size in sizes if size >= 0))
        layout = {name: free if size < 0 else size for name, size in known.items()}
        if rest or math.prod(layout.values()) != numel:
            return None
        return compactdist.Layout(f"({pattern}) -> 1 (b s) (h d)", **layout)

    return guess


class Sites:
    """Names the call sites of parallel attention and knows the layout of the message under way.

    `layout_of` is meant to be passed to `compactdist.wrap(layouts=...)`.

    Attributes:
        groups: each context parallel configuration of ours, with its wrapped groups by route.
    """

    def __init__(self) -> None:
        self.groups: list[tuple[Any, dict[str, Any]]] = []
        self._guess: Guess = _no_guess
        self._exchanges = 0

    def layout_of(self, info: Any) -> compactdist.Layout | None:
        """The layout of the message described by `info`, or None where it is not one of the known ones."""
        return self._guess(info.numel)

    def find(self, config: Any) -> dict[str, Any] | None:
        return next((groups for known, groups in self.groups if known is config), None)

    def owns(self, group: Any) -> bool:
        return any(group is mine for _, groups in self.groups for mine in groups.values())

    # Dynamo, where it meets these outside a graph, must not try to compile them.
    @torch.compiler.disable(recursive=False)
    def attention(self, call: Callable[[], Any], key: Tensor, config: Any) -> Any:
        """Run one attention; what its ring group sends meanwhile is `kv`."""
        groups = self.find(config) or {}
        self._exchanges = 0
        ring = groups.get("ring")
        if ring is None:
            return call()
        with ring.key("kv"):
            return self._guessing(ring_guess(key, config.ulysses_degree), call)

    @torch.compiler.disable(recursive=False)
    def exchange(self, call: Callable[[], Any], group: Any, buffer: Tensor) -> Any:
        """Run one exchange of equal parts, `buffer` `(P, ...)`; an attention has four, and one for the log-sum-exp."""
        site = _EXCHANGES[min(self._exchanges, len(_EXCHANGES) - 1)]
        self._exchanges += 1
        guess: Guess = _no_guess
        if buffer.ndim == 5:
            hybrid = any(group is groups.get("ulysses") and "ring" in groups for _, groups in self.groups)
            pattern = "s b h d" if site != "out" else "h s b d" if hybrid else "h b s d"
            guess = exchange_guess(pattern, buffer.shape[1:])
        with group.key(site):
            return self._guessing(guess, call)

    @torch.compiler.disable(recursive=False)
    def uneven_exchange(self, call: Callable[[], Any], group: Any, x: Tensor, out: bool) -> Any:
        """Run one exchange of the "Ulysses anything" kind, `x` `(B, S, H, D)`."""
        site = "out" if out else _EXCHANGES[min(self._exchanges, 2)]
        self._exchanges += 1
        b, _, h, d = x.shape
        heads = h if out else -(-h // group.size())
        with group.key(site):
            return self._guessing(exchange_guess("s b h d", (-1, b, heads, d)), call)

    def _guessing(self, guess: Guess, call: Callable[[], Any]) -> Any:
        before, self._guess = self._guess, guess
        try:
            return call()
        finally:
            self._guess = before

    def install(self) -> None:
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
        return call() if sites is None else sites.attention(call, key, config)

    return attention


def _named_exchange(original: Callable[..., Any], active: list[Sites]) -> Callable[..., Any]:
    @functools.wraps(original)
    def exchange(x: Tensor, group: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(x, group)
        sites = next((sites for sites in active if sites.owns(group)), None)
        return original(x, group) if sites is None else sites.exchange(lambda: original(x, group), group, x)

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
