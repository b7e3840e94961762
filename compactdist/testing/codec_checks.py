"""The single checks that make up :func:`compactdist.testing.check_codec`, on one input or on the codec as a whole.

Each ``check_*`` raises AssertionError with a text that names the codec, what went wrong and the input it went wrong on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from compactdist import codecs
from compactdist.codecs import Codec
from compactdist.errors import CodecConfigError, NonFiniteError, PayloadError, UnknownCodecError
from compactdist.testing.samples import sample

__all__ = [
    "as_bytes",
    "check_bad_inputs",
    "check_config_round_trip",
    "check_contraction",
    "check_determinism",
    "check_exact_size",
    "check_input",
    "check_residual_loop",
    "check_round_trip",
    "check_strides",
    "check_surroundings",
    "check_threads",
    "expect",
    "expect_raises",
    "on_sample",
    "nmse",
    "round_trip",
    "surroundings",
]


# --- what the checks are made of


def expect(met: bool, codec: Codec, what: str, x: Tensor | None = None) -> None:
    """Raise an AssertionError that names codec, broken promise and input, unless ``met``."""
    if not met:
        where = "" if x is None else f" (input: {str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)})"
        raise AssertionError(f"{codec!r}: {what}{where}")


@contextmanager
def on_sample(name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Iterator[None]:
    """Say in an AssertionError how the input can be drawn again; any other error of a codec becomes one."""
    try:
        yield
    except Exception as error:
        what = str(error) if isinstance(error, AssertionError) else f"raised {type(error).__name__}: {error}"
        again = f"compactdist.testing.sample({name!r}, {tuple(shape)}, {dtype}, seed={seed})"
        raise AssertionError(f"{what}; drawn by {again}") from error


def expect_raises(kind: type[Exception], codec: Codec, what: str, call: Callable[[], Any]) -> Exception:
    """Raise an AssertionError unless ``call`` raises ``kind``; give back what it raised."""
    try:
        call()
    except kind as error:
        return error
    except Exception as error:
        raise AssertionError(
            f"{codec!r}: {what} must raise {kind.__name__}, raised {type(error).__name__}: {error}"
        ) from error
    raise AssertionError(f"{codec!r}: {what} must raise {kind.__name__}, raised nothing")


def as_bytes(x: Tensor) -> Tensor:
    """Return the memory of x, so that NaN equals itself and -0 differs from 0."""
    return x.contiguous().reshape(-1).view(torch.uint8)


def round_trip(codec: Codec, x: Tensor) -> Tensor:
    """``x`` encoded and decoded."""
    return codec.decode(codec.encode(x), x.shape, x.dtype)


def nmse(codec: Codec, x: Tensor) -> float:
    """Energy of a round trip's error over that of ``x``."""
    error = round_trip(codec, x).double() - x.double()
    return float(error.square().sum() / x.double().square().sum())


# --- checks on one input


def check_input(codec: Codec, x: Tensor, *, strictly: bool = False) -> None:
    """Run every check that works on any finite input; ``strictly`` as for :func:`check_contraction`."""
    check_round_trip(codec, x)
    check_exact_size(codec, x)
    check_determinism(codec, x)
    check_strides(codec, x)
    check_contraction(codec, x, strictly=strictly)


def check_round_trip(codec: Codec, x: Tensor) -> None:
    """Shape, dtype and finiteness come back; the input stays; zeros stay zeros; a lossless codec loses nothing."""
    before = as_bytes(x.detach()).clone()
    y = round_trip(codec, x)
    expect(torch.equal(as_bytes(x.detach()), before), codec, "encode changed its input", x)
    expect(y.shape == x.shape, codec, f"decode gave shape {tuple(y.shape)}", x)
    expect(y.dtype == x.dtype, codec, f"decode gave {y.dtype}", x)
    expect(y.is_contiguous(), codec, "decode must return a contiguous tensor", x)
    expect(not y.requires_grad, codec, "what decode returns must not require grad", x)
    expect(bool(torch.isfinite(y).all()), codec, "a finite tensor came back with NaN or Inf", x)
    if codec.lossless:
        expect(torch.equal(as_bytes(y), before), codec, "it says it is lossless, but bits changed", x)
    if not x.any():
        expect(not y.any(), codec, "zeros must come back as zeros", x)


