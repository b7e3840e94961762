"""Codecs turn a residual into bytes and back; the registry finds them by id.

Example:
    >>> import torch
    >>> from compactdist import codecs
    >>> codecs.list()
    ['binary', 'fp8', 'int2', 'int3', 'int4', 'int8', 'lowrank', 'lowrank_int4', 'rates', 'raw', 'ternary', ...]
    >>> int4 = codecs.get("int4")
    >>> x = torch.ones(4, 64)
    >>> payload = int4.encode(x)
    >>> payload.numel() == int4.payload_nbytes(x.shape, x.dtype)
    True
    >>> bool((int4.decode(payload, x.shape, x.dtype) - x).abs().max() < 0.05)
    True
"""

from __future__ import annotations

from compactdist.codecs.base import Codec
from compactdist.codecs.lowrank.lowrank import LowRank
from compactdist.codecs.lowrank.lowrank_int4 import LowRankInt4
from compactdist.codecs.rates import Rates
from compactdist.codecs.raw import Raw
from compactdist.codecs.registry import get, register
from compactdist.codecs.registry import list_codecs as list
from compactdist.codecs.scalar.binary import Binary
from compactdist.codecs.scalar.fp8 import Fp8
from compactdist.codecs.scalar.int2 import Int2
from compactdist.codecs.scalar.int3 import Int3
from compactdist.codecs.scalar.int4 import Int4
from compactdist.codecs.scalar.int8 import Int8
from compactdist.codecs.scalar.ternary import Ternary
from compactdist.codecs.shapes import matrix_shape
from compactdist.codecs.topk import TopK, TopKInt4
from compactdist.codecs.transform.transform import Transform

__all__ = [
    "Binary",
    "Codec",
    "Fp8",
    "Int2",
    "Int3",
    "Int4",
    "Int8",
    "LowRank",
    "LowRankInt4",
    "Rates",
    "Raw",
    "Ternary",
    "TopK",
    "TopKInt4",
    "Transform",
    "get",
    "list",
    "matrix_shape",
    "register",
]
