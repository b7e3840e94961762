"""The layouts handed to the codec fit the buffers xfuser packs: rows are tokens, columns joined heads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compactdist_common import Expected
from compactdist_xdit import sites

B, H, S, D, P = 3, 4, 6, 8, 2


def tokens(x: Tensor) -> Tensor:
    """`(B, H, S, D)` -> matrix `(B * S, H * D)`."""
    return x.permute(0, 2, 1, 3).reshape(x.shape[0] * x.shape[2], -1)


def tensors(count: int) -> list[Tensor]:
    return list(torch.randn(count, B, H, S, D))


def seen(expected: Expected, wire: Tensor) -> Tensor:
    """The matrices that the codec sees in a message."""
    layout = expected(wire.numel())
    assert layout is not None
    return layout.resolve(wire.numel()).to_matrix(wire)


def test_ring_buffer_is_keys_then_values() -> None:
    q, k, v = tensors(3)
    wire = torch.cat([k.flatten(), v.flatten()])
    matrix = seen(sites._ring(None, q, k, v, is_causal=False), wire)
    assert torch.equal(matrix, torch.stack([tokens(k), tokens(v)]))


def test_combined_exchange() -> None:
    qkv = tensors(3)
    wire = torch.stack(qkv).view(3, B, P, H // P, S, D).permute(2, 0, 1, 3, 4, 5).reshape(P, -1)
    assert torch.equal(seen(sites._combined(P, *qkv), wire[1]), torch.stack([tokens(x[:, H // P :]) for x in qkv]))


def test_input_exchange() -> None:
    (q,) = tensors(1)
    wire = q.permute(1, 0, 2, 3).reshape(P, -1)
    assert torch.equal(seen(sites._input(P, q), wire[1])[0], tokens(q[:, H // P :]))


def test_output_exchange() -> None:
    (out,) = tensors(1)
    wire = out.permute(2, 0, 1, 3).reshape(P, -1)
    assert torch.equal(seen(sites._output(P, out), wire[1])[0], tokens(out[:, :, S // P :]))


def test_grouped_query_exchange() -> None:
    q, (k, v) = torch.randn(B, H, S, D), torch.randn(2, B, H // 2, S, D)
    wire = torch.cat([x.permute(1, 0, 2, 3).reshape(P, -1) for x in (q, k, v)], dim=1)
    mine = torch.cat([x[:, x.shape[1] // P :] for x in (q, k, v)], dim=1)
    assert torch.equal(seen(sites._grouped_query(P, q, k, v), wire[1])[0], tokens(mine))


@pytest.mark.parametrize("expected", [sites._input, sites._output])
def test_message_of_another_size_gets_no_layout(expected: Callable[..., Expected]) -> None:
    (x,) = tensors(1)
    assert expected(P, x)(x.numel() // P) is not None
    assert expected(P, x)(x.numel()) is None
