"""The decoding half of ``cpu.py``: from payload and base to new base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from compactdist.codecs.kernels import cpu_loops as loops
from compactdist.codecs.kernels import reference
from compactdist.codecs.kernels.cpu_common import bits_of, expectation, loop_bits, place_for, unpack_apart
from compactdist.codecs.kernels.threads import spread

if TYPE_CHECKING:
    from compactdist.codecs.base import Cut
    from compactdist.codecs.quantized import ScalarQuantizer

__all__ = ["decode_residual"]

_LARGEST_SCALE = 2.0**90
"""With channel scales up to this, and t below 2, no product of the decoder leaves float32."""

_LOOPS = {
    "sign": loops.apply_signs,
    "linear": loops.apply_integers,
    "nearest": loops.apply_levels,
    "trits": loops.apply_levels,
}


def decode_residual(
    codec: ScalarQuantizer,
    payload: Tensor,
    base: Tensor | None,
    cut: Cut,
    out: Tensor,
    velocity: Tensor | None = None,
) -> bool:
    """Write ``base + velocity`` plus the decoded payload to ``out``, kept finite and rounded to its dtype.

    Args:
        codec: how.
        payload: uint8, of the right length.
        base: flat; may be ``out``; ``None`` for no expectation.
        cut: how the buffer becomes a matrix.
        out: flat.
        velocity: flat, added to ``base`` in float32; ``None`` for none.

    Returns:
        Whether it was done; not if scales come close to the ends of float32.
    """
    layout, place = codec.layout_of(cut.shape), place_for(codec, cut)
    assert place is not None  # supports() said so
    groups, channels = layout.groups, layout.channels
    per_group = layout.channel_scales_per_group
    c = reference.decode_bf16(payload[layout.channel_scales_at :][: 2 * groups * per_group])
    if not (c.numel() and float(c.max()) <= _LARGEST_SCALE and float(c.min()) >= 0):
        return False
    if layout.rows == 1:  # blocks are the rows of one group here
        t, wide = c.numpy(), np.ones(channels, np.float32)
    else:
        wide = c.view(groups, per_group).expand(groups, channels).contiguous().view(-1).numpy()
        t = np.ones(place.row_at.size, np.float32)
        if layout.row_scale_count:
            t = reference.decode_ue5m3(payload[layout.row_scales_at :][: layout.row_scale_count]).numpy()
    codes, bits = payload[: layout.codes_nbytes].numpy(), loop_bits(codec, place)
    if bits != codec.bits or codec.base3:
        codes = unpack_apart(codec, codes, layout.elements)
    loop = _LOOPS[codec.fused]
    table = codec.level_table()
    rest = (t, wide, *expectation(base, velocity, out.dtype), tuple(place))
    limit, target = np.float32(torch.finfo(out.dtype).max), bits_of(out, out.dtype)
    spread(lambda lo, hi: loop(codes, bits, table, *rest, limit, lo, hi, target), place.row_at.size, layout.elements)
    return True
