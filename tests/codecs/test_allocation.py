"""Bits by energy: the levels, the sharing out, the wire format read by a second decoder, and what it is good for."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from compactdist import codecs
from compactdist.codecs.lowrank.allocation import allocate
from compactdist.codecs.scalar.gaussian_levels import LOSS, MAGNITUDES
from compactdist.errors import CodecConfigError, PayloadError
from tests.codecs import kit


def energy(rank: int):
    return codecs.get("lowrank_int4", rank=rank, allocation="energy")


@pytest.mark.parametrize("bits", MAGNITUDES)
def test_levels_are_the_lloyd_max_fixed_point(bits):
    """Each is the mean of its cell; the Gaussian has one such set only, its logarithm being concave."""
    levels = MAGNITUDES[bits]
    assert len(levels) == 2 ** (bits - 1)
    borders = [0.0, *((a + b) / 2 for a, b in pairwise(levels)), math.inf]
    kept = 0.0
    for level, (a, b) in zip(levels, pairwise(borders), strict=True):
        mass = (math.erfc(a / math.sqrt(2)) - math.erfc(b / math.sqrt(2))) / 2
        moment = (math.exp(-a * a / 2) - math.exp(-b * b / 2)) / math.sqrt(2 * math.pi)
        assert level == pytest.approx(moment / mass, abs=1e-9)
        kept += 2 * mass * level**2
    assert LOSS[bits] == pytest.approx(1 - kept, abs=1e-9)


@pytest.mark.parametrize("planes", [1, 8, 17])
def test_allocation_is_the_best_there_is(planes):
    """Against every way to give at most three bits each to four components, and bit by bit for more."""
    for seed in range(5):
        energies = torch.rand(8, generator=torch.Generator().manual_seed(seed)).pow(4)
        bits = [0] * 8

        def left(k: int, b: int, energies=energies) -> float:
            return float(energies[k]) * (1 - (1 - LOSS[b]) ** 2)

        for _ in range(planes):
            k = max((k for k in range(8) if bits[k] < 6), key=lambda k: left(k, bits[k]) - left(k, bits[k] + 1))
            bits[k] += 1
        assert allocate(energies, planes).tolist() == bits


def test_energies_of_zero_get_what_must_be_placed():
    assert int(allocate(torch.zeros(3), 12).sum()) == 12
    assert int(allocate(torch.zeros(3), 12).max()) <= 6


def decode_with_numpy(payload: bytes, shape: tuple[int, int, int], rank: int) -> np.ndarray:
    """From the class's description alone."""
    groups, rows, channels = shape
    r = min(rank, rows, channels)
    n = min(2 * r, rows, channels)

    def after(at: int, nbytes: int) -> int:
        return at + math.ceil(nbytes / 16) * 16

    def bf16(at: int, count: int) -> np.ndarray:
        return (np.frombuffer(payload, "<u2", count, at).astype("<u4") << 16).view("<f4")

    gain, at = bf16(0, groups), after(0, 2 * groups)
    counts, at = np.frombuffer(payload, "<u2", 6 * groups, at).reshape(groups, 6), after(at, 12 * groups)
    scales, at = bf16(at, groups * n).reshape(groups, n), after(at, 2 * groups * n)
    factors = []
    for length in (rows, channels):
        nbytes = math.ceil(groups * 4 * r * length / 8)
        bits = np.unpackbits(np.frombuffer(payload, np.uint8, nbytes, at), bitorder="little")
        at, place = after(at, nbytes), 0
        factor = np.zeros((groups, n, length), np.float32)
        for g in range(groups):
            k = 0
            for width, count in zip(range(6, 0, -1), counts[g], strict=True):
                levels = np.array([*MAGNITUDES[width], *(-level for level in MAGNITUDES[width])], np.float32)
                for _ in range(count):
                    planes = bits[place : place + width * length].reshape(width, length)
                    factor[g, k] = levels[(planes.T.astype(int) << np.arange(width)).sum(1)]
                    place, k = place + width * length, k + 1
        factors.append(factor)
    assert at == len(payload)
    y = np.zeros(shape, np.float32)
    for k in range(n):
        y = y + (scales[:, k, None] * factors[0][:, k])[:, :, None] * factors[1][:, k][:, None, :]
    y = np.where(np.abs(y) < 2.0**-30, np.float32(0), y) * gain[:, None, None]
    return y


@pytest.mark.parametrize(("shape", "rank"), [((1, 40, 70), 3), ((2, 33, 19), 8), ((3, 2, 64), 4), ((1, 1, 1), 1)])
def test_decoder_follows_the_description(shape, rank):
    for name in ("gaussian", "hot_cross", "zero", "channel_scaled"):
        x = kit.sample(name, shape)
        payload = energy(rank).encode(x)
        expected = decode_with_numpy(payload.numpy().tobytes(), shape, rank)
        assert torch.equal(energy(rank).decode(payload, shape, torch.float32), torch.from_numpy(expected))


def test_counts_that_do_not_add_up_are_refused():
    x = kit.sample("gaussian", (40, 70))
    payload = energy(4).encode(x)
    payload[16 + 2] += 1
    with pytest.raises(PayloadError, match="take 21 bit planes of 16"):
        energy(4).decode(payload, x.shape, x.dtype)


def test_as_large_as_with_equal_bits():
    """At [1088, 3072]: one section of 16 bytes more."""
    shape = (1088, 3072)
    equal = codecs.get("lowrank_int4").payload_nbytes(shape, torch.float16)
    assert energy(32).payload_nbytes(shape, torch.float16) == equal + 16


@pytest.mark.parametrize("decay", [0.6, 0.9, 1.0])
def test_better_than_equal_bits(decay):
    """On steep spectra strong components get more bits, on flat ones more components get some."""
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(120, 30, generator=g), torch.randn(30, 140, generator=g)
    x = left * decay ** torch.arange(30) @ right
    assert kit.nmse(energy(8), x) < 0.9 * kit.nmse(codecs.get("lowrank_int4", rank=8), x)


def test_the_default_is_what_it_was():
    assert codecs.get("lowrank_int4", allocation="equal") == codecs.get("lowrank_int4")
    with pytest.raises(CodecConfigError, match="allocation must be one of 'equal', 'energy', got 'none'"):
        codecs.get("lowrank_int4", allocation="none")
