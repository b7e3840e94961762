"""What the transform codec calls: tensors to blocks for the loops of ``components.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from compactdist.kernels.cpu import call
from compactdist.kernels.cpu.call import Work
from compactdist.kernels.cpu.native import address_of, has_feature
from compactdist.kernels.cpu.products import expected_slots, placed, run_alone, supports
from compactdist.kernels.cpu.steps import DTYPES
from compactdist.kernels.offsets import offsets_of
from compactdist.kernels.reference import LANES, components
from compactdist.kernels.reference.components import Chosen
from compactdist.kernels.spec import MatrixView

__all__ = [
    "choose",
    "choose_on_trellis",
    "multiplies_bytes",
    "put_out",
    "put_out_bytes",
    "read",
    "supports",
    "take_in",
    "weigh",
]


def take_in(x: Tensor, terms: tuple[Tensor, ...], view: MatrixView, out: Tensor) -> Tensor:
    """Write ``x`` less the sum of ``terms`` as matrices to ``out``, ``(G, R, K)``, zeros beyond the channels.

    ``out`` is float32 or bfloat16, rounded once.

    Returns:
        Sums of squares, float32 ``(G, R)``; not finite where the residual is not, or too large to be squared.
    """
    groups, rows, width = out.shape
    squares = torch.empty(groups, rows, dtype=torch.float32, device="cpu")
    slots = placed(offsets_of(view)) | expected_slots(terms)
    slots |= {call.X: x.data_ptr(), call.TURNED: out.data_ptr(), call.ENERGIES: squares.data_ptr()}
    slots |= {call.COMPONENTS: width}
    run_alone(
        Work(groups * rows, view.numel, address_of("components.take_in", DTYPES[x.dtype], DTYPES[out.dtype])), slots
    )
    return squares


def choose(
    turned: Tensor, chosen: Chosen, inverses: Tensor, rows: Tensor, planes: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    """As ``reference.components.choose``; sums may differ in their last bits."""
    return _choose("components.choose", turned, chosen, inverses, rows, planes, out)


def choose_on_trellis(
    turned: Tensor, chosen: Chosen, inverses: Tensor, rows: Tensor, planes: Tensor, out: Tensor, stride: int
) -> tuple[Tensor, Tensor]:
    """As ``reference.components.choose_on_trellis``; of several courses that lose as much this may take another, and
    sums may differ in their last bits.
    """
    length = out.shape[1]
    if stride == LANES:
        there = (torch.arange(LANES, device="cpu") < length - (length - 1) // LANES * LANES).float()
        return _choose_in_lanes(turned, chosen, inverses, rows, planes, out, there)
    beside, turns = LANES // stride, -(-length // stride)
    there = ((turns - 1) * stride + torch.arange(stride, device="cpu") < length).float().repeat(beside)
    of_row, ones = components.inverses_of(rows), rows.new_ones(turns * LANES)
    # eight components lie side by side, as one with courses as far apart as lanes
    for depth, which in chosen.classes():
        groups = -(-which.numel() // beside)
        given = components.in_levels(turned, chosen.places[which], inverses[which], of_row)
        missing = turns * stride - length, groups * beside - which.numel()
        lanes = torch.nn.functional.pad(given, (0, missing[0], 0, missing[1])).view(groups, beside, turns, stride)
        lanes = lanes.transpose(1, 2).reshape(groups, turns * LANES)
        levels = torch.empty(lanes.shape, dtype=torch.int8, device="cpu")
        bits = torch.zeros(groups * depth, turns * beside, dtype=torch.uint8, device="cpu")
        each = torch.arange(groups, device="cpu")
        whole = Chosen(each, torch.full_like(each, depth), each * depth, chosen.steps)
        _choose_in_lanes(lanes, whole, rows.new_ones(groups), ones, bits, levels, there)
        back = levels.view(groups, turns, beside, stride).transpose(1, 2).reshape(groups * beside, turns * stride)
        out[which] = back[: which.numel(), :length]
        of_each = bits.view(groups, depth, turns, beside).permute(0, 3, 1, 2).reshape(groups * beside, depth, turns)
        for bit in range(depth):
            planes[chosen.planes[which] + bit] = of_each[: which.numel(), bit]
    return components.sums(turned, chosen, rows, out)


def _choose_in_lanes(
    turned: Tensor, chosen: Chosen, inverses: Tensor, rows: Tensor, planes: Tensor, out: Tensor, there: Tensor
) -> tuple[Tensor, Tensor]:
    """Along courses that are as far apart as lanes; ``there``: 1 for rows of the last turn that are there, else 0."""
    costs = -(-out.shape[1] // LANES) * 4 * LANES
    decisions = torch.empty(out.shape[0] * costs // 8, dtype=torch.uint8, device="cpu")
    room = {call.DECISIONS: decisions.data_ptr(), call.THERE: there.data_ptr()}
    return _choose("trellis.choose", turned, chosen, inverses, rows, planes, out, room, own=costs)


def _choose(
    unit: str,
    turned: Tensor,
    chosen: Chosen,
    inverses: Tensor,
    rows: Tensor,
    planes: Tensor,
    out: Tensor,
    room: Mapping[int, int] = MappingProxyType({}),
    own: int = 0,
) -> tuple[Tensor, Tensor]:
    energy, agreement = torch.empty(2, inverses.numel(), dtype=torch.float32, device="cpu")
    of_row = components.inverses_of(rows)
    slots = _of_chosen(chosen, planes, out) | {
        call.TURNED: turned.data_ptr(),
        call.INVERSES: inverses.data_ptr(),
        call.ROW_SCALES: rows.data_ptr(),
        call.ROW_INVERSES: of_row.data_ptr(),
        call.ENERGIES: energy.data_ptr(),
        call.AGREEMENTS: agreement.data_ptr(),
        **room,
    }
    run_alone(Work(inverses.numel(), 2 * out.numel(), address_of(unit, DTYPES[turned.dtype])), slots, own)
    return energy, agreement


def read(planes: Tensor, chosen: Chosen, out: Tensor) -> None:
    """As ``reference.components.read``."""
    run_alone(Work(chosen.places.numel(), out.numel(), address_of("components.read")), _of_chosen(chosen, planes, out))


def weigh(turned: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """As ``reference.components.weigh``; sums may differ in their last bits."""
    out = torch.empty(turned.shape[1], dtype=torch.float32, device="cpu")
    slots = {
        call.TURNED: turned.data_ptr(),
        call.PLACES: places.data_ptr(),
        call.INVERSES: weights.data_ptr(),
        call.OUT: out.data_ptr(),
        call.ROWS: out.numel(),
        call.COMPONENTS: places.numel(),
    }
    run_alone(
        Work(
            -(-out.numel() // (4 * LANES)),
            out.numel() * places.numel(),
            address_of("components.weigh", DTYPES[turned.dtype]),
        ),
        slots,
    )
    return out


def put_out(
    products: Tensor, units: Tensor, rows: Tensor, terms: tuple[Tensor, ...], view: MatrixView, out: Tensor
) -> None:
    """Write the sum of ``terms`` plus scaled products, kept finite and rounded once, to ``out``.

    Args:
        products: float32 ``(G, R, K)``.
        units: what they are multiplied by first, float32 ``(G, K)``.
        rows: what they are multiplied by then, float32 ``(G, R)``.
        terms: as many as there are.
        view: of ``out`` and the terms.
        out: may be the first of the terms.
    """
    slots = placed(offsets_of(view)) | expected_slots(terms)
    slots |= {
        call.OUT: out.data_ptr(),
        call.TURNED: products.data_ptr(),
        call.INVERSES: units.data_ptr(),
        call.ROW_SCALES: rows.data_ptr(),
        call.COMPONENTS: products.shape[2],
    }
    run_alone(Work(rows.numel(), view.numel, address_of("components.put_out", DTYPES[out.dtype])), slots)


def multiplies_bytes() -> bool:
    """Whether this processor has what :func:`put_out_bytes` takes."""
    return has_feature("avx512vnni")


def put_out_bytes(
    levels: Tensor,
    weights: Tensor,
    counts: Sequence[int],
    units: Tensor,
    rows: Tensor,
    terms: tuple[Tensor, ...],
    view: MatrixView,
    group: int,
    out: Tensor,
) -> None:
    """Multiply levels and weights of a group and go on as :func:`put_out`, which gives the same bits.

    Args:
        levels: of the chosen components, int8 ``(S, R)``, contiguous.
        weights: whole numbers of up to 14 bits and sign, float32 ``(S, n)``.
        counts: how many of the components each block has, one after another.
        units: what products are multiplied by first, float32 ``(K,)``, contiguous.
        rows: what they are multiplied by then, float32 ``(R,)``, contiguous.
        terms: as many as there are.
        view: of ``out`` and the terms.
        group: which one it is.
        out: may be the first of the terms.
    """
    blocks, width, count = len(counts), weights.shape[1], rows.numel()
    starts = np.cumsum([0, *counts], dtype=np.int64)
    limb, quads = -(-width // LANES) * LANES, -(-max(counts) // 4)
    words, corrections = (
        torch.empty(blocks, quads, 2 * limb, dtype=torch.int32, device="cpu"),
        torch.empty(blocks, 2 * limb, dtype=torch.float32, device="cpu"),
    )
    of_blocks = {
        call.COMPONENTS: width,
        call.PLACES: starts.ctypes.data,
        call.DEPTHS: quads,
        call.PLANES: blocks,
        call.STEPS: corrections.data_ptr(),
        call.TURNED: words.data_ptr(),
    }
    weights = weights.contiguous()
    packing = Work(blocks, words.numel(), address_of("inverse.pack"))
    run_alone(packing, of_blocks | {call.INVERSES: weights.data_ptr()})
    offsets = offsets_of(view)
    slots = placed(offsets) | expected_slots(terms) | of_blocks
    slots |= {
        call.ROW_AT: offsets.row_at.ctypes.data + 8 * group * count,
        call.OUT: out.data_ptr(),
        call.CODES: levels.data_ptr(),
        call.INVERSES: units.data_ptr(),
        call.ROW_SCALES: rows.data_ptr(),
    }
    own = blocks * quads * LANES + call.HEIGHT * ((blocks - 1) * width + limb)
    work = Work(-(-count // LANES), levels.numel() * width // 16, address_of("inverse.put_out", DTYPES[out.dtype]))
    run_alone(work, slots, own=-(-own // 16) * 16)


def _of_chosen(chosen: Chosen, planes: Tensor, out: Tensor) -> dict[int, int]:
    return {
        call.ROWS: out.shape[1],
        call.OUT: out.data_ptr(),
        call.CODES: planes.data_ptr(),
        call.PLACES: chosen.places.data_ptr(),
        call.DEPTHS: chosen.depths.data_ptr(),
        call.PLANES: chosen.planes.data_ptr(),
        call.STEPS: chosen.steps.data_ptr(),
    }
