"""The checks every codec must pass; a codec outside this package is put through them in one line.

    from compactdist.testing import check_codec

    def test_my_codec():
        check_codec(MyCodec(option=3))

No test framework is needed. hypothesis, which draws the random inputs, is imported when they are drawn.
"""

from __future__ import annotations

import torch

from compactdist.codecs import Codec
from compactdist.errors import CompactDistError
from compactdist.testing.codec_checks import (
    check_bad_inputs,
    check_config_round_trip,
    check_contraction,
    check_input,
    check_residual_loop,
    check_surroundings,
    check_threads,
    on_sample,
)
from compactdist.testing.samples import DISTRIBUTIONS, FLOAT_DTYPES, SHAPES, sample
from compactdist.testing.session_checks import check_sessions

__all__ = ["check_codec"]


def check_codec(codec: Codec, *, examples: int = 50, device: str | torch.device = "cpu") -> None:
    """Put a codec through everything that its contract promises.

    That is: the payload size follows from shape and dtype; decoding gives the same bits wherever the payload lies,
    however many threads there are, under autocast and with any default dtype; the error never has more energy than the
    input; NaN and Inf are refused; the configuration survives JSON and decides equality and fingerprint; views encode
    as their contiguous copies; and, for codecs that open sessions, both ends of a stream stay equal, what was rolled
    back leaves no trace, and their memory can be moved.

    Args:
        codec: must be registered (``compactdist.codecs.register``, or an installed entry point), as both ends find it
            by its id.
        examples: random inputs to draw, by hypothesis; 0: draw none, and hypothesis is not needed.
        device: where tensors and payloads live.

    Raises:
        AssertionError: a promise is broken; the text names the promise and the input.
        CompactDistError: hypothesis is not installed and ``examples`` is not 0.
    """
    check_config_round_trip(codec)
    check_bad_inputs(codec, device)
    for turn, name in enumerate(DISTRIBUTIONS):
        for index, shape in enumerate(SHAPES):
            dtype = FLOAT_DTYPES[(turn + index) % len(FLOAT_DTYPES)] if index % 2 else torch.float32
            _check_sample(codec, name, shape, dtype, 0, device)
    check_residual_loop(codec, device)
    check_threads(codec, device)
    check_surroundings(codec, device)
    if hasattr(codec, "open"):
        check_sessions(codec, device=device)
    if examples:
        _check_random(codec, examples, device)


def _check_sample(
    codec: Codec, name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int, device: str | torch.device
) -> None:
    with on_sample(name, shape, dtype, seed):
        check_input(codec, sample(name, shape, dtype, seed).to(device))


def _check_random(codec: Codec, examples: int, device: str | torch.device) -> None:
    try:
        from hypothesis import HealthCheck, given, settings
        from hypothesis import strategies as st
    except ImportError:
        raise CompactDistError(
            "check_codec draws random inputs with hypothesis, which is not installed: pip install hypothesis, "
            "or check_codec(codec, examples=0) for the fixed inputs only"
        ) from None

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(
        shape=st.sampled_from(SHAPES) | st.lists(st.integers(1, 40), max_size=3).map(tuple),
        name=st.sampled_from(sorted(DISTRIBUTIONS)),
        dtype=st.sampled_from(FLOAT_DTYPES),
        seed=st.integers(0, 2**32 - 1),
    )
    def any_sample(shape: tuple[int, ...], name: str, dtype: torch.dtype, seed: int) -> None:
        _check_sample(codec, name, shape, dtype, seed, device)

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(
        values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=200),
        width=st.integers(1, 7),
    )
    def any_values(values: list[float], width: int) -> None:
        x = torch.tensor(values, dtype=torch.float32, device=device)
        check_contraction(codec, x)
        check_contraction(codec, x[: len(values) // width * width].view(-1, width))

    any_sample()
    any_values()
