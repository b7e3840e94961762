"""What the encoding and the decoding half of ``cpu.py`` share: tensors as arrays of bits, and codes packed apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compactdist.codecs.kernels.cpu_codes import pack_eights, pack_trits, unpack_eights, unpack_trits
from compactdist.codecs.kernels.places import Place, place_of, place_of_blocks
from compactdist.codecs.kernels.threads import spread

if TYPE_CHECKING:
    from compactdist.codecs.base import Cut
    from compactdist.codecs.quantized import ScalarQuantizer

BIT_TYPES = {torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.float16: torch.int16}


def loop_bits(codec: ScalarQuantizer, place: Place) -> int:
    """Width of the codes that the loops write: their own where they fill the bytes of every chunk, else 8."""
    whole = codec.bits in (1, 2, 4, 8) and not codec.base3 and not ((place.chunk_len * codec.bits) % 8).any()
    return codec.bits if whole else 8


def place_for(codec: ScalarQuantizer, cut: Cut) -> Place | None:
    """Rows, or blocks where a scale covers one row or less."""
    layout = codec.layout_of(cut.shape)
    return place_of_blocks(cut, layout.groups, layout.channels) if layout.rows == 1 else place_of(cut)


def bits_of(x: Tensor | None, dtype: torch.dtype) -> NDArray[Any]:
    """A flat tensor as the array of bits the loops take; an empty one for none."""
    if x is None:
        x = torch.empty(0, dtype=dtype)
    bits: NDArray[Any] = x.detach().contiguous().view(BIT_TYPES[dtype]).numpy()
    return bits


def expectation(
    base: Tensor | None, velocity: Tensor | None, dtype: torch.dtype
) -> tuple[NDArray[Any], NDArray[Any], int]:
    """Base and velocity as bits, and how many of them there are."""
    terms = 0 if base is None else 1 if velocity is None else 2
    return bits_of(base, dtype), bits_of(velocity if terms == 2 else None, dtype), terms


def pack_apart(codec: ScalarQuantizer, codes: NDArray[np.uint8], packed: NDArray[np.uint8]) -> None:
    """Pack codes that do not fill the bytes of every chunk, once all are there."""
    if codec.base3:
        spread(lambda lo, hi: pack_trits(codes, lo, hi, packed), packed.size, codes.size)
    else:
        spread(lambda lo, hi: pack_eights(codes, codec.bits, lo, hi, packed), -(-codes.size // 8), codes.size)


def unpack_apart(codec: ScalarQuantizer, packed: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """Undo ``pack_apart``: ``count`` codes, one to a byte."""
    codes = np.empty(count, np.uint8)
    if codec.base3:
        spread(lambda lo, hi: unpack_trits(packed, lo, hi, codes), packed.size, count)
    else:
        spread(lambda lo, hi: unpack_eights(packed, codec.bits, lo, hi, codes), -(-count // 8), count)
    return codes
