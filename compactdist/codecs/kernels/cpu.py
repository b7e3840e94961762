"""Fused steps of the scalar quantizers on CPU tensors: from x and base to payload and new base, and from payload and
base to new base, without a residual in memory.

The bytes are those of ``quantized.py`` on top of ``reference.py``. Passes over the elements are compiled loops
(``cpu_loops.py``, ``cpu_blocks.py``); ``cpu_settle.py`` makes the scales between them. Where values come
near the ends of float32 the steps decline, and the reference does the work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compactdist.codecs import scales
from compactdist.codecs.kernels import cpu_blocks, reference
from compactdist.codecs.kernels import cpu_loops as loops
from compactdist.codecs.kernels import cpu_surveys as surveys
from compactdist.codecs.kernels.cpu_common import BIT_TYPES, bits_of, expectation, loop_bits, pack_apart, place_for
from compactdist.codecs.kernels.cpu_decode import decode_residual
from compactdist.codecs.kernels.cpu_settle import LINEAR, NEAREST, SIGN, TRITS, settle_channels, settle_rows
from compactdist.codecs.kernels.places import Place
from compactdist.codecs.kernels.threads import spread
from compactdist.codecs.layout import Layout

if TYPE_CHECKING:
    from compactdist.codecs.base import Cut
    from compactdist.codecs.quantized import ScalarQuantizer

__all__ = ["decode_residual", "encode_residual", "supports"]

_LARGEST_STEP = np.float32(127)
_KINDS = {"sign": SIGN, "nearest": NEAREST, "trits": TRITS, "linear": LINEAR}


class _Call(NamedTuple):
    codec: ScalarQuantizer
    layout: Layout
    place: Place
    source: tuple[NDArray[Any], NDArray[Any], NDArray[Any], int]
    packed: NDArray[np.uint8]
    out: NDArray[Any]
    limit: np.float32

    @property
    def bits(self) -> int:
        """Width of the codes that the loops write."""
        return loop_bits(self.codec, self.place)

    def over_rows(self, loop: Callable[..., None], *before: Any) -> None:
        """Run a loop that goes by rows, all of them."""
        count, size = self.place.row_at.size, self.layout.elements
        source, place = self.source, tuple(self.place)
        spread(lambda lo, hi: loop(source, place, *before, lo, hi, self.packed, self.out), count, size)


def supports(codec: ScalarQuantizer, cut: Cut, *tensors: Tensor | None) -> bool:
    """Whether the fused steps apply: tensors of one known dtype on the CPU, and a form of codec the loops know."""
    given = [tensor for tensor in tensors if tensor is not None]
    if cut.numel == 0 or codec.offsets or any(tensor.device.type != "cpu" for tensor in given):
        return False
    if given[0].dtype not in BIT_TYPES or any(tensor.dtype != given[0].dtype for tensor in given):
        return False
    place = place_for(codec, cut)
    if place is None:
        return False
    if codec.layout_of(cut.shape).rows == 1 and codec.base3:
        return False
    # signs are packed as they are found, so they have to fill their bytes
    return codec.fused != "sign" or loop_bits(codec, place) == 1


def encode_residual(
    codec: ScalarQuantizer,
    x: Tensor,
    base: Tensor | None,
    cut: Cut,
    out: Tensor | None,
    velocity: Tensor | None = None,
    payload: Tensor | None = None,
) -> Tensor | None:
    """Encode ``x - (base + velocity)`` and, if ``out`` is given, write there what the receiver will hold.

    Args:
        codec: how.
        x: flat.
        base: flat; ``None`` for no expectation.
        cut: how the buffer becomes a matrix.
        out: flat; may be ``base``.
        velocity: flat, added to ``base`` in float32; ``None`` for none.
        payload: uint8 buffer to write to; a new one unless given.

    Returns:
        The payload, or ``None`` if the residual is not finite or too close to the ends of float32. ``out`` may have
        been written to then, unless it is ``base``.
    """
    layout = codec.layout_of(cut.shape)
    place = place_for(codec, cut)
    assert place is not None  # supports() said so
    if payload is None:
        payload = torch.empty(layout.total_nbytes, dtype=torch.uint8)
    _clear_padding(payload, layout)
    codes = payload[: layout.codes_nbytes].numpy()
    own = loop_bits(codec, place) == codec.bits and not codec.base3
    call = _Call(
        codec,
        layout,
        place,
        (bits_of(x, x.dtype), *expectation(base, velocity, x.dtype)),
        codes if own else np.empty(layout.elements, np.uint8),
        bits_of(out, x.dtype),
        np.float32(torch.finfo(x.dtype).max),
    )
    if layout.rows == 1:
        in_place = out is not None and base is not None and out.data_ptr() == base.data_ptr()
        return _encode_blocks(call, payload, codes, base, cut, out, in_place, velocity)
    if not _encode_rows(call, payload):
        return None
    if not own:
        pack_apart(codec, call.packed, codes)
    return payload


def _encode_blocks(
    call: _Call,
    payload: Tensor,
    codes: NDArray[np.uint8],
    base: Tensor | None,
    cut: Cut,
    out: Tensor | None,
    in_place: bool,
    velocity: Tensor | None,
) -> Tensor | None:
    codec, place = call.codec, call.place
    found, bad = np.empty(place.row_at.size, np.float32), np.zeros(1, np.uint8)
    # the base must be whole if a later block turns out not to be finite
    target = call.out[:0] if in_place else call.out
    rounding: tuple[Any, ...]
    if codec.fused == "sign":
        loop, rounding = cpu_blocks.block_signs, ()
    elif codec.fused == "linear":
        loop, rounding = cpu_blocks.block_linear, (_LARGEST_STEP,)
    else:
        bound = np.float32(scales.LARGEST_OF_MEAN / codec.magnitudes[0])
        loop = cpu_blocks.block_nearest
        rounding = call.bits, codec.borders(), codec.level_table(), codec.widening, bound
    given = call.source, tuple(place), *rounding, call.limit
    spread(
        lambda lo, hi: loop(*given, lo, hi, call.packed, found, bad, target), place.row_at.size, call.layout.elements
    )
    if bad[0]:
        return None
    if call.packed is not codes:
        pack_apart(codec, call.packed, codes)
    _put_channel_scales(payload, call.layout, torch.from_numpy(found))
    if in_place and out is not None:
        decode_residual(codec, payload, base, cut, out, velocity)
    return payload


def _put_channel_scales(payload: Tensor, layout: Layout, c: Tensor) -> None:
    c_bytes = reference.encode_bf16(c)
    payload[layout.channel_scales_at :][: c_bytes.numel()] = c_bytes


def _clear_padding(payload: Tensor, layout: Layout) -> None:
    payload[layout.codes_nbytes : layout.row_scales_at].zero_()
    payload[layout.row_scales_at + layout.row_scale_count : layout.channel_scales_at].zero_()
    payload[layout.channel_scales_at + 2 * layout.groups * layout.channel_scales_per_group :].zero_()


def _encode_rows(call: _Call, payload: Tensor) -> bool:
    """Fill in codes, scales and the receiver's values; false to decline."""
    codec, layout, place = call.codec, call.layout, tuple(call.place)
    groups, rows, channels = layout.groups, layout.rows, layout.channels
    tiles = -(-rows // reference.TILE_ROWS)
    stat, weighted = np.empty(groups * rows, np.float32), bool(layout.row_scale_count)
    first = np.empty(groups * tiles * channels, np.float32)
    second = np.empty(first.size if codec.fused in ("nearest", "trits") else 0, np.float32)

    def survey(loop: Callable[..., None], *after: Any) -> None:
        spread(
            lambda lo, hi: loop(call.source, place, weighted, lo, hi, np.empty(channels, np.float32), stat, *after),
            groups * tiles,
            layout.elements,
        )

    if codec.fused == "sign":
        survey(surveys.survey_signs, first, call.packed)
    elif codec.fused == "linear":
        survey(surveys.survey_reach, first)
    else:
        survey(surveys.survey_moments, first, second)
    t, inverse_t = np.ones(groups * rows, np.float32), np.ones(groups * rows, np.float32)
    norms, written = np.empty(groups, np.float32), payload.numpy()
    row_bytes = written[layout.row_scales_at : layout.row_scales_at + layout.row_scale_count]
    if not settle_rows(stat, weighted, rows, row_bytes, t, inverse_t, norms):
        return False
    per_group = layout.channel_scales_per_group
    stored = written[layout.channel_scales_at :][: 2 * groups * per_group].view(np.uint16)
    c, inverse_c = np.empty(groups * channels, np.float32), np.empty(groups * channels, np.float32)
    bound = np.float32(scales.LARGEST_OF_MEAN / codec.magnitudes[0] if codec.fused == "nearest" else 0)
    sums = stat, weighted, rows, channels, norms, first, second, bound, codec.widening
    settle_channels(_KINDS[codec.fused], *sums, per_group == 1, c, inverse_c, stored)
    settled = t, inverse_t, c, inverse_c, call.limit
    if codec.fused == "linear":
        call.over_rows(loops.code_linear, _LARGEST_STEP, *settled)
    elif codec.fused != "sign":
        how = call.bits, codec.borders(), codec.level_table(), codec.fused == "trits"
        call.over_rows(loops.code_nearest, *how, *settled)
    elif call.out.size:
        rest = t, c, *call.source[1:], tuple(call.place), call.limit
        spread(lambda lo, hi: loops.apply_signs(call.packed, *rest, lo, hi, call.out), groups * rows, layout.elements)
    return True
