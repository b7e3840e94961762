"""For tests of what builds on compactdist: the checks every codec must pass, and inner groups with planned faults
or with NCCL's manners.
"""

from compactdist.testing.codec_checks import check_input
from compactdist.testing.codec_kit import check_codec
from compactdist.testing.faults import Fault, FaultyGroup, PlannedFaultError, inject
from compactdist.testing.nccl_like import NcclLikeGroup, UnequalSizesError, act_like_nccl
from compactdist.testing.over import remove
from compactdist.testing.samples import DISTRIBUTIONS, FLOAT_DTYPES, SHAPES, sample

__all__ = [
    "DISTRIBUTIONS",
    "FLOAT_DTYPES",
    "Fault",
    "FaultyGroup",
    "NcclLikeGroup",
    "PlannedFaultError",
    "SHAPES",
    "UnequalSizesError",
    "act_like_nccl",
    "check_codec",
    "check_input",
    "inject",
    "remove",
    "sample",
]
