"""Kernels read a velocity, and two terms in eight bits, where they lie: bytes are those of tensors of these terms."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from compactdist.errors import FrameError
from compactdist.kernels import restored, use
from compactdist.kernels.gpu import velocities
from compactdist.kernels.gpu.rounding import Rounding
from compactdist.kernels.gpu.terms import number_of
from compactdist.kernels.spec import EightBits, Velocity
from compactdist.state.adaptive import AdaptiveVelocity, samples_of
from compactdist.state.quantized_history import QuantizedCell, quantize
from compactdist.wire import HEADER_NBYTES
from tests.kernels import rounded
from tests.kernels.gpu import kit
from tests.kernels.gpu.test_frames import Stream
from tests.kernels.test_velocities import extreme
from tests.quick import quick_rows

CODECS: tuple[dict[str, Any], ...] = (
    *rounded.CODECS,
    {"id": "topk"},
    {"id": "topk_int4", "m": 5},
    {"id": "lowrank", "rank": 2},
    {"id": "transform", "bits": 2.0, "block": 24},
)
FORMS: tuple[EightBits | None, ...] = (None, "int8", "fp8")
EVERY = [
    (codec, rounded.DTYPES[(at + turn) % 3], form) for at, codec in enumerate(CODECS) for turn, form in enumerate(FORMS)
]


def _terms(numel: int, dtype: torch.dtype, form: EightBits | None) -> list[Any]:
    """Pairs of terms on the device: velocities that the host knows and does not know, and two terms in eight bits."""
    base, second = (rounded.tensor(numel, dtype, seed).to(kit.DEVICE) for seed in range(2))
    if form is not None:
        base, second = (quantize(one, form, dtype) for one in (base, second))
    said = torch.tensor([-0.3125, 0.0], device=kit.DEVICE)
    made: list[Any] = [(base, Velocity(base, second, one)) for one in (0.4375, said[0], said[1])]
    return [*made, (base, second)] if form is not None else made


@pytest.mark.parametrize(("codec", "dtype", "form"), quick_rows(EVERY[::5], EVERY), ids=str)
def test_same_bytes(codec: dict[str, Any], dtype: torch.dtype, form: EightBits | None) -> None:
    view = rounded.VIEWS[EVERY.index((codec, dtype, form)) % 4]
    x = rounded.tensor(view.numel, dtype, 2).to(kit.DEVICE)
    with use("gpu"):
        for terms in _terms(view.numel, dtype, form):
            assert number_of(terms) > 2
            made = []
            for given in (terms, tuple(map(restored, terms))):
                ends = [kit.get(codec).open(view, dtype, kit.DEVICE) for _ in range(2)]
                assert ends[0].takes_velocity
                assert ends[0].takes_rounded or form is None
                payload = torch.empty(ends[0].payload_nbytes, dtype=torch.uint8, device=kit.DEVICE)
                outs = torch.full((2, view.numel), torch.nan, dtype=dtype, device=kit.DEVICE)
                ends[0].encode(x, given, outs[0], payload)
                ends[1].decode(payload, given, outs[1])
                made.append([kit.raw(one) for one in (payload, *outs)])
            assert all(map(torch.equal, *made))
            assert torch.equal(made[0][1], made[0][2])


def test_a_receiver_writes_over_what_a_velocity_goes_out_from() -> None:
    for codec, view in product(({"id": "int4"}, {"id": "topk"}, {"id": "lowrank", "rank": 2}), rounded.VIEWS[:2]):
        with use("gpu"):
            base, previous, x = (rounded.tensor(view.numel, torch.bfloat16, seed).to(kit.DEVICE) for seed in range(3))
            session = kit.get(codec).open(view, torch.bfloat16, kit.DEVICE)
            payload = torch.empty(session.payload_nbytes, dtype=torch.uint8, device=kit.DEVICE)
            expected = torch.empty_like(x)
            terms: Any = base, Velocity(base, previous, 0.5)
            session.encode(x, terms, expected, payload)
            session.decode(payload, terms, previous)
            assert torch.equal(kit.raw(previous), kit.raw(expected))


@pytest.mark.parametrize("order", [2, "auto"])
@pytest.mark.parametrize(
    ("codec", "form"),
    [("int4", "exact"), ("int4", "int8"), ("binary:scales=block", "fp8"), ("topk", "int8"), ("transform", "int8")],
)
def test_no_tensor_is_made_of_them(order: Any, codec: str, form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In steady streams; what is kept in eight bits stays where it is. A refused frame gives NaN, and moves nothing."""
    with use("gpu"):
        stream = Stream(codec, state=form, order=order)
        into = torch.empty(stream.view.numel, dtype=torch.bfloat16, device=kit.DEVICE)
        for step in range(2):
            stream.receive(step, stream.send(step), into=into)
        ends = stream.encoder.predictor, stream.decoder.predictor
        places = {one.data_ptr() for end in ends for one in end.held}
        monkeypatch.setattr(Rounding, "dequantize", None)
        monkeypatch.setattr(velocities, "write_out", None)
        for step in range(2, 6):
            value = stream.receive(step, stream.send(step), into=into)
            assert torch.equal(kit.raw(into), kit.raw(value))
        assert stream.ends_are_equal()
        stream.both_are_silent()
        if form != "exact":
            assert places == {one.data_ptr() for end in ends for one in end.held}
        frame, before = stream.send(6), sorted(kit.raw(one).tolist() for one in ends[1].held)
        frame[HEADER_NBYTES] ^= 1
        stream.receive(6, frame, into=into)
        assert bool(into.isnan().all())
        assert before == sorted(kit.raw(one).tolist() for one in ends[1].held)  # perhaps in another order
        with pytest.raises(FrameError, match="checksum"):
            stream.both_are_silent()


