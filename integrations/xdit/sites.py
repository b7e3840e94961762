"""Names and layouts of the messages of xfuser's sequence parallelism (`xfuser.model_executor.layers.usp`).

While `Sites` is installed, every communicating function of usp.py runs inside a named call site, and the layout of the
message it is about to send follows from the shapes of its arguments. `(B, H, S, D)`: batch, heads, tokens of this rank,
head dimension; P: Ulysses degree.

| site | function                                | one directed message, flat                |
|------|-----------------------------------------|-------------------------------------------|
| kv   | ring_attn                               | K then V, each (B, H/P, S, D)             |
| qkv  | _combined_qkv_all_to_all (and GQA form) | Q, K, V (and extras), each (B, H/P, S, D) |
| in   | _ft_c_input_all_to_all                  | Q or K or V, (H/P, B, S, D)               |
| out  | _ft_c_output_all_to_all                 | (S/P, B, H/P, D)                          |

A function that a version of xfuser does not have is left out; its codec then finds a layout by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compactdist_common import CallSites, Expected, Patches, expect


def _ring(attention: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Expected:
    return expect("n b h s d", 2, *key.shape)


def _combined(peers: int, *tensors: Tensor) -> Expected:
    b, h, s, d = tensors[0].shape
    return expect("n b h s d", len(tensors), b, h // peers, s, d)


def _grouped_query(peers: int, *tensors: Tensor) -> Expected:
    """K and V have fewer heads than Q; the message holds each as `(H, B, S, D)`, one behind the other."""
    b, _, s, d = tensors[0].shape
    heads = sum(tensor.shape[1] for tensor in tensors) // peers
    return expect("h b s d", heads, b, s, d)


def _input(peers: int, x: Tensor) -> Expected:
    b, h, s, d = x.shape
    return expect("h b s d", h // peers, b, s, d)


def _output(peers: int, x: Tensor) -> Expected:
    b, h, s, d = x.shape
    return expect("s b h d", s // peers, b, h, d)


class Sites(CallSites):
    """Names the call sites of usp.py between `install()` and `remove()`, and knows the layouts of their messages.

    Attributes:
        groups: the wrapped groups, `"ring"` and `"ulysses"`; one that is missing gets no names. Set it before
        `install`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.groups: dict[str, Any] = {}
        self._patches = Patches()

    def install(self) -> None:
        """Wrap the functions of usp.py. Does nothing where they are wrapped already."""
        if self._patches:
            return
        from xfuser.model_executor.layers import usp

        ulysses = self.groups.get("ulysses")
        peers = ulysses.size() if ulysses is not None else 1
        sites: dict[str, tuple[str, str, Callable[..., Expected]]] = {
            "ring_attn": ("ring", "kv", _ring),
            "_combined_qkv_all_to_all": ("ulysses", "qkv", functools.partial(_combined, peers)),
            "_combined_gqa_qkv_all_to_all": ("ulysses", "qkv", functools.partial(_grouped_query, peers)),
            "_ft_c_input_all_to_all": ("ulysses", "in", functools.partial(_input, peers)),
            "_ft_c_output_all_to_all": ("ulysses", "out", functools.partial(_output, peers)),
        }
        for function, (route, site, expected) in sites.items():
            if route in self.groups and hasattr(usp, function):
                named = functools.partial(self._named, self.groups[route], site, expected)
                self._patches.wrap(usp, function, named)

    def remove(self) -> None:
        """Give usp.py its own functions back. Calling it again does nothing."""
        self._patches.undo()

    def _named(
        self, group: Any, site: str, expected: Callable[..., Expected], original: Callable[..., Any]
    ) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():  # a graph runs no Python, so it can neither name sites nor know layouts
                return original(*args, **kwargs)
            with self.site(group, site, expected(*args, **kwargs)):
                return original(*args, **kwargs)

        return call
