"""The layout found from the numbers alone: the planted one, and never one that is worse than blocks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from compactdist import codecs
from compactdist.state import ResidualDecoder, ResidualEncoder, blocks
from compactdist.state.find_view import find_view
from compactdist.wire import unpack


def planted(groups: int, rows: int, channels: int, spread: float, seed: int) -> torch.Tensor:
    """Gaussian (groups, rows, channels) whose channels' log energies differ at random, per group."""
    g = torch.Generator().manual_seed(seed)
    scale = (torch.randn(groups, 1, channels, generator=g) * spread).exp()
    return (torch.randn(groups, rows, channels, generator=g) * scale).reshape(-1)


def gap(x: torch.Tensor, view) -> float:
    """dB above what a Gaussian source of these bits must have: 6.02 dB per bit sent, and the error."""
    codec = codecs.get("binary")
    payload = codec.encode(view.to_matrix(x))
    y = view.to_flat(codec.decode(payload, view.shape, torch.float32))
    nmse = float((y - x).square().sum() / x.square().sum())
    return 6.0206 * 8 * payload.numel() / x.numel() + 10 * math.log10(nmse)


@settings(max_examples=60)
@given(
    groups=st.sampled_from([1, 2, 3]),
    rows=st.integers(64, 300),
    channels=st.sampled_from([24, 40, 48, 80, 96, 100, 144, 192]),  # blocks of 128 hold 32 or 64 as they are
    spread=st.floats(1.0, 2.0),
    seed=st.integers(0, 2**32 - 1),
)
def test_strongly_unequal_channels_are_found_exactly(groups, rows, channels, spread, seed):
    """With random energies no divisor of the channel count repeats them, and a multiple only pays for more scales.

    Fewer rows would not pay for a scale per channel, and buffers below 4,096 elements are not searched.
    """
    assume(groups * rows * channels >= 4096)
    x = planted(groups, rows, channels, spread, seed)
    found = find_view(x)
    assert found.channels == channels
    assert gap(x, found) < gap(x, blocks(x.numel()))


@settings(max_examples=30)
@given(
    groups=st.sampled_from([2, 3, 4]),
    rows=st.sampled_from([128, 192, 250]),
    channels=st.sampled_from([48, 80, 96, 144]),
    seed=st.integers(0, 2**32 - 1),
)
def test_groups_with_different_energies_are_separated(groups, rows, channels, seed):
    """Groups found may subdivide the planted ones, but never straddle two of them."""
    found = find_view(planted(groups, rows, channels, 1.5, seed))
    assert found.channels == channels
    assert found.groups % groups == 0


@settings(max_examples=40)
@given(numel=st.integers(2048, 70_000), seed=st.integers(0, 2**32 - 1))
def test_noise_never_gets_a_costly_layout(numel, seed):
    """Nothing to be found: what is chosen codes about as well as blocks, for about as many bits."""
    x = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    assert gap(x, find_view(x)) <= gap(x, blocks(numel)) + 0.15


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-38, 1e38])
def test_constants_keep_the_default(value):
    found = find_view(torch.full((4096,), value))
    assert found.shape == blocks(4096).shape


@pytest.mark.parametrize("numel", [0, 1, 100, 2047, 4099])
def test_small_and_prime_sizes_keep_the_default(numel):
    assert find_view(torch.randn(numel)).shape == blocks(numel).shape


@pytest.mark.parametrize("codec", ["binary", "int2"])
def test_announced_in_one_frame_and_used_from_the_next(codec):
    groups, rows, channels = 2, 96, 48
    encoder, decoder = ResidualEncoder(codec), ResidualDecoder(codec)
    headers = []
    for t in range(4):
        frame = encoder.encode(planted(groups, rows, channels, 1.5, seed=t))
        headers.append(unpack(frame, "here"))
        decoder.decode(frame)
        assert torch.equal(encoder.state, decoder.state)
    numel = groups * rows * channels
    key, first, second, third = headers
    assert key.is_keyframe
    assert (key.next_groups, key.next_channels) == (0, 0)
    assert (first.groups, first.rows, first.channels) == blocks(numel).shape
    assert first.next_channels == channels
    for header in (second, third):
        assert (header.groups, header.channels) == (first.next_groups, channels)
        assert (header.next_groups, header.next_channels) == (0, 0)


def test_a_found_layout_improves_one_bit():
    def error(find: bool) -> float:
        encoder, decoder = (
            ResidualEncoder("binary", find_layout=find),
            ResidualDecoder("binary", find_layout=find),
        )
        total = 0.0
        for t in range(6):
            x = planted(1, 200, 96, 1.5, seed=7) * (1 + 0.3 * t) + planted(1, 200, 96, 1.5, seed=7 + t)
            x_hat = decoder.decode(encoder.encode(x))
            total += float((x_hat - x).square().sum()) if t > 1 else 0.0
        return total

    assert error(True) < 0.7 * error(False)


def test_find_layout_off_announces_nothing():
    encoder = ResidualEncoder("binary", find_layout=False)
    for t in range(3):
        header = unpack(encoder.encode(planted(2, 96, 48, 1.5, seed=t)), "here")
        assert (header.next_groups, header.next_channels) == (0, 0)
