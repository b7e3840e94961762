"""Kernels read a history in eight bits as it is, and the bytes are those of the reference with a tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compactdist import kernels
from compactdist.errors import FrameError
from compactdist.kernels import use
from compactdist.kernels.gpu.rounding import Rounding
from compactdist.kernels.spec import EightBits
from compactdist.state.matrix_view import plain
from compactdist.wire import HEADER_NBYTES
from tests.kernels import rounded
from tests.kernels.gpu import kit
from tests.kernels.gpu.test_frames import Stream

DEVICE_CODECS = (*rounded.CODECS, {"id": "topk"}, {"id": "topk_int4", "m": 5})


@pytest.mark.parametrize("codec", DEVICE_CODECS, ids=lambda codec: "-".join(map(str, codec.values())))
def test_same_bytes(codec: dict[str, Any]) -> None:
    at = DEVICE_CODECS.index(codec)
    for turn, form in enumerate(rounded.FORMS):
        view, dtype = rounded.VIEWS[(2 * at + turn) % len(rounded.VIEWS)], rounded.DTYPES[(at + turn) % 3]
        rounded.check(codec, view, dtype, form, "gpu", kit.DEVICE)


@pytest.mark.parametrize("form", rounded.FORMS)
def test_lowrank_takes_it_as_the_tensor_that_it_stands_for(form: EightBits) -> None:
    """Its payload depends on the device, what is decoded of it does not."""
    codec, view = kit.get({"id": "lowrank", "rank": 2}), plain(24 * 72, 1, 72)
    base, x = (rounded.tensor(view.numel, torch.bfloat16, seed).to(kit.DEVICE) for seed in range(2))
    with use("gpu"):
        kept = rounded.quantize(base, form, base.dtype)
        made = []
        for term in (kept, kernels.restored(kept)):
            session = codec.open(view, base.dtype, kit.DEVICE)
            assert session.takes_rounded
            payload = torch.empty(session.payload_nbytes, dtype=torch.uint8, device=kit.DEVICE)
            outs = torch.empty(2, view.numel, dtype=base.dtype, device=kit.DEVICE)
            terms: Any = (term,)
            session.encode(x, terms, outs[0], payload)
            session.decode(payload, terms, outs[1])
            made.append([kit.raw(one) for one in (payload, *outs)])
    assert all(map(torch.equal, *made))


@pytest.mark.parametrize("codec", ["int4", "binary:scales=block", "topk"])
@pytest.mark.parametrize("form", rounded.FORMS)
def test_frames_of_a_device(codec: str, form: EightBits, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor is made of a history, which stays where it is. A refused frame gives NaN, and moves nothing."""
    with use("gpu"):
        stream = Stream(codec, state=form)
        into = torch.empty(stream.view.numel, dtype=torch.bfloat16, device=kit.DEVICE)
        stream.receive(0, stream.send(0))
        ends = stream.encoder.predictor, stream.decoder.predictor
        at = [one.data_ptr() for end in ends for one in end.held]
        monkeypatch.setattr(Rounding, "dequantize", None)
        for step in range(1, 4):
            value = stream.receive(step, stream.send(step), into=into)
            assert stream.decoder.wrote
            assert torch.equal(kit.raw(into), kit.raw(value))
        assert stream.ends_are_equal()
        stream.both_are_silent()
        assert at == [one.data_ptr() for end in ends for one in end.held]
        frame, before = stream.send(4), [kit.raw(one) for one in ends[1].held]
        frame[HEADER_NBYTES] ^= 1
        stream.receive(4, frame, into=into)
        assert bool(into.isnan().all())
        assert all(map(torch.equal, before, map(kit.raw, ends[1].held)))
        with pytest.raises(FrameError, match="checksum"):
            stream.both_are_silent()


def test_what_is_not_finite_changes_both_ends_alike() -> None:
    with use("gpu"):
        stream = Stream("int4", state="int8")
        into = torch.empty(stream.view.numel, dtype=torch.bfloat16, device=kit.DEVICE)
        for step in range(4):
            x = stream.x()
            if step == 2:
                x[7] = float("nan")
            stream.receive(step, stream.send(step, x), into=into)
            assert bool(into.isnan().any()) == (step == 2)
            assert stream.ends_are_equal()
