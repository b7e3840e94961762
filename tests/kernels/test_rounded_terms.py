"""Kernels on the CPU read a history in eight bits as it is: no tensor is made of it, and the bytes are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compactdist.codecs.topk import _TopKSession
from compactdist.kernels.cpu import rounding_steps
from compactdist.kernels.reference import rounding as reference_rounding
from compactdist.kernels.spec import EightBits
from compactdist.state import Order, ResidualEncoder
from compactdist.state.decoder import StreamDecoder
from compactdist.state.encoder import StreamEncoder
from compactdist.state.matrix_view import blocks
from compactdist.state.staged import Wanted
from compactdist.state.stream_config import StreamConfig
from tests.kernels import rounded
from tests.quick import quick_rows

CPU = torch.device("cpu")
EVERY = [
    *((codec, torch.bfloat16, rounded.FORMS[at % 2]) for at, codec in enumerate(rounded.CODECS)),
    *((rounded.CODECS[at], torch.float16, rounded.FORMS[at % 2]) for at in (4, 9)),
    *((rounded.CODECS[at], torch.float32, rounded.FORMS[at % 2]) for at in (7, 12)),
]
QUICK = EVERY[:1] + EVERY[9:10]
SEVERAL = [*QUICK, EVERY[11]]


@pytest.mark.parametrize(("codec", "dtype", "form"), quick_rows(QUICK, EVERY), ids=str)
def test_same_bytes(codec: dict[str, Any], dtype: torch.dtype, form: EightBits) -> None:
    for view in rounded.VIEWS:
        rounded.check(codec, view, dtype, form, "cpu", CPU)


@pytest.mark.parametrize("codec", [rounded.CODECS[0], rounded.CODECS[10]], ids=rounded.name_of)
def test_the_reference_makes_a_tensor_of_it(codec: dict[str, Any]) -> None:
    rounded.check(codec, rounded.VIEWS[1], torch.float16, "fp8", "reference", CPU)


@pytest.mark.parametrize("numel", [1, 64, 127, 128, 129, 2048 + 65])
def test_last_blocks(numel: int) -> None:
    """Blocks that are longer than what is left of the tensor."""
    rounded.check({"id": "int4", "scales": "block"}, blocks(numel), torch.bfloat16, "fp8", "cpu", CPU)


class Ends:
    """Both ends of a stream of a group, the receiver writing to a user's tensor."""

    def __init__(self, codec: dict[str, Any] | str, form: EightBits, order: Order = 1) -> None:
        self.config = StreamConfig(order, find_layout=False, state=form)
        self.codec = ResidualEncoder(codec).codec
        self.sender = StreamEncoder(self.config, 1, "here")
        self.receiver = StreamDecoder(self.config, 1, "here")
        self.into = torch.empty(1 << 15, dtype=torch.bfloat16)

    def send(self, x: torch.Tensor, step: int) -> None:
        staged = self.sender.stage(x, self.codec, Wanted(step=step, value=True), keyframe=step == 0)
        self.receiver.decode(staged.frame, self.codec, x.numel(), x.dtype, step=step, into=self.into)
        self.sender.commit(staged)
        assert staged.value is not None
        if step:
            assert self.receiver.wrote
            assert torch.equal(self.into, staged.value)
        held = [end.predictor.held for end in (self.sender, self.receiver)]
        assert all(map(torch.equal, *held))


@pytest.mark.parametrize(
    ("codec", "form"), quick_rows([(row[0], row[2]) for row in QUICK], [(row[0], row[2]) for row in SEVERAL]), ids=str
)
def test_no_tensor_is_made_of_it(codec: dict[str, Any], form: EightBits, monkeypatch: pytest.MonkeyPatch) -> None:
    ends, x = Ends(codec, form), torch.randn(1 << 15).bfloat16()
    ends.send(x, 0)

    def refuse(*args: Any) -> None:
        raise AssertionError("a history was made a tensor")

    monkeypatch.setattr(rounding_steps, "dequantize", refuse)
    monkeypatch.setattr(reference_rounding, "dequantize", refuse)
    at = [[held.data_ptr() for held in end.predictor.held] for end in (ends.sender, ends.receiver)]
    for step in range(1, 4):
        ends.send((x.float() + 0.1 * step * torch.randn(x.numel())).bfloat16(), step)
    assert at == [[held.data_ptr() for held in end.predictor.held] for end in (ends.sender, ends.receiver)]


def test_codecs_that_cannot_read_it_get_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    ends, x, given = Ends({"id": "topk"}, "int8"), torch.randn(1 << 15).bfloat16(), []
    encode = _TopKSession.encode

    def spied(self: Any, x: Any, terms: Any, *rest: Any, **more: Any) -> Any:
        given.append([type(one) for one in terms])
        return encode(self, x, terms, *rest, **more)

    monkeypatch.setattr(_TopKSession, "encode", spied)
    for step in range(3):
        ends.send((x.float() + 0.1 * step).bfloat16(), step)
    assert given == [[torch.Tensor]] * 2


def test_a_residual_that_is_far_larger_is_noticed() -> None:
    """Samples of the history are read as they are, too: a tensor that has become small is sent as a restart."""
    ends, x = Ends({"id": "binary"}, "int8"), torch.randn(1 << 15).bfloat16()
    ends.send(x, 0)
    ends.send(1e-3 * x, 1)
    assert float((ends.into - 1e-3 * x).norm() / (1e-3 * x).norm()) < 0.7
