"""For tests of what builds on compactdist: the checks every codec must pass, and inner groups with planned faults."""

from compactdist.testing.codec_checks import check_input
from compactdist.testing.codec_kit import check_codec
from compactdist.testing.faults import Fault, FaultyGroup, PlannedFaultError, inject, remove
from compactdist.testing.samples import DISTRIBUTIONS, FLOAT_DTYPES, SHAPES, sample

__all__ = [
    "DISTRIBUTIONS",
    "FLOAT_DTYPES",
    "Fault",
    "FaultyGroup",
    "PlannedFaultError",
    "SHAPES",
    "check_codec",
    "check_input",
    "inject",
    "remove",
    "sample",
]
