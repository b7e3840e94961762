"""The primitives against oracles that share no code with them."""

from __future__ import annotations

import math
import struct
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compactdist.codecs import Fp8, Int2, Int3, Int4
from compactdist.codecs.scalar.fp8 import encode_units, unit_levels
from compactdist.kernels import reference as kernels

bounded = settings(max_examples=60, deadline=None, derandomize=True)


def ue5m3(code: int) -> float:
    return 0.0 if code == 0 else (8 + code % 8) / 8 * 2.0 ** (code // 8 - 31)


def float_bits(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


def test_ue5m3_decodes_every_code():
    decoded = kernels.decode_ue5m3(torch.arange(256).to(torch.uint8))
    assert decoded.tolist() == [ue5m3(code) for code in range(256)]
    assert ue5m3(248) == 1.0
    for code in range(1, 256):
        assert float_bits(ue5m3(code)) == (code + (96 << 3)) << 20


def test_ue5m3_encodes_every_value_and_every_midpoint():
    grid = np.array([ue5m3(code) for code in range(256)], dtype=np.float32)
    assert kernels.encode_ue5m3(torch.from_numpy(grid)).tolist() == list(range(256))
    middle = ((grid[:-1].astype(np.float64) + grid[1:]) / 2).astype(np.float32)
    below, above = np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(2))
    assert kernels.encode_ue5m3(torch.from_numpy(middle)).tolist() == list(range(1, 256))
    assert kernels.encode_ue5m3(torch.from_numpy(below)).tolist() == list(range(255))
    assert kernels.encode_ue5m3(torch.from_numpy(above)).tolist() == list(range(1, 256))
    edge = torch.tensor([0.0, 1e-45, 1e-30, 2.0, 3e38])
    assert kernels.encode_ue5m3(edge).tolist() == [0, 0, 0, 255, 255]


def test_ue5m3_is_nearest():
    value = 2.0 ** np.random.default_rng(0).uniform(-34, 0.9, 5000)
    grid = np.array([ue5m3(code) for code in range(256)])
    value = value.astype(np.float32)
    nearest = np.abs(value.astype(np.float64)[:, None] - grid).argmin(1)
    assert kernels.encode_ue5m3(torch.from_numpy(value)).tolist() == nearest.tolist()


def test_bf16_rounding():
    bits = torch.randint(0, 0x7F7F0000, (20000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    halves = torch.arange(0, 200, dtype=torch.int32) * 0x8000 + 0x3F800000
    value = torch.cat([bits, halves, torch.tensor([0, 1, 0x8000, 0x8001], dtype=torch.int32)]).view(torch.float32)
    assert torch.equal(kernels.round_bf16(value), value.to(torch.bfloat16).float())
    up = kernels.round_bf16(value, up=True)
    assert bool((up >= value).all())
    exact = value.to(torch.bfloat16).float() == value
    assert torch.equal(up[exact], value[exact])
    down = (up.view(torch.int32) - 0x10000).view(torch.float32)
    assert bool((down[~exact] < value[~exact]).all())


def test_bf16_bytes():
    value = torch.tensor([0.0, 1.0, 2.0**-87, 3.3895313892515355e38, math.inf])
    data = kernels.encode_bf16(value)
    assert data.tolist() == [0, 0, 0x80, 0x3F, 0x00, 0x14, 0x7F, 0x7F, 0x7F, 0x7F]
    assert torch.equal(kernels.decode_bf16(data), value.clamp(max=3.3895313892515355e38))


@bounded
@given(bits=st.sampled_from([1, 2, 3, 4, 8]), data=st.data())
def test_packing(bits, data):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=40))
    packed = kernels.pack_codes(torch.tensor(codes, dtype=torch.uint8), bits)
    as_number = sum(code << (bits * i) for i, code in enumerate(codes))
    assert bytes(packed.tolist()) == as_number.to_bytes(-(-len(codes) * bits // 8), "little")
    assert kernels.unpack_codes(packed, bits, len(codes)).tolist() == codes
    levels = [float(code * code - 7) for code in range(2**bits)]
    assert kernels.unpack_levels(packed, levels, bits, len(codes)).tolist() == [levels[code] for code in codes]


@bounded
@given(trits=st.lists(st.integers(0, 2), max_size=40))
def test_packing_of_trits(trits):
    packed = kernels.pack_trits(torch.tensor(trits, dtype=torch.uint8))
    as_numbers = [sum(trit * 3**i for i, trit in enumerate(trits[at : at + 5])) for at in range(0, len(trits), 5)]
    assert packed.tolist() == as_numbers
    levels = (0.0, 2.5, -1.0)
    assert kernels.unpack_trit_levels(packed, levels, len(trits)).tolist() == [levels[trit] for trit in trits]


@pytest.mark.parametrize(
    ("form", "dtype", "unit", "largest"),
    [("e4m3", torch.float8_e4m3fn, 2.0**-9, 448.0), ("e5m2", torch.float8_e5m2, 2.0**-16, 57344.0)],
)
def test_fp8_codes_are_those_of_torch(form, dtype, unit, largest):
    grid = torch.arange(0x7F if form == "e4m3" else 0x7C).to(torch.uint8).view(dtype).float()
    middle = (grid[1:] + grid[:-1]) / 2
    spread = torch.exp(torch.rand(5000, generator=torch.Generator().manual_seed(0)) * 30 - 24).clamp(max=largest)
    value = torch.cat([grid, middle, spread])
    assert torch.equal(encode_units(value / unit, form), value.to(dtype).view(torch.uint8))
    assert encode_units(torch.tensor([1e30]), form).item() == int(grid.numel()) - 1
    codec = Fp8(format=form)
    payload = codec.encode(torch.cat([grid, -grid])[:128])
    levels = torch.tensor(unit_levels(form))
    assert torch.equal(levels[: grid.numel()] * unit, grid)
    assert torch.equal(levels[128 : 128 + grid.numel()], -levels[: grid.numel()])
    assert payload.numel() == 128 + 16


def test_signed_bf16_bytes():
    value = torch.tensor([0.0, -1.0, 2.0**-87, -3.3895313892515355e38, -math.inf])
    data = kernels.encode_signed_bf16(value)
    assert data.tolist() == [0, 0, 0x80, 0xBF, 0x00, 0x14, 0x7F, 0xFF, 0x7F, 0xFF]
    assert torch.equal(kernels.decode_bf16(data), value.clamp(min=-3.3895313892515355e38))


def test_uniform_steps_are_the_best():
    """The error of equally spaced levels must not fall when the step is moved to either side."""

    def error(step: float, count: int) -> float:
        def pdf(x: float) -> float:
            return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

        def tail(x: float) -> float:
            return math.erfc(x / math.sqrt(2)) / 2

        borders = [*(i * step for i in range(count)), math.inf]
        cells = [((i + 0.5) * step, a, b) for i, (a, b) in enumerate(pairwise(borders))]
        return 1 + 2 * sum(y * y * (tail(a) - tail(b)) - 2 * y * (pdf(a) - pdf(b)) for y, a, b in cells)

    for codec, loss in ((Int2, 0.1188460504), (Int3, 0.0374396594), (Int4, 0.0115428844)):
        step, count = codec.uniform_step, len(codec.magnitudes)
        assert error(step, count) == pytest.approx(loss, abs=1e-9)
        assert error(step, count) < min(error(step - 1e-5, count), error(step + 1e-5, count))
        assert codec(centroids="uniform").magnitudes[0] == step / 2


def fold(values: list[np.ndarray]) -> np.ndarray:
    if len(values) == 1:
        return values[0]
    half = 1
    while half * 2 < len(values):
        half *= 2
    paired = [a + b for a, b in zip(values[:half], values[half:], strict=False)]
    return fold(paired + values[len(paired) : half])


def in_turn(values: list[np.ndarray]) -> np.ndarray:
    """Their sum from the first to the last, every step rounded to float32."""
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


@pytest.mark.parametrize("rows", [1, 2, 3, 31, 32, 33, 63, 64, 97, 200, 1000])
@pytest.mark.parametrize("columns", [1, 5, 64, 65, 200])
def test_sums_run_in_the_stated_order(rows, columns):
    x = np.random.default_rng(rows).standard_normal((2, rows, columns)).astype(np.float32)
    x *= 10.0 ** np.random.default_rng(1).integers(-6, 6, x.shape).astype(np.float32)
    x = x.astype(np.float32)
    got_rows = kernels.row_sums(torch.from_numpy(x)).numpy()
    got_channels = kernels.channel_sums(torch.from_numpy(x)).numpy()
    for group in range(2):
        lanes = [in_turn([x[group, :, j] for j in range(lane, columns, 64)]) for lane in range(min(64, columns))]
        assert got_rows[group, :, 0].tolist() == fold(lanes).tolist()
        tiles = [in_turn(list(x[group, at : at + 64])) for at in range(0, rows, 64)]
        assert got_channels[group, 0].tolist() == fold(tiles).tolist()


def test_power_of_two_near_inverse():
    value = torch.tensor([0.0, 1e-45, 1e-38, 1e-20, 0.75, 1.0, 1.5, 2.0, 1e20, 3.4028234663852886e38])
    factor = kernels.power_of_two_near_inverse(value)
    assert bool(torch.isfinite(factor).all())
    assert all(math.frexp(each)[0] == 0.5 for each in factor.tolist())
    product = value * factor
    assert bool((product < 4).all())
    assert bool((product[2:] >= 0.99).all())


def test_divide_or_zero():
    top, bottom = torch.tensor([0.0, 1.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 4.0, 2.0])
    assert kernels.divide_or_zero(top, bottom).tolist() == [0.0, 0.0, 0.25, 0.0]


@pytest.mark.parametrize(("codec", "loss"), [(Int2, 0.1174818478), (Int3, 0.0345477608), (Int4, 0.0095010080)])
def test_levels_are_the_lloyd_max_fixed_point(codec, loss):
    def pdf(x: float) -> float:
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    def tail(x: float) -> float:
        return math.erfc(x / math.sqrt(2)) / 2

    count = len(codec.magnitudes)
    levels = [(i + 0.5) * 3 / count for i in range(count)]
    for _ in range(3000):
        borders = [0.0, *((a + b) / 2 for a, b in pairwise(levels)), math.inf]
        cells = list(pairwise(borders))
        levels = [(pdf(a) - pdf(b)) / (tail(a) - tail(b)) for a, b in cells]
    assert codec.magnitudes == pytest.approx(levels, abs=1e-9)
    kept = 2 * sum(level**2 * (tail(a) - tail(b)) for level, (a, b) in zip(levels, cells, strict=True))
    assert 1 - kept == pytest.approx(loss, abs=1e-9)
