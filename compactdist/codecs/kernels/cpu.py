"""Fused steps of the scalar quantizers on CPU tensors: from x and base to payload and new base, and from payload and
base to new base, without a residual in memory.

The bytes are those of ``quantized.py`` on top of ``reference.py``. Passes over the elements are compiled loops
(``cpu_loops.py``); what is one value for a row, a channel or a group is left to the reference.

Work is split over as many threads as torch may use, in Python threads of our own, for the loops hold no interpreter
lock: Numba's own pools either do not survive a fork or abort when two threads call at a time. No result depends on
the split, since sums stay inside a tile.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compactdist.codecs.kernels import cpu_loops as loops
from compactdist.codecs.kernels import reference
from compactdist.codecs.kernels.cpu_elements import fold
from compactdist.codecs.layout import Layout

if TYPE_CHECKING:
    from compactdist.codecs.base import Cut
    from compactdist.codecs.quantized import ScalarQuantizer

__all__ = ["decode_residual", "encode_residual", "supports"]

_BITS = {torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.float16: torch.int16}
_INFINITY_BITS = 0x7F800000
_SAFE_BITS = (127 - 100) << 23, (127 + 100) << 23  # 2**-100 and 2**100
_LARGEST_STEP = 127
_PARALLEL_ELEMENTS = 1 << 16
_pool: tuple[int, int, ThreadPoolExecutor] | None = None


class Place(NamedTuple):
    """Where the elements of a matrix lie in a flat buffer.

    Row r of all groups together and channel ``chunk_at[k] + i`` are element ``row_at[r] + chunk_from[k] + i``, for
    ``i < chunk_len[k]``: channels are cut into chunks that are consecutive in memory. Elements from ``numel`` on do
    not exist and count as zero.
    """

    row_at: NDArray[np.int64]
    chunk_at: NDArray[np.int64]
    chunk_from: NDArray[np.int64]
    chunk_len: NDArray[np.int64]
    rows: int
    channels: int
    numel: int


@lru_cache(maxsize=64)
def place_of(cut: Cut) -> Place:
    """Work out where an arrangement's elements lie; the same arrangement is asked for at every step."""
    groups, rows, channels = cut.shape
    if cut.axes is None:
        row_at, column_at = np.arange(groups * rows, dtype=np.int64) * channels, np.arange(channels, dtype=np.int64)
    else:
        strides = [math.prod(cut.axes[i + 1 :]) for i in range(len(cut.axes))]
        leading, count = 0, 1
        while count < groups * rows:
            count *= cut.axes[cut.order[leading]]
            leading += 1
        row_at = _offsets(cut.axes, strides, cut.order[:leading])
        column_at = _offsets(cut.axes, strides, cut.order[leading:])
    breaks = np.flatnonzero(np.diff(column_at) != 1) + 1
    bounds = [0, *breaks.tolist(), channels]
    starts = [at for low, high in pairwise(bounds) for at in range(low, high, loops.WIDTH)]
    chunk_at = np.array(starts, dtype=np.int64)
    chunk_len = np.diff(np.append(chunk_at, channels))
    return Place(row_at, chunk_at, column_at[chunk_at], chunk_len, rows, channels, cut.numel)


def _offsets(axes: Sequence[int], strides: Sequence[int], chosen: Sequence[int]) -> NDArray[np.int64]:
    at = np.zeros(1, dtype=np.int64)
    for axis in chosen:
        at = (at[:, None] + np.arange(axes[axis], dtype=np.int64) * strides[axis]).reshape(-1)
    return at


def supports(codec: ScalarQuantizer, cut: Cut, *tensors: Tensor | None) -> bool:
    """Whether the fused steps apply: CPU tensors of one known dtype, and codes that fill whole bytes in every chunk."""
    given = [tensor for tensor in tensors if tensor is not None]
    if cut.numel == 0 or any(tensor.device.type != "cpu" for tensor in given):
        return False
    if given[0].dtype not in _BITS or any(tensor.dtype != given[0].dtype for tensor in given):
        return False
    ends = place_of(cut).chunk_len * codec.bits
    return not bool((ends % 8).any())


