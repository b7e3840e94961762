"""Velocities that kernels work out on their way: the bytes are those of the tensors that they stand for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from compactdist import codecs, kernels
from compactdist.kernels import restored, use
from compactdist.kernels.cpu import velocities
from compactdist.kernels.spec import MatrixView, Velocity
from compactdist.state import StreamConfig, StreamDecoder, StreamEncoder
from compactdist.state.adaptive import AdaptiveVelocity
from compactdist.state.history import ExactCell
from compactdist.state.matrix_view import blocks, plain
from compactdist.state.staged import Wanted
from tests.kernels import rounded
from tests.quick import quick_rows

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CODECS: tuple[dict[str, Any], ...] = (
    {"id": "binary"},
    {"id": "int4"},
    {"id": "int8", "scales": "block"},
    {"id": "int2", "scales": "token_history"},
    {"id": "topk"},
    {"id": "lowrank"},
    {"id": "transform", "bits": 1.0},
    {"id": "ternary"},
    {"id": "rates", "rungs": ["binary", "int8"]},
)
VIEWS = (plain(70 * 264, 1, 264), plain(3 * 65 * 65, 3, 65), blocks(128 * 6 + 8), rounded.VIEWS[4])
EVERY = [(codec, DTYPES[at % 3]) for at, codec in enumerate(CODECS)]


def extreme(numel: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Largest values of either sign, zeros of either sign, subnormals, and usual ones."""
    g = torch.Generator().manual_seed(seed)
    limits = torch.finfo(dtype)
    some = torch.tensor([limits.max, limits.min, 0.0, -0.0, limits.tiny / 4, -limits.tiny, limits.max / 2, 1.0])
    picked = some[torch.randint(len(some), (numel,), generator=g)]
    return torch.where(torch.rand(numel, generator=g) < 0.5, picked, torch.randn(numel, generator=g)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("coefficient", [0.4375, -1.0, 1.0, 0.0])
def test_a_velocity_by_itself(dtype: torch.dtype, coefficient: float) -> None:
    """From values that differ by more than float32 holds as well; over the tensor it is made from, too."""
    for numel in (1, 63, 64, 65, 70_001):
        base, previous = extreme(numel, dtype, 1), extreme(numel, dtype, 2)
        exact = (base.double() - previous.double()).clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
        made = []
        for which in ("reference", "cpu"):
            with use(which):  # type: ignore[arg-type]
                made.append(restored(Velocity(base, previous, coefficient)))
        assert torch.equal(*[one.view(torch.uint8) for one in made])
        assert made[0].isfinite().all()
        expected = (exact.float() * coefficient).to(dtype)
        assert torch.equal(made[0], expected)
        over = previous.clone()
        velocities.write_out(Velocity(base, over, coefficient), over)
        assert torch.equal(over.view(torch.uint8), made[0].view(torch.uint8))


def _steps(codec: dict[str, Any], view: MatrixView, dtype: torch.dtype, which: Any, *, as_tensor: bool) -> list[Tensor]:
    """Payloads and reconstructions of both ends, the receiver writing over the tensor that nobody needs any more."""
    made = []
    with use(which):
        ends = [codecs.get(codec).open(view, dtype, torch.device("cpu")) for _ in range(2)]
        assert ends[0].takes_velocity
        kept = [rounded.tensor(view.numel, dtype, seed) for seed in (0, 1)]
        for step in range(3):
            x = rounded.tensor(view.numel, torch.float32, 2 + step).mul_(0.2).add_(kept[1].float()).to(dtype)
            ours, theirs = (Velocity(kept[1], kept[0].clone(), -0.3125) for _ in range(2))
            payload = torch.empty(ends[0].payload_nbytes, dtype=torch.uint8)
            out = torch.full((view.numel,), torch.nan, dtype=dtype)
            got = out.clone() if as_tensor else theirs.previous
            second: list[Any] = [restored(ours), restored(theirs)] if as_tensor else [ours, theirs]
            ends[0].encode(x, (kept[1], second[0]), out, payload)
            ends[1].decode(payload, (kept[1], second[1]), got)
            for end in ends:
                end.commit()
            assert torch.equal(out, got)
            made += [one.view(torch.uint8).clone() for one in (payload, out, got)]
            kept = [kept[1], out]
    return made


@pytest.mark.parametrize(("codec", "dtype"), quick_rows(EVERY[1:3], EVERY), ids=str)
def test_same_bytes(codec: dict[str, Any], dtype: torch.dtype) -> None:
    for view in VIEWS:
        expected = _steps(codec, view, dtype, "cpu", as_tensor=True)
        assert all(map(torch.equal, expected, _steps(codec, view, dtype, "cpu", as_tensor=False)))


def test_the_reference_makes_a_tensor_of_it() -> None:
    for codec in CODECS[:2]:
        expected = _steps(codec, VIEWS[1], torch.float16, "reference", as_tensor=True)
        assert all(map(torch.equal, expected, _steps(codec, VIEWS[1], torch.float16, "reference", as_tensor=False)))


@pytest.mark.parametrize("order", [2, "auto"])
@pytest.mark.parametrize("codec", ["int4", "rates:rungs=scalar", "transform:bits=1"])
def test_no_tensor_is_made_of_it(order: Any, codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In steady streams of exact states; and a receiver writes over what it kept longest."""
    config, numel = StreamConfig(order, find_layout=False), 1 << 15
    chosen = codecs.get(codec)
    sender, receiver = StreamEncoder(config, 1, "here"), StreamDecoder(config, 1, "here")
    g = torch.Generator().manual_seed(0)
    x, change = torch.randn(2, numel, generator=g)
    into, places = torch.empty(numel, dtype=torch.bfloat16), set()
    for step in range(6):
        staged = sender.stage((x + 0.1 * step * change).bfloat16(), chosen, Wanted(step=step), keyframe=step == 0)
        receiver.decode(staged.frame, chosen, numel, torch.bfloat16, step=step, into=into)
        sender.commit(staged)
        assert all(map(torch.equal, sender.predictor.held, receiver.predictor.held))
        assert torch.equal(into, receiver.predictor.held[0])
        places |= {one.data_ptr() for one in receiver.predictor.held} if step else set()
        if step == 1:
            monkeypatch.setattr(kernels, "_velocities_for", None)
    assert len(places) == 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [300, 65_791, 65_793, 300_001])
def test_a_sender_chooses_as_the_reference_does(dtype: torch.dtype, numel: int) -> None:
    g = torch.Generator().manual_seed(numel)
    x, change, noise = torch.randn(3, numel, generator=g)
    for factor in (-1.7, -0.31, 0.0, 0.3, 0.93, math.inf):
        steps = [x, x + 0.1 * change, x + 0.1 * change + 0.02 * noise]
        steps[2] += 0.0 if math.isinf(factor) else 0.1 * factor * change
        tensors = [one.to(dtype) for one in steps]
        if math.isinf(factor):
            tensors[2][0] = math.inf
        predictor = AdaptiveVelocity(0.0, ExactCell)
        predictor.advance(tensors[0], ())
        predictor.advance(tensors[1], predictor.terms())
        chosen = []
        for which in ("reference", "cpu"):
            with use(which):  # type: ignore[arg-type]
                chosen.append(float(predictor.choose(tensors[2], 0.75)))
        assert chosen[0] == chosen[1]
        assert (chosen[0] == 0) == (factor == 0 or math.isinf(factor))
