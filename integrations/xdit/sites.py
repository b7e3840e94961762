"""What the buffers mean that xfuser's sequence parallelism (`xfuser.model_executor.layers.usp`) sends.

A process group sees flat one-dimensional tensors. While `Sites` is installed, every communicating function of
usp.py runs inside a named call site, and the layout of the buffer it is about to send is known from the
shapes of its arguments. `(B, H, S, D)`: batch, heads, tokens of this rank, head dimension; P: Ulysses degree.

| site | function                                | one directed message, flat                |
|------|-----------------------------------------|-------------------------------------------|
| kv   | ring_attn                               | K then V, each (B, H/P, S, D)             |
| qkv  | _combined_qkv_all_to_all (and GQA form) | Q, K, V (and extras), each (B, H/P, S, D) |
| in   | _ft_c_input_all_to_all                  | Q or K or V, (H/P, B, S, D)               |
| out  | _ft_c_output_all_to_all                 | (S/P, B, H/P, D)                          |

Tokens become rows and the joined heads become channels: the features of one token differ much more in scale
from channel to channel than from token to token. A function that a version of xfuser does not have is left
alone; then the codec finds a layout by itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

import compactdist

Guess = Callable[..., "compactdist.Layout | None"]


def _ring(attention: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> compactdist.Layout:
    b, h, s, d = key.shape
    return compactdist.Layout("(kv b h s d) -> kv (b s) (h d)", kv=2, b=b, h=h, s=s, d=d)


def _combined(peers: int, *tensors: Tensor) -> compactdist.Layout:
    b, h, s, d = tensors[0].shape
    pattern = "(n b h s d) -> n (b s) (h d)"
    return compactdist.Layout(pattern, n=len(tensors), b=b, h=h // peers, s=s, d=d)


def _grouped_query(peers: int, *tensors: Tensor) -> compactdist.Layout:
    """Fewer heads in K and V than in Q, packed as (heads, B, S, D) one tensor behind the other."""
    b, _, s, d = tensors[0].shape
    heads = sum(tensor.shape[1] for tensor in tensors) // peers
    return compactdist.Layout("(h b s d) -> 1 (b s) (h d)", h=heads, b=b, s=s, d=d)


def _input(peers: int, x: Tensor) -> compactdist.Layout:
    b, h, s, d = x.shape
    return compactdist.Layout("(h b s d) -> 1 (b s) (h d)", h=h // peers, b=b, s=s, d=d)


def _output(peers: int, x: Tensor) -> compactdist.Layout:
    b, h, s, d = x.shape
    return compactdist.Layout("(s b h d) -> 1 (b s) (h d)", s=s // peers, b=b, h=h, d=d)


class Sites:
    """Names the call sites of usp.py and knows the layout of the message under way.

    `groups` maps `"ring"` and `"ulysses"` to the wrapped groups (either may be missing). `layout_of` is meant
    to be passed to `compactdist.wrap(layouts=...)`, `install` and `remove` bracket the time in which it has
    answers.
    """

    def __init__(self) -> None:
        self.groups: dict[str, Any] = {}
        self._current: compactdist.Layout | None = None
        self._originals: dict[str, Callable[..., Any]] = {}

    def layout_of(self, info: Any) -> compactdist.Layout | None:
        """The layout of the message described by `info`, or None where it is not one of the known ones."""
        layout = self._current
        if layout is None or math.prod(layout.sizes.values()) != info.numel:
            return None
        return layout

    def install(self) -> None:
        from xfuser.model_executor.layers import usp

        ulysses = self.groups.get("ulysses")
        peers = ulysses.size() if ulysses is not None else 1
        sites: dict[str, tuple[str, str, Guess]] = {
            "ring_attn": ("ring", "kv", _ring),
            "_combined_qkv_all_to_all": ("ulysses", "qkv", functools.partial(_combined, peers)),
            "_combined_gqa_qkv_all_to_all": ("ulysses", "qkv", functools.partial(_grouped_query, peers)),
            "_ft_c_input_all_to_all": ("ulysses", "in", functools.partial(_input, peers)),
            "_ft_c_output_all_to_all": ("ulysses", "out", functools.partial(_output, peers)),
        }
        for function, (group, site, guess) in sites.items():
            original = getattr(usp, function, None)
            if original is not None and group in self.groups and function not in self._originals:
                self._originals[function] = original
                setattr(usp, function, self._named(original, self.groups[group], site, guess))

    def remove(self) -> None:
        if self._originals:
            from xfuser.model_executor.layers import usp

            for function, original in self._originals.items():
                setattr(usp, function, original)
            self._originals.clear()

    def _named(self, original: Callable[..., Any], group: Any, site: str, guess: Guess) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():  # names and layouts are Python's business, a graph holds none
                return original(*args, **kwargs)
            before, self._current = self._current, guess(*args, **kwargs)
            try:
                with group.key(site) if hasattr(group, "key") else nullcontext():
                    return original(*args, **kwargs)
            finally:
                self._current = before

        return call
