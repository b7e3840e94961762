"""A history of eight bits is made and read by one launch each: the bytes of torch's operations on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from compactdist.kernels import restored, use
from compactdist.kernels.spec import EightBits, Rounded
from compactdist.state import ResidualDecoder, ResidualEncoder
from compactdist.state.quantized_history import quantize
from tests.kernels.gpu import kit
from tests.kernels.gpu.conftest import INTERPRETED

FORMS: tuple[EightBits, ...] = ("int8", "fp8")
HARD = tuple(kind for kind in kit.KINDS if kind not in ("zero rows", "L"))


def _check(x: torch.Tensor, form: EightBits) -> None:
    """Of finite values: codes, scales and what is read back."""
    with use("reference"):
        expected = quantize(x, form, x.dtype)
        values = restored(expected)
    with use("gpu"):
        kept = quantize(x.to(kit.DEVICE), form, x.dtype)
        read = restored(kept)
    assert torch.equal(kit.raw(kept.codes), kit.raw(expected.codes))
    assert torch.equal(kit.raw(kept.scales), kit.raw(expected.scales))
    assert torch.equal(kit.raw(read), kit.raw(values))


@pytest.mark.parametrize("dtype", kit.DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_same_bytes(form: EightBits, dtype: torch.dtype) -> None:
    for numel in (1, 129, 128 * 64 + 1):
        _check(kit.cast(kit.draw("gaussian", numel, 1), dtype), form)
    hard = torch.cat([kit.draw(kind, 8 * 128, 1) for kind in HARD])
    _check(kit.cast(hard, dtype), form)


@pytest.mark.parametrize("form", FORMS)
def test_all_bfloat16_and_any_float32(form: EightBits) -> None:
    """Shuffled, so that blocks have values of every size; and sorted, so that small ones are not lost beside large."""
    g = torch.Generator().manual_seed(0)
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite()]
    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 17,), generator=g).to(torch.int32)
    for x in (every, bits.view(torch.float32)):
        x = x[x.isfinite()]
        _check(x, form)
        _check(x[torch.randperm(x.numel(), generator=g)], form)
        # one scale for all: every value of a few octaves meets every border between two levels
        _check((x.float().frexp().mantissa * 448).to(x.dtype), form)


@pytest.mark.parametrize("form", FORMS)
def test_every_code_is_read_as_its_level(form: EightBits) -> None:
    codes = torch.arange(256).to(torch.uint8).repeat(2)
    codes = codes.view(torch.int8) if form == "int8" else codes
    scales = torch.tensor([2.0**-9, 3.0, 1e38, 2.0**-87], dtype=torch.bfloat16)
    for dtype in kit.DTYPES:
        with use("reference"):
            expected = restored(Rounded(codes, scales, dtype))
        with use("gpu"):
            read = restored(Rounded(codes.to(kit.DEVICE), scales.to(kit.DEVICE), dtype))
        assert torch.equal(kit.raw(read), kit.raw(expected))


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_streams_equal_those_of_the_reference(form: EightBits, order: int, dtype: torch.dtype) -> None:
    """Frames and outputs of several steps, of a tensor whose last block is not full."""
    frames = [kit.cast(kit.draw("gaussian", 1000, 1, seed), dtype) for seed in range(4)]
    seen = []
    for kernels, device in (("reference", torch.device("cpu")), ("gpu", kit.DEVICE)):
        with use(kernels):  # type: ignore[arg-type]
            options: dict[str, Any] = {"codec": kit.get({"id": "int8", "scales": "block"}), "state": form}
            encoder = ResidualEncoder(order=order, **options)
            decoder = ResidualDecoder(order=order, **options)
            made = []
            for x in frames:
                frame = encoder.encode(x.to(device))
                made.append((kit.raw(frame), kit.raw(decoder.decode(frame))))
            seen.append(made)
    for ours, theirs in zip(*seen, strict=True):
        assert all(map(torch.equal, ours, theirs))


class _Made(TorchDispatchMode):
    """Counts the tensors that torch's operations make, by bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and not func.is_view:
            self.nbytes.append(made.nbytes)
        return made


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU what the kernels take is not seen here either")
@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_made_but_the_results(form: EightBits) -> None:
    x = torch.randn(1280, dtype=torch.bfloat16)
    with use("gpu"):
        kept = quantize(x, form, x.dtype)
        restored(kept)
        with _interpreting_unseen(), _Made() as made:
            kept = quantize(x, form, x.dtype)
            restored(kept)
    assert made.nbytes == [1280, 20, 2560], "codes, scales, and what is read"


def _interpreting_unseen() -> Any:
    """The interpreter copies what a kernel is given, which no GPU does."""
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run
    patch = pytest.MonkeyPatch()

    def unseen(*args: Any, **kwargs: Any) -> Any:
        with torch.utils._python_dispatch._disable_current_modes():
            return run(*args, **kwargs)

    patch.setattr(InterpretedFunction, "run", unseen)

    class _Undo:
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None:
            patch.undo()

    return _Undo()