@pytest.mark.parametrize("order", [2, "auto"])
@pytest.mark.parametrize("form", ["exact", "int8"])
def test_what_is_not_finite_changes_both_ends_alike(order: Any, form: Any) -> None:
    with use("gpu"):
        stream = Stream("int4", state=form, order=order)
        into = torch.empty(stream.view.numel, dtype=torch.bfloat16, device=kit.DEVICE)
        for step in range(6):
            x = stream.x()
            if step == 3:
                x[7] = float("nan")
            stream.receive(step, stream.send(step, x), into=into)
            assert bool(into.isnan().any()) == (step == 3)
            assert stream.ends_are_equal()


@pytest.mark.parametrize("form", rounded.FORMS)
@pytest.mark.parametrize("dtype", rounded.DTYPES)
def test_a_velocity_is_rounded_off_as_a_tensor_is(dtype: torch.dtype, form: EightBits) -> None:
    for numel, factor in product((1, 127, 129, 9001), (0.5, 1.0, 0.0)):
        value, kept = extreme(numel, dtype, 1).to(kit.DEVICE), quantize(extreme(numel, dtype, 2), form, dtype)
        with use("gpu"):
            on_device = quantize(restored(kept).to(kit.DEVICE), form, dtype)
            change = Velocity(value, on_device, factor)
            expected, made = quantize(restored(change), form, dtype), quantize(change, form, dtype)
        assert torch.equal(kit.raw(made.codes), kit.raw(expected.codes))
        assert torch.equal(kit.raw(made.scales), kit.raw(expected.scales))


@pytest.mark.parametrize("form", rounded.FORMS)
def test_a_coefficient_is_chosen_from_codes(form: EightBits) -> None:
    numel = 70_001
    x, base, previous = (rounded.tensor(numel, torch.bfloat16, seed).to(kit.DEVICE) for seed in range(3))
    rule, chosen = velocities.Rule(1.0, 16, 1.0), torch.empty(2, device=kit.DEVICE)
    with use("gpu"):
        kept = quantize(base, form, base.dtype), quantize(previous, form, base.dtype)
        read = restored(kept[0]), restored(kept[1])
        for pair, out in zip((kept, read), chosen.unbind(), strict=True):
            velocities.choose(x, pair, samples_of(numel), rule, out)
    assert chosen[0] == chosen[1] != 0


def test_histories_that_stay_move_by_copies() -> None:
    """As they do once a CUDA graph knows their addresses."""
    with use("gpu"):
        moving, staying = (AdaptiveVelocity(0.0, lambda: QuantizedCell("int8")) for _ in range(2))
        for step in range(5):
            value = rounded.tensor(1000, torch.bfloat16, step).to(kit.DEVICE)
            for one in (moving, staying):
                one.advance(value.clone(), one.kept_terms(0.5, rounded=True))
            if step == 1:
                staying.stay()
                places = [held.data_ptr() for held in staying.held]
        assert places == [held.data_ptr() for held in staying.held]
        assert all(map(torch.equal, map(kit.raw, moving.held), map(kit.raw, staying.held)))
