"""Kernels on the CPU read two tensors in eight bits, or a velocity between two, as they are: order 2, order "auto"."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compactdist import codecs, kernels
from compactdist.kernels import restored, use
from compactdist.kernels.cpu import rounding_steps, velocities
from compactdist.kernels.reference import rounding as reference_rounding
from compactdist.kernels.spec import EightBits, Velocity
from compactdist.state.adaptive import samples_of
from compactdist.state.quantized_history import quantize
from tests.kernels import rounded
from tests.kernels.test_rounded_terms import EVERY, Ends
from tests.kernels.test_velocities import extreme
from tests.quick import quick_rows

QUICK = EVERY[1:2] + EVERY[8:9]


def steps(codec: dict[str, Any], dtype: torch.dtype, form: EightBits, view: Any, which: Any, *, moves: bool) -> Any:
    """Payloads and reconstructions of both ends; ``"restored"``: of the reference, with tensors for terms."""
    made, numel = [], view.numel
    with use("reference" if which == "restored" else which):
        ends = [codecs.get(codec).open(view, dtype, torch.device("cpu")) for _ in range(2)]
        for step in range(2):
            base, second = (quantize(rounded.tensor(numel, dtype, 7 * step + n), form, dtype) for n in range(2))
            terms: Any = base, Velocity(base, second, -0.3125) if moves else second
            if which == "restored":
                terms = tuple(map(restored, terms))
            x = restored(base).float() + 0.2 * rounded.tensor(numel, torch.float32, 7 * step + 2)
            payload = torch.empty(ends[0].payload_nbytes, dtype=torch.uint8)
            out, got = torch.full((2, numel), torch.nan, dtype=dtype)
            ends[0].encode(x.to(dtype), terms, out, payload)
            ends[1].decode(payload, terms, got)
            for end in ends:
                end.commit()
            made += [one.view(torch.uint8).clone() for one in (payload, out, got)]
    return made


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize(("codec", "dtype", "form"), quick_rows(QUICK, EVERY), ids=str)
def test_same_bytes(codec: dict[str, Any], dtype: torch.dtype, form: EightBits, moves: bool) -> None:
    for view in rounded.VIEWS[:4]:
        expected = steps(codec, dtype, form, view, "restored", moves=moves)
        for which in ("cpu", "reference"):
            assert all(map(torch.equal, expected, steps(codec, dtype, form, view, which, moves=moves)))


@pytest.mark.parametrize("form", rounded.FORMS)
@pytest.mark.parametrize("dtype", rounded.DTYPES)
def test_a_velocity_is_rounded_off_as_a_tensor_is(dtype: torch.dtype, form: EightBits) -> None:
    for numel in (1, 127, 129, 70_001):
        value, kept = extreme(numel, dtype, 1), quantize(extreme(numel, dtype, 2), form, dtype)
        change = Velocity(value, kept, 0.5)
        with use("reference"):
            expected = quantize(restored(change), form, dtype)
        with use("cpu"):
            made = quantize(change, form, dtype)
        assert torch.equal(made.codes.view(torch.uint8), expected.codes.view(torch.uint8))
        assert torch.equal(made.scales, expected.scales)


@pytest.mark.parametrize("form", rounded.FORMS)
def test_a_coefficient_is_chosen_from_codes(form: EightBits) -> None:
    numel = 70_001
    x, base, previous = (rounded.tensor(numel, torch.bfloat16, seed) for seed in range(3))
    kept = [quantize(one, form, torch.bfloat16) for one in (base, previous)]
    read: tuple[Tensor, ...] = tuple(map(restored, kept))
    assert velocities.weigh(x, *kept, samples_of(numel)) == velocities.weigh(x, *read, samples_of(numel))


@pytest.mark.parametrize("order", [2, "auto"])
@pytest.mark.parametrize(("codec", "form"), [("int4", "int8"), ("rates:rungs=scalar", "fp8")])
def test_no_tensor_is_made_of_them(order: Any, codec: str, form: EightBits, monkeypatch: pytest.MonkeyPatch) -> None:
    """In steady streams; what is kept stays in the memory that it has."""
    ends, g = Ends(codec, form, order), torch.Generator().manual_seed(0)
    x, change = torch.randn(2, 1 << 15, generator=g)
    places = set()
    for step in range(6):
        ends.send((x + 0.1 * step * change).bfloat16(), step)
        places |= {held.data_ptr() for held in ends.receiver.predictor.held}
        if step == 1:
            monkeypatch.setattr(rounding_steps, "dequantize", None)
            monkeypatch.setattr(reference_rounding, "dequantize", None)
            monkeypatch.setattr(kernels, "_velocities_for", None)
    assert len(places) == 4  # codes and scales of two tensors