def _spread(work: Callable[[int, int], None], count: int, elements: int) -> None:
    """Run ``work(lo, hi)`` on consecutive parts of ``range(count)`` that cover it."""
    threads = min(torch.get_num_threads(), count) if elements >= _PARALLEL_ELEMENTS else 1
    bounds = [count * i // threads for i in range(threads + 1)]
    under_way = []
    for low, high in pairwise(bounds[1:]):
        try:
            under_way.append(_threads(threads).submit(work, low, high))
        except RuntimeError:  # the interpreter is on its way down and starts no more threads
            work(low, high)
    work(bounds[0], bounds[1])
    for one in under_way:
        one.result()


def _threads(wanted: int) -> ThreadPoolExecutor:
    """A pool of this process (a forked child needs its own) with at least ``wanted - 1`` threads."""
    global _pool
    if _pool is None or _pool[0] != os.getpid() or _pool[1] < wanted:
        _pool = os.getpid(), wanted, ThreadPoolExecutor(wanted - 1, thread_name_prefix="compactdist-codec")
    return _pool[2]


def _bits(x: Tensor | None, dtype: torch.dtype) -> NDArray[Any]:
    """A flat tensor as the array of bits the loops take; an empty one for none."""
    if x is None:
        x = torch.empty(0, dtype=dtype)
    bits: NDArray[Any] = x.detach().contiguous().view(_BITS[dtype]).numpy()
    return bits


def encode_residual(
    codec: ScalarQuantizer, x: Tensor, base: Tensor | None, cut: Cut, out: Tensor | None
) -> Tensor | None:
    """Encode ``x - base`` and, if ``out`` is given, write there what the receiver will hold.

    Returns:
        The payload, or ``None`` if the residual is not finite.
    """
    from compactdist.codecs import quantized as q

    layout, place = Layout.of(cut.shape, codec.bits), place_of(cut)
    groups, rows, _ = cut.shape
    source = _bits(x, x.dtype), _bits(base, x.dtype), tuple(place)
    by_rows = codec.fused == "linear"

    most, least = np.empty(groups * rows, np.uint32), np.empty(groups * rows, np.uint32)
    stat = torch.empty(groups, rows, 1)
    factors = np.ones(groups, np.float32)
    sums = bool(layout.row_scale_count) and not by_rows

    def statistics() -> None:
        flat = stat.view(-1).numpy()
        _spread(
            lambda lo, hi: loops.row_statistics(*source, factors, lo, hi, sums, flat, most, least),
            groups * rows,
            layout.elements,
        )

    statistics()
    largest = most.reshape(groups, rows).max(1)
    if int(largest.max()) >= _INFINITY_BITS:
        return None
    amax = torch.from_numpy(largest.view(np.float32)).view(groups, 1, 1)
    factor = reference.power_of_two_near_inverse(amax)
    factors = factor.view(-1).numpy()
    if sums:
        smallest = least.reshape(groups, rows).min(1).astype(np.float64)
        smallest = np.minimum(smallest + 1, _INFINITY_BITS).astype(np.uint32)  # of a group of zeros: any normal number
        scaled = (smallest.view(np.float32) * factors).view(np.uint32)
        low, high = _SAFE_BITS
        if int(largest.max()) < high and int(smallest.min()) > low and int(scaled.min()) > low:
            stat.mul_(factor)  # a power of two, and nothing near the ends of float32: the same as scaling before
        else:
            statistics()
    if by_rows:
        stat = torch.from_numpy(most.view(np.float32)).view(groups, rows, 1) * factor

    payload = torch.from_numpy(np.zeros(layout.total_nbytes, np.uint8))
    t = torch.ones(groups, rows, 1)
    if layout.row_scale_count:
        t_codes = reference.encode_ue5m3(reference.divide_or_zero(stat, stat.amax(1, keepdim=True)))
        payload[layout.row_scales_at :][: t_codes.numel()] = t_codes.reshape(-1)
        t = reference.decode_ue5m3(t_codes)
    c = _codes(codec, source, factors, t, layout, payload[: layout.codes_nbytes].numpy())
    c = c / factor
    c = torch.where(c < q.SMALLEST_SCALE, torch.zeros_like(c), c)
    c_bytes = reference.encode_bf16(c)
    payload[layout.channel_scales_at :][: c_bytes.numel()] = c_bytes
    if out is not None:
        decode_residual(codec, payload, base, cut, out)
    return payload


def _codes(
    codec: ScalarQuantizer,
    source: tuple[Any, ...],
    factors: NDArray[np.float32],
    t: Tensor,
    layout: Layout,
    packed: NDArray[np.uint8],
) -> Tensor:
    """Fill ``packed`` and return the channel scales, ``(G, 1, C)`` or ``(G, 1, 1)``."""
    from compactdist.codecs import quantized as q

    groups, rows, channels = layout.groups, layout.rows, layout.channels
    tiles = -(-rows // loops.TILE)
    one = torch.ones(())
    t_flat = t.view(-1).numpy()
    inverse_t = reference.divide_or_zero(one, t).view(-1).numpy()

    def by_tile(loop: Callable[..., None], *before: Any, after: Sequence[Any] = ()) -> tuple[Tensor, ...]:
        """Run a loop that leaves one or two rows of partial results for each tile."""
        partial = [np.empty(groups * tiles * channels, np.float32) for _ in range(1 if loop in single else 2)]
        _spread(
            lambda lo, hi: loop(*source, factors, *before, lo, hi, *after, *partial), groups * tiles, layout.elements
        )
        return tuple(torch.from_numpy(part).view(groups, tiles, channels) for part in partial)

    def total(partial: Tensor) -> Tensor:
        # not by torch, whose own threads would spin for a while afterwards and take the cores from ours
        for group in partial.view(groups, -1).numpy():
            fold(group, tiles * channels, channels)
        sums = partial[:, :1].contiguous()
        return reference.row_sums(sums) if layout.channel_scales_per_group == 1 else sums

    def by_channel(value: Tensor) -> NDArray[np.float32]:
        wide: NDArray[np.float32] = value.expand(groups, 1, channels).contiguous().view(-1).numpy()
        return wide

    single = (loops.sign_codes, loops.reaches)
    if codec.fused == "sign":
        (products,) = by_tile(loops.sign_codes, t_flat, after=(packed,))
        weights = reference.channel_sums(t * t).expand(groups, 1, channels)
        if layout.channel_scales_per_group == 1:
            weights = reference.row_sums(weights)
        else:
            weights = weights.contiguous()
        return q.storable_scale(reference.divide_or_zero(total(products), weights))
    if codec.fused == "linear":
        (reach,) = by_tile(loops.reaches, inverse_t)
        reach = torch.from_numpy(reach.numpy().max(1, keepdims=True))
        if layout.channel_scales_per_group == 1:
            reach = reach.amax(2, keepdim=True)
        c = q.storable_scale(reach / _LARGEST_STEP, up=True)
        inverse_c = by_channel(reference.divide_or_zero(one, c))
        limit = np.float32(_LARGEST_STEP)
        _spread(
            lambda lo, hi: loops.linear_codes(*source, factors, inverse_t, inverse_c, limit, lo, hi, packed),
            groups * rows,
            layout.elements,
        )
        return c
    borders, magnitudes = q.magnitude_table(codec)
    squares, sums = by_tile(loops.energies, t_flat)
    sigma = reference.divide_or_zero(total(squares), total(sums) * q.SIGMA_OF_MEAN_MAGNITUDE)
    inverse_c = by_channel(reference.divide_or_zero(one, sigma))
    products, weights = by_tile(loops.nearest_codes, t_flat, inverse_t, inverse_c, borders, magnitudes, after=(packed,))
    return q.storable_scale(reference.divide_or_zero(total(products), total(weights)))


def decode_residual(codec: ScalarQuantizer, payload: Tensor, base: Tensor | None, cut: Cut, out: Tensor) -> None:
    """Write ``base`` plus the decoded payload to ``out``, kept finite and rounded to its dtype; both may be one."""
    layout, place = Layout.of(cut.shape, codec.bits), place_of(cut)
    groups, rows, channels = cut.shape
    t = np.ones(groups * rows, np.float32)
    if layout.row_scale_count:
        t = reference.decode_ue5m3(payload[layout.row_scales_at :][: layout.row_scale_count]).numpy()
    per_group = layout.channel_scales_per_group
    c = reference.decode_bf16(payload[layout.channel_scales_at :][: 2 * groups * per_group]).view(groups, per_group)
    scales = c.expand(groups, channels).contiguous().view(-1).numpy()
    packed = payload[: layout.codes_nbytes].numpy()
    limit = np.float32(torch.finfo(out.dtype).max)
    target, before, table, at = _bits(out, out.dtype), _bits(base, out.dtype), codec.level_table(), tuple(place)
    _spread(
        lambda lo, hi: loops.apply_codes(packed, codec.bits, table, t, scales, before, at, limit, lo, hi, target),
        groups * rows,
        layout.elements,
    )
