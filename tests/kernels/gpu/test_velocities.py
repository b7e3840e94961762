"""Velocities on a device: the reference's bits, and the reference's choice of a coefficient."""

from __future__ import annotations

import math
import struct

import pytest
import torch

from compactdist.kernels import device_velocities_for, restored, use
from compactdist.kernels.spec import Velocity
from compactdist.state.adaptive import GRID, LARGEST, AdaptiveVelocity
from compactdist.state.history import ExactCell
from tests.kernels.gpu import kit
from tests.kernels.test_velocities import DTYPES, extreme

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("said", [True, False])
def test_a_velocity_by_itself(dtype: torch.dtype, said: bool) -> None:
    """``said``: only the device knows the coefficient."""
    for numel in (1, 65, 5000, 70_001):
        base, previous = (extreme(numel, dtype, seed).to(kit.DEVICE) for seed in (1, 2))
        for factor in (0.4375, -1.0, -0.0625, 0.0):
            coefficient = torch.tensor(factor, device=kit.DEVICE) if said else factor
            made = []
            for kernels in ("reference", "gpu"):
                with use(kernels):  # type: ignore[arg-type]
                    made.append(restored(Velocity(base, previous, coefficient)).cpu().view(torch.uint8))
            assert torch.equal(*made), (numel, factor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [300, 65_791, 65_793, 300_000])
def test_a_sender_chooses_as_the_reference_does(dtype: torch.dtype, numel: int) -> None:
    g = torch.Generator().manual_seed(numel)
    x, change = torch.randn(2, numel, generator=g)
    for factor in (-1.7, -0.9, -0.3, 0.0, 0.03, 0.3, 0.6, 1.2, math.inf):
        steps = [x, x + 0.1 * change, x + (0.1 + 0.1 * (0 if math.isinf(factor) else factor)) * change]
        steps = [one.to(dtype).to(kit.DEVICE) for one in steps]
        if math.isinf(factor):
            steps[2][0] = math.inf
        predictor = AdaptiveVelocity(0.0, ExactCell)
        chosen = []
        for kernels in ("reference", "gpu"):
            predictor.clear()
            predictor.advance(steps[0], ())
            predictor.advance(steps[1], predictor.terms())
            with use(kernels):  # type: ignore[arg-type]
                chosen.append(predictor.choose(steps[2], 0.75).item())
        assert chosen[0] == chosen[1]
        assert math.copysign(1, chosen[1]) == math.copysign(1, chosen[0])
        assert (chosen[1] == 0) == (abs(factor) < 0.05 or math.isinf(factor))


@pytest.mark.parametrize("knows", [True, False])
def test_a_receiver_takes_what_a_frame_may_say(knows: bool) -> None:
    predictor, out = AdaptiveVelocity(0.0, ExactCell), torch.zeros((), device=kit.DEVICE)
    if knows:
        predictor.advance(torch.zeros(8, device=kit.DEVICE), ())
    for said in (0.0, 0.0625, -1.0, 1.0, 1.0625, 0.03, math.nan, math.inf, -math.inf, 1e-40, 1e30):
        frame = torch.zeros(128, dtype=torch.uint8)
        frame[88:92] = torch.frombuffer(bytearray(struct.pack("<f", said)), dtype=torch.uint8)
        taken = []
        for kernels in ("reference", "gpu"):
            with use(kernels):  # type: ignore[arg-type]
                assert (device_velocities_for(1, torch.float32, kit.DEVICE) is not None) == (kernels == "gpu")
                taken.append(predictor.accept(frame.to(kit.DEVICE), 88, out.fill_(7)).item())
        may = knows and abs(said) <= LARGEST and said * GRID == round(said * GRID)
        assert taken == [said if may else 0.0] * 2, said