def check_exact_size(codec: Codec, x: Tensor) -> None:
    """The payload is flat uint8, ``payload_nbytes`` long, a multiple of 16 bytes."""
    payload = codec.encode(x)
    flat = payload.dtype == torch.uint8 and payload.dim() == 1 and payload.is_contiguous()
    expect(flat, codec, f"the payload must be flat contiguous uint8, is {payload.dtype} {tuple(payload.shape)}", x)
    expect(payload.device == x.device, codec, f"the payload lies on {payload.device}", x)
    for shape in (x.shape, list(x.shape)):
        said = codec.payload_nbytes(shape, x.dtype)
        expect(payload.numel() == said, codec, f"payload_nbytes says {said}, encode made {payload.numel()} bytes", x)
    expect(payload.numel() % 16 == 0, codec, f"{payload.numel()} payload bytes are no multiple of 16", x)


def check_determinism(codec: Codec, x: Tensor) -> None:
    """Equal tensors give equal payloads, and a payload decodes to the same bits wherever it lies."""
    payload = codec.encode(x)
    expect(torch.equal(payload, codec.encode(x.clone())), codec, "two encodes of one tensor differ", x)
    y = as_bytes(codec.decode(payload, x.shape, x.dtype))
    # A received payload lies anywhere in a larger buffer.
    buffer = torch.zeros(payload.numel() + 7, dtype=torch.uint8, device=payload.device)
    moved = buffer[5 : 5 + payload.numel()]
    moved.copy_(payload)
    again = as_bytes(codec.decode(moved, x.shape, x.dtype))
    expect(torch.equal(y, again), codec, "a payload at an odd address decodes to other bits", x)
    expect(torch.equal(payload, moved), codec, "decode changed its payload", x)
    if x.device.type == "cpu" and torch.set_flush_denormal(True):
        try:
            flushed = as_bytes(codec.decode(payload, x.shape, x.dtype))
        finally:
            torch.set_flush_denormal(False)
        expect(torch.equal(y, flushed), codec, "decode gives other bits where denormals are flushed", x)


def check_strides(codec: Codec, x: Tensor) -> None:
    """A view must encode as its contiguous copy does, with or without requires_grad."""
    payload = codec.encode(x)
    spread = torch.stack([x, x + 1], -1)[..., 0]
    expect(torch.equal(codec.encode(spread), payload), codec, "a strided view encodes to other bytes", x)
    tracked = codec.encode(x.clone().requires_grad_())
    expect(torch.equal(tracked, payload), codec, "a tensor that requires grad encodes to other bytes", x)
    if x.dim() >= 2:
        turned = x.transpose(0, 1).contiguous().transpose(0, 1)
        expect(torch.equal(codec.encode(turned), payload), codec, "a transposed view encodes to other bytes", x)


def check_contraction(codec: Codec, x: Tensor, *, strictly: bool = False) -> None:
    """The error's energy is at most the input's; with ``strictly`` it is less, unless the input is tiny."""
    energy = float(x.double().square().sum())
    error = float((round_trip(codec, x).double() - x.double()).square().sum())
    # The result is rounded to dtype: half a step of each element, also where the steps are absolute.
    eps, tiny = torch.finfo(x.dtype).eps, torch.finfo(x.dtype).tiny * torch.finfo(x.dtype).eps
    narrow = x.dtype in (torch.float16, torch.bfloat16)
    slack = 2 * eps * energy + x.numel() * tiny**2 if narrow else 0.0
    expect(error <= energy + slack, codec, f"the error's energy {error:g} exceeds the input's {energy:g}", x)
    if strictly and x.numel() and float(x.abs().max()) > 1e-4:
        expect(error < energy + slack, codec, "the error's energy is the input's: nothing was gained", x)


# --- checks on the codec


def check_config_round_trip(codec: Codec) -> None:
    """The configuration survives JSON, and decides equality, hash, repr and fingerprint."""
    config = codec.get_config()
    expect("id" not in config, codec, "get_config must leave out the id")
    twin = type(codec).from_config(json.loads(json.dumps(config)))
    expect(twin == codec, codec, f"from_config of its own config as JSON gives {twin!r}")
    expect(hash(twin) == hash(codec), codec, "equal codecs have different hashes")
    expect(repr(twin) == repr(codec), codec, f"equal codecs have different reprs, {twin!r} the other")
    expect(twin.fingerprint() == codec.fingerprint(), codec, "equal codecs have different fingerprints")
    expect(0 <= codec.fingerprint() < 2**32, codec, f"fingerprint {codec.fingerprint()} is not 32 bits")
    expect(codec != codec.codec_id, codec, "a codec must not equal a string")
    try:
        again = eval(repr(codec), {type(codec).__name__: type(codec)})
    except Exception as error:
        again = f"{type(error).__name__}: {error}"
    expect(again == codec, codec, f"its repr does not make it again, but {again}")
    try:
        found = codecs.get({"id": codec.codec_id, **config})
    except UnknownCodecError as error:
        raise AssertionError(
            f"{codec!r} is not registered: decorate its class with compactdist.codecs.register, or name it under the "
            f"entry point group 'compactdist.codecs' ({error})"
        ) from None
    expect(found == codec, codec, f"its id and config are those of {found!r}")
    unknown = {**config, "no_such_option": 1}
    refusal = expect_raises(CodecConfigError, codec, "an unknown option", lambda: type(codec).from_config(unknown))
    expect("no_such_option" in str(refusal), codec, f"the error must name the unknown option, says {refusal}")


