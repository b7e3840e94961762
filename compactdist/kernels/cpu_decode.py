"""The decoding half of ``cpu.py``: from payload and base to new base."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from compactdist.kernels import cpu_loops as loops
from compactdist.kernels.cpu_common import bits_of, expectation, plan_for, unpack_apart
from compactdist.kernels.cpu_settle import NEAREST, TRITS, read_row_scales, read_scales
from compactdist.kernels.threads import spread

if TYPE_CHECKING:
    from compactdist.codecs.scalar.quantized import ScalarQuantizer
    from compactdist.kernels.spec import MatrixView

__all__ = ["decode_residual"]

_LARGEST_SCALE = np.float32(2.0**90)
"""With channel scales up to this, and t below 2, no product of the decoder leaves float32."""


def decode_residual(
    codec: ScalarQuantizer,
    payload: Tensor,
    terms: tuple[Tensor, ...],
    view: MatrixView,
    out: Tensor,
) -> bool:
    """Write the sum of ``terms`` plus the decoded payload to ``out``, kept finite and rounded to its dtype.

    Args:
        codec: how.
        payload: uint8, of the right length.
        terms: what is expected, each flat; the first may be ``out``.
        view: how the buffer becomes a matrix.
        out: flat.

    Returns:
        Whether it was done; not if scales come close to the ends of float32.
    """
    plan = plan_for(codec, view)
    assert plan is not None  # supports() said so
    layout, data = plan.layout, bits_of(payload, torch.uint8)
    groups, channels, per_group = layout.groups, layout.channels, layout.channel_scales_per_group
    stored = data[layout.channel_scales_at :][: 2 * groups * per_group].view(np.uint16)
    if layout.rows == 1:  # blocks are the rows of one group here
        c, t = np.ones(channels, np.float32), np.empty(plan.row_count, np.float32)
        safe = read_scales(stored, 1, _LARGEST_SCALE, t)
    else:
        c, t = np.empty(groups * channels, np.float32), np.ones(plan.row_count, np.float32)
        safe = read_scales(stored, channels // per_group, _LARGEST_SCALE, c)
        read_row_scales(data[layout.row_scales_at :][: layout.row_scale_count], t)
    if not safe:
        return False
    codes = data[: layout.codes_nbytes]
    if plan.apart:
        codes = unpack_apart(codec, codes, layout.elements)
    before, further, count = expectation(terms, out.dtype)
    loop = loops.apply_codes(count == 1, NEAREST if plan.kind == TRITS else plan.kind, plan.bits)
    source, into = (before, before, further, count), bits_of(out, out.dtype)
    given = source, plan.place, codes, into, (False, False), t, c, plan.table
    spread(lambda parts: loop(parts, *given), plan.row_count, layout.elements)
    return True
