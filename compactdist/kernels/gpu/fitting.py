"""What the sender of the transform codec does before and after it chooses levels, in Triton: residuals, the scales of
rows and components, and the first sections of a payload. Sums may differ from the reference's in their last bits.

Arguments are as in ``components.py``.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from compactdist.kernels.gpu.elements import (
    F32_MAX,
    INFINITY_BITS,
    bits_of,
    encode_bf16,
    expected,
    from_bits,
    magnitude_bits,
    places_of,
    read,
    round_half_even,
    to_nearest_bf16,
)


@triton.jit
def _residual(
    x,
    terms,
    row_at,
    column_at,
    row,
    channel,
    channels,
    numel,
    TERMS: tl.constexpr,
    PLACE: tl.constexpr,
):
    """Of some channels of a row; 0 where there is no element. All groups are one here, a program to a row."""
    at, ok = places_of(0, row, channel, row_at, column_at, tl.num_programs(0), channels, numel, PLACE)
    return tl.where(ok, read(x, at, ok) - expected(terms, at, ok, TERMS), 0.0)


@triton.jit
def largest_residuals(
    x,
    base,
    second,
    base_scales,
    second_scales,
    coefficient,
    row_at,
    column_at,
    largest,
    rows,
    channels,
    numel,
    TERMS: tl.constexpr,
    PLACE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The bits of the largest magnitude of each group, int32 ``(G,)``, zeros before; one row of one."""
    terms = (base, second, base_scales, second_scales, coefficient)
    row = tl.program_id(0)
    most = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, channels, CHUNK):
        channel = start + tl.arange(0, CHUNK)
        value = _residual(x, terms, row_at, column_at, row, channel, channels, numel, TERMS, PLACE)
        most = tl.maximum(most, magnitude_bits(value))
    tl.atomic_max(largest + row // rows, tl.max(most, axis=0))


@triton.jit
def take_in(
    x,
    base,
    second,
    base_scales,
    second_scales,
    coefficient,
    row_at,
    column_at,
    largest,
    matrix,
    squares,
    exponents,
    flag,
    rows,
    channels,
    numel,
    components,
    moderate,
    TERMS: tl.constexpr,
    PLACE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One row of residuals over a power of two that makes their squares moderate.

    Args:
        largest: of each group, as ``largest_residuals`` writes it. If it is not finite, residuals are zeros.
        matrix: receives them, float32 ``(G, R, K)``, zeros beyond the channels.
        squares: receives the sum of their squares, float32 ``(G, R)``.
        exponents: int32 ``(G,)``, receives those of the powers; 0 where magnitudes are within 2 to ``moderate``.
        flag: int32, set to 1 where something is not finite.
    """
    terms = (base, second, base_scales, second_scales, coefficient)
    row = tl.program_id(0)
    group = row // rows
    bits = tl.load(largest + group)
    finite = bits < INFINITY_BITS
    bits = tl.where(finite, bits, 0)
    tiny = bits < 0x800000  # subnormal, or none
    scaled = bits_of(from_bits(bits) * tl.where(tiny, 18446744073709551616.0, 1.0))
    exponent = tl.where(bits == 0, 0, (scaled >> 23) - tl.where(tiny, 190, 126))
    exponent = tl.where((exponent <= moderate) & (exponent >= -moderate), 0, exponent)
    half = (-exponent) >> 1
    power, rest = from_bits((half + 127) << 23), from_bits((127 - exponent - half) << 23)
    total = tl.zeros((CHUNK,), tl.float32)
    for start in range(0, components, CHUNK):
        channel = start + tl.arange(0, CHUNK)
        value = _residual(x, terms, row_at, column_at, row, channel, channels, numel, TERMS, PLACE)
        value = tl.where(finite, value, 0.0) * power * rest
        total += value * value
        tl.store(matrix + row * components + channel, value, mask=channel < components)
    tl.store(squares + row, tl.sum(total, axis=0))
    if row % rows == 0:
        tl.store(exponents + group, exponent)
        tl.store(flag, 1, mask=finite == 0)


@triton.jit
def _squares_of(squares, row, rows, parts):
    """Sums of all parts."""
    total = tl.load(squares + row, mask=row < rows, other=0)
    for part in range(1, parts):
        total += tl.load(squares + part * rows + row, mask=row < rows, other=0)
    return total


@triton.jit
def fit_rows(squares, payload, scale_of, scales, inverses, rows, parts, slope, nbytes, rows_at, PAIRS: tl.constexpr):
    """Codes of the rows of a group that even out their squares in part, see ``codecs/transform/coding.py``.

    Args:
        squares: of each row, float32 ``(G, parts, R)``, to be added up.
        payload: receives the codes, half a byte for each row.
        scale_of: of each code, float32 ``(16,)``.
        scales, inverses: float32 ``(G, R)``, receive their scales, and the inverses of these; 0 of 0.
        slope: steps of a code to a factor of two of squares.
        rows_at: where codes begin in a group's payload.
    """
    group = tl.program_id(0)
    of_group = group * rows
    total = tl.zeros((PAIRS, 2), tl.float32)
    for start in range(0, rows, 2 * PAIRS):
        row = start + 2 * tl.arange(0, PAIRS)[:, None] + tl.arange(0, 2)[None, :]
        total += _squares_of(squares + of_group * parts, row, rows, parts)
    total = tl.sum(tl.sum(total, axis=1, keep_dims=True), axis=0, keep_dims=True)
    mean = tl.maximum(tl.div_rn(total, tl.zeros((1, 1), tl.float32) + rows), 1e-30)
    mean = tl.broadcast_to(mean, (PAIRS, 2))
    for start in range(0, rows, 2 * PAIRS):
        row = start + 2 * tl.arange(0, PAIRS)[:, None] + tl.arange(0, 2)[None, :]
        ok = row < rows
        square = _squares_of(squares + of_group * parts, row, rows, parts)
        steps = tl.log2(tl.maximum(tl.div_rn(square, mean), 1e-30)) * slope
        code = tl.minimum(tl.maximum(round_half_even(steps) + 8.0, 1.0), 15.0).to(tl.int32)
        code = tl.where(square > 0, code, 0)
        scale = tl.load(scale_of + code)
        inverse = tl.div_rn(tl.full((PAIRS, 2), 1.0, tl.float32), tl.where(scale > 0, scale, 1.0))
        tl.store(scales + of_group + row, scale, mask=ok)
        tl.store(inverses + of_group + row, tl.where(scale > 0, inverse, 0.0), mask=ok)
        byte, both = start // 2 + tl.arange(0, PAIRS), tl.sum(code << (4 * tl.arange(0, 2)[None, :]), axis=1)
        tl.store(payload + group * nbytes + rows_at + byte, both.to(tl.uint8), mask=2 * byte < rows)


@triton.jit
def component_powers(
    turned,
    inverses,
    powers,
    rows,
    components,
    sampled,
    step,
    COMPONENTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The mean square of ``COMPONENTS`` components over rows that count, each over its row's scale.

    Args:
        turned: float32 ``(G, K, R)``.
        inverses: of the rows' scales, float32 ``(G, R)``.
        powers: float32 ``(G, K)``, receives them.
        sampled, step: how many rows count, and from one to the next.
    """
    parts = tl.cdiv(components, COMPONENTS)
    part, group = tl.program_id(0) % parts, tl.program_id(0) // parts
    component = part * COMPONENTS + tl.arange(0, COMPONENTS)
    inside = component < components
    total = tl.zeros((COMPONENTS, ROWS), tl.float32)
    for start in range(0, sampled, ROWS):
        index = start + tl.arange(0, ROWS)
        counts, row = index < sampled, index * step
        inverse = tl.load(inverses + group * rows + row, mask=counts, other=0)
        at = (group * components + component)[:, None] * rows + row[None, :]
        value = tl.load(turned + at, mask=inside[:, None] & counts[None, :], other=0) * inverse[None, :]
        total += value * value
    power = tl.div_rn(tl.sum(total, axis=1), tl.zeros((COMPONENTS,), tl.float32) + sampled)
    tl.store(powers + group * components + component, power, mask=inside)


@triton.jit
def weigh_rows(turned, weights, squares, rows, components, parts, COMPONENTS: tl.constexpr, ROWS: tl.constexpr):
    """Of ``ROWS`` rows, the sum of the squares of components times their weights, of every ``parts``-th few components.

    Args:
        turned: float32 ``(G, K, R)``.
        weights: float32 ``(G, K)``.
        squares: float32 ``(G, parts, R)``, receives the sums.
    """
    tiles = tl.cdiv(rows, ROWS)
    tile, of_part = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    part, group = of_part % parts, of_part // parts
    row = tile * ROWS + tl.arange(0, ROWS)
    known = row < rows
    total = tl.zeros((COMPONENTS, ROWS), tl.float32)
    for start in range(part * COMPONENTS, components, parts * COMPONENTS):
        component = start + tl.arange(0, COMPONENTS)
        weight = tl.load(weights + group * components + component, mask=component < components, other=0)[:, None]
        at = (group * components + component)[:, None] * rows + row[None, :]
        value = tl.load(turned + at, mask=(weight > 0) & known[None, :], other=0)
        total += value * value * weight
    tl.store(squares + of_part * rows + row, tl.sum(total, axis=0), mask=known)


@triton.jit
def write_scales(
    payload,
    energies,
    agreements,
    units,
    largest,
    exponents,
    width,
    blocks,
    tiles,
    nbytes,
    smallest,
    WIDTH: tl.constexpr,
):
    """The gain of a block and, with the first of a group, the largest amplitude.

    Args:
        energies, agreements: of components, float32 ``(G, tiles, K)``, see ``reference.components.choose``.
        units: what a level of 1 is of each, over the largest amplitude, float32 ``(G, K)``.
        largest: amplitude of each group, float32 ``(G,)``, to be multiplied by ``2**exponents``, int32 ``(G,)``.
        smallest: amplitude that is not sent as 0.
    """
    of_block = tl.program_id(0)
    group, block = of_block // blocks, of_block % blocks
    component, top = block * width + tl.arange(0, WIDTH), tl.load(largest + group)
    ok = tl.arange(0, WIDTH) < width
    energy, agreement = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
    for tile in range(tiles):
        at = (group * tiles + tile) * (blocks * width) + component
        energy += tl.load(energies + at, mask=ok, other=0)
        agreement += tl.load(agreements + at, mask=ok, other=0)
    unit = (tl.load(units + of_block * width + tl.arange(0, WIDTH), mask=ok, other=0) * top).to(tl.float64)
    wanted, sent = tl.sum(agreement.to(tl.float64) * unit, axis=0), tl.sum(energy.to(tl.float64) * unit * unit, axis=0)
    gain = tl.where((sent > 0) & (wanted > 0), wanted / tl.where(sent > 0, sent, 1.0), 0.0).to(tl.float32)
    code = encode_bf16(from_bits(to_nearest_bf16(bits_of(gain))))
    scales = payload + group * nbytes
    tl.store((scales + 4 + 2 * block).to(tl.pointer_type(tl.int16)), code.to(tl.int16))
    if block == 0:
        power = ((tl.load(exponents + group) + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)
        amplitude = tl.minimum(top.to(tl.float64) * power, F32_MAX).to(tl.float32)
        tl.store(scales.to(tl.pointer_type(tl.float32)), tl.where(amplitude < smallest, 0.0, amplitude))
