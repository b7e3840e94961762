"""The layouts handed to the codec fit the buffers diffusers packs: rows are tokens, columns joined heads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from compactdist_diffusers.sites import Sites

B, S, H, D, P = 3, 6, 4, 8, 2


class Group:
    """A wrapped group that notes its keys."""

    def __init__(self) -> None:
        self.keys: list[str] = []

    def size(self) -> int:
        return P

    @contextlib.contextmanager
    def key(self, name: str) -> Iterator[None]:
        self.keys.append(name)
        yield


def tokens(x: Tensor) -> Tensor:
    """`(B, S, H, D)` -> matrix `(B * S, H * D)`."""
    return x.reshape(x.shape[0] * x.shape[1], -1)


def made(routes: tuple[str, ...]) -> tuple[Sites, Any, dict[str, Group]]:
    sites, config = Sites(), SimpleNamespace(ulysses_degree=P if "ulysses" in routes else 1)
    groups = {route: Group() for route in routes}
    sites.groups.append((config, groups))
    return sites, config, groups


def matrix(sites: Sites, wire: Tensor) -> Tensor | None:
    """What the codec is told to see in a message, as the group asks while it is sent."""
    layout = sites.layout_of(SimpleNamespace(numel=wire.numel()))
    return None if layout is None else layout.resolve(wire.numel()).to_matrix(wire)


@pytest.mark.parametrize("padded", [0, 2])
def test_ring_buffer_is_keys_then_values(padded: int) -> None:
    """Also where `ring_anything` pads the tokens to those of the longest rank."""
    sites, config, groups = made(("ring",))
    k, v = torch.randn(2, B, S + padded, H, D)
    wire = torch.cat([k.flatten(), v.flatten()])
    seen = sites.attention(lambda: matrix(sites, wire), k[:, :S], config)
    assert torch.equal(seen, torch.stack([tokens(k), tokens(v)]))
    assert groups["ring"].keys == ["kv"]
    assert matrix(sites, wire) is None  # outside


def exchanges(sites: Sites, config: Any, group: Group, wires: list[Tensor]) -> list[Tensor | None]:
    """The matrices seen in the second rank's message of each exchange of one attention."""

    def call() -> list[Tensor | None]:
        return [sites.exchange(lambda w=wire: matrix(sites, w[1].flatten()), group, wire) for wire in wires]

    return sites.attention(call, torch.empty(B, S, H, D), config)


def test_ulysses_exchanges() -> None:
    sites, config, groups = made(("ulysses",))
    qkv, out = torch.randn(3, B, S, H, D), torch.randn(B, P * S, H // P, D)
    wires = [x.reshape(B, S, P, H // P, D).permute(2, 1, 0, 3, 4).contiguous() for x in qkv]
    wires.append(out.reshape(B, P, S, H // P, D).permute(1, 3, 0, 2, 4).contiguous())
    wires.append(torch.randn(P, H // P, B, S))  # the log-sum-exp: no layout
    *seen, lse = exchanges(sites, config, groups["ulysses"], wires)
    for x, got in zip(qkv, seen, strict=False):
        assert torch.equal(got[0], tokens(x[:, :, H // P :]))
    assert torch.equal(seen[3][0], tokens(out[:, S:]))
    assert lse is None
    assert groups["ulysses"].keys == ["q", "k", "v", "out", "lse"]


def test_both_routes() -> None:
    sites, config, groups = made(("ring", "ulysses"))
    qkv, out = torch.randn(3, B, S, H, D), torch.randn(B, P * S, H // P, D)
    wires = [x.reshape(B, S, P, H // P, D).transpose(0, 2).contiguous() for x in qkv]
    wires.append(out.reshape(B, P, S, H // P, D).permute(1, 3, 2, 0, 4).contiguous())
    seen = exchanges(sites, config, groups["ulysses"], wires)
    for x, got in zip(qkv, seen, strict=False):
        assert torch.equal(got[0], tokens(x[:, :, H // P :]))
    assert torch.equal(seen[3][0], tokens(out[:, S:]))

    k, v = torch.randn(2, B, P * S, H // P, D)
    wire = torch.cat([k.flatten(), v.flatten()])
    got = sites.attention(lambda: matrix(sites, wire), torch.empty(B, S, H, D), config)
    assert torch.equal(got, torch.stack([tokens(k), tokens(v)]))


def test_uneven_exchanges() -> None:
    """Three heads over two ranks are padded to four; ranks hold 6 and 5 tokens."""
    sites, config, groups = made(("ulysses",))
    q = torch.randn(B, S, 3, D)
    padded = torch.nn.functional.pad(q, (0, 0, 0, 1))
    wire = padded.reshape(B, S, P, 2, D).permute(2, 1, 0, 3, 4)[1].contiguous()
    out = torch.randn(B, S + 5, 2, D)
    theirs = out.permute(1, 0, 2, 3)[S:].contiguous()

    def call() -> list[Tensor | None]:
        group: Any = groups["ulysses"]
        send: Callable[..., Any] = sites.uneven_exchange
        seen = [send(lambda: matrix(sites, wire.flatten()), group, q, False) for _ in range(3)]
        return [*seen, send(lambda: matrix(sites, theirs.flatten()), group, out, True)]

    *seen, last = sites.attention(call, q, config)
    assert all(torch.equal(got[0], tokens(padded[:, :, 2:])) for got in seen)
    assert torch.equal(last[0], tokens(out[:, S:]))
    assert groups["ulysses"].keys == ["q", "k", "v", "out"]


def test_message_of_another_size_gets_no_layout() -> None:
    sites, config, groups = made(("ring", "ulysses"))
    other = torch.empty(7)
    assert sites.attention(lambda: matrix(sites, other), torch.empty(B, S, H, D), config) is None
    assert sites.exchange(lambda: matrix(sites, other), groups["ulysses"], torch.empty(P, S, B, H, D)) is None