def check_bad_inputs(codec: Codec, device: str | torch.device = "cpu") -> None:
    """Payloads of the wrong form, NaN, Inf and foreign dtypes are refused, each with its own error."""
    shape, dtype = (40, 70), torch.float32
    x = sample("gaussian", shape).to(device)
    payload = codec.encode(x)
    n = payload.numel()
    wrong_forms: tuple[tuple[str, Any], ...] = (
        ("a payload that is a byte short", payload[:-1]),
        ("a payload that is a byte long", torch.cat([payload, payload[:1]])),
        ("a payload of two dimensions", payload.view(1, -1)),
        ("a payload of int8", payload.view(torch.int8)),
        ("a payload that is no tensor", bytes(n)),
    )
    for what, bad in wrong_forms:
        expect_raises(PayloadError, codec, what, lambda bad=bad: codec.decode(bad, shape, dtype))  # type: ignore[misc]
    if codec.lossless:
        return
    for value in (math.nan, math.inf, -math.inf):
        broken = x.clone()
        broken[3, 4] = broken[5, 6] = value
        expect_raises(NonFiniteError, codec, f"a tensor with {value}", lambda x=broken: codec.encode(x))  # type: ignore[misc]
    for wrong in (torch.int32, torch.bool, torch.complex64, torch.uint8):
        foreign = torch.zeros(4, dtype=wrong, device=device)
        expect_raises(CodecConfigError, codec, f"encode of {wrong}", lambda x=foreign: codec.encode(x))  # type: ignore[misc]
        expect_raises(
            CodecConfigError,
            codec,
            f"payload_nbytes of {wrong}",
            lambda dtype=wrong: codec.payload_nbytes((4,), dtype),  # type: ignore[misc]
        )


def check_residual_loop(codec: Codec, device: str | torch.device = "cpu") -> None:
    """Both ends add the decoded residual to the base; while the tensor does not change, the base never moves away."""
    x = sample("student4", (96, 80)).to(device)
    base = torch.zeros_like(x)
    errors = []
    for _ in range(12):
        base = base + round_trip(codec, x - base)
        errors.append(float((x - base).square().sum()))
    for step, (earlier, later) in enumerate(pairwise(errors)):
        expect(
            later <= earlier or earlier < 1e-9, codec, f"step {step + 1} made the error grow: {later} > {earlier}", x
        )
    expect(errors[-1] < float(x.square().sum()), codec, "twelve steps brought the base no nearer to the tensor", x)


def check_threads(codec: Codec, device: str | torch.device = "cpu") -> None:
    """A payload decodes to the same bits whatever the number of threads."""
    x = sample("laplace", (515, 300)).to(device)
    payload = codec.encode(x)
    before = torch.get_num_threads()
    try:
        decoded = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            decoded.append(as_bytes(codec.decode(payload, x.shape, x.dtype)))
    finally:
        torch.set_num_threads(before)
    expect(torch.equal(*decoded), codec, "one thread and two decode to different bits", x)


@contextmanager
def surroundings() -> Iterator[None]:
    """Autocast and a default dtype of a caller, by which no payload and no value may change."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with ExitStack() as entered:
            for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
                entered.enter_context(torch.autocast(kind, torch.bfloat16))
            yield
    finally:
        torch.set_default_dtype(before)


def check_surroundings(codec: Codec, device: str | torch.device = "cpu") -> None:
    """Payloads and values are the same bits under autocast and with another default dtype."""
    what = "where its caller has set autocast to bfloat16 and the default dtype to float64"
    remedy = "name the dtype of every tensor it makes, and compute under compactdist.codecs.base.undisturbed"
    for dtype in (torch.float32, torch.bfloat16):
        x = sample("gaussian", (130, 96), dtype).to(device)
        payload = codec.encode(x)
        y = as_bytes(codec.decode(payload, x.shape, dtype))
        with surroundings():
            try:
                other = codec.encode(x)
                again = as_bytes(codec.decode(payload, x.shape, dtype))
            except Exception as error:
                raise AssertionError(f"{codec!r}: raised {type(error).__name__} {what}: {error}; {remedy}") from error
        expect(torch.equal(payload, other), codec, f"encode makes another payload {what}; {remedy}", x)
        expect(torch.equal(y, again), codec, f"decode gives other bits {what}; {remedy}", x)
