"""What prediction and error feedback buy, over many frames."""

from __future__ import annotations

import pytest
import torch

from compactdist.state import StreamConfig
from tests.state import kit


def errors(sequence, **options):
    """NMSE of every frame."""
    encoder, decoder = kit.pair(**options)
    out = []
    for x in sequence:
        y = decoder.decode(encoder.encode(x)).float()
        kit.check_in_step(encoder, decoder)
        out.append(float((y - x.float()).square().sum() / x.float().square().sum()))
    return out


def wander(steps, n=3000, pace=0.1, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=g)
    for _ in range(steps):
        yield x
        x = x + pace * torch.randn(n, generator=g)


@pytest.mark.parametrize("codec", kit.LOSSY)
@pytest.mark.parametrize("order", [1, 2, "auto"])
def test_error_of_a_resting_tensor_dies_out(codec, order):
    start, x = torch.randn(2, 2000)
    error = errors([start, *[x] * 20], codec=codec, order=order, keyframe="raw")
    assert error[0] == 0
    assert error[1] > 0
    assert error[5] < 0.5 * error[1]
    assert error[20] < 0.05 * error[1]


@pytest.mark.parametrize("codec", kit.LOSSY)
def test_feedback_beats_the_open_loop(codec):
    closed = errors(wander(40), codec=codec, keyframe="raw")
    open_loop = errors(wander(40), codec=codec, error_feedback=False, keyframe="raw")
    assert sum(closed[20:]) < 0.5 * sum(open_loop[20:])
    assert open_loop[39] > 3 * open_loop[2], "without feedback the error grows"
    assert max(closed[20:]) < 2 * max(closed[2:20]) + 1e-9, "with feedback it does not"


def test_prediction_beats_none():
    assert sum(errors(wander(20), codec="int2")) < 0.2 * sum(errors(wander(20), codec="int2", order=0))


@pytest.mark.parametrize("codec", ["int2", "int4", "int8"])
def test_velocity_beats_the_last_value_on_a_ramp(codec):
    start, slope = torch.randn(2, 2000)
    ramp = [start + t * slope for t in range(30)]
    first, second = errors(ramp, codec=codec, order=1), errors(ramp, codec=codec, order=2, damping=0.8)
    assert sum(second[10:]) < 0.5 * sum(first[10:])


def test_damping_zero_is_order_one():
    one = errors(wander(10), codec="int4", order=1)
    two = errors(wander(10), codec="int4", order=2, damping=0.0)
    assert one == two


def test_one_bit_with_velocity_is_stable():
    error = errors(wander(200, n=1000), codec="binary", order=2, damping=0.5)
    assert max(error[100:]) < 2 * max(error[1:50])


@pytest.mark.parametrize("codec", kit.LOSSY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_reaches_its_own_rounding(codec, dtype):
    """The history is kept in the tensor's dtype, so a resting tensor is reached to within its rounding."""
    start, x = torch.randn(2, 2000).to(dtype)
    error = errors([start, *[x] * 60], codec=codec)
    assert error[-1] < torch.finfo(dtype).eps ** 2 + 0.02 * error[1]


def test_warmup_frames_are_exact_or_coded():
    error = errors(wander(6), codec="binary", warmup_steps=4, keyframe="raw")
    assert error[:4] == [0, 0, 0, 0]
    assert error[4] > 0
    coded = errors(wander(6), codec="binary", warmup_steps=4)
    assert 0 < max(coded[:4]) < 1e-4
    assert coded[4] == pytest.approx(error[4], rel=0.05)


@pytest.mark.parametrize("codec", kit.LOSSY)
@pytest.mark.parametrize("order", [1, 2, "auto"])
def test_a_coded_keyframe_is_corrected_by_the_residuals(codec, order):
    """After a few frames of a resting tensor nothing is left of its keyframe's error."""
    x = torch.randn(2000)
    error = errors([x] * 20, codec=codec, order=order)
    assert 1e-6 < error[0] < 1e-4
    assert error[19] < 0.05 * error[0]


def test_in_the_open_loop_the_error_of_a_coded_keyframe_stays():
    error = errors([torch.randn(2000)] * 10, codec="int8", error_feedback=False)
    assert error[9] == pytest.approx(error[0], rel=0.01)


def test_an_empty_tensor_of_odd_strides_can_be_a_residual():
    encoder, decoder = kit.pair(codec="binary", warmup_steps=0)
    for x in (torch.zeros(0), torch.zeros(0, 2)[:, 1], torch.zeros(0)):
        assert decoder.decode(encoder.encode(x)).shape == (0,)
        kit.check_in_step(encoder, decoder)


@pytest.mark.parametrize("state", ["exact", "int8"])
def test_damping_may_be_a_whole_number(state):
    encoder, decoder = kit.pair(codec="int4", order=2, damping=1, state=state)
    assert encoder.config == StreamConfig(2, 1.0, state=state)
    x = torch.randn(128, 256)
    for step in range(4):
        decoder.decode(encoder.encode(x + 0.1 * step))
        kit.check_in_step(encoder, decoder)
