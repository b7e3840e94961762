"""The fused steps against the reference: the same payload bytes and the same reconstruction, bit for bit."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from compactdist import codecs
from compactdist.codecs import Codec
from compactdist.errors import NonFiniteError, PayloadError
from compactdist.kernels import steps_for, use
from compactdist.kernels.cpu import call, native
from compactdist.kernels.cpu import steps as cpu
from compactdist.kernels.spec import MatrixView, QuantizerSpec
from compactdist.state.matrix_view import Layout, blocks, plain
from tests.codecs import kit
from tests.quick import quick_for, quick_rows

pytest.importorskip("numba")

CODECS = ("binary", "int2", "int3", "int4", "int8", "ternary", "fp8")
FORMS = (
    *({"id": codec_id} for codec_id in CODECS),
    *({"id": codec_id, "scales": "block"} for codec_id in CODECS),
    {"id": "fp8", "format": "e5m2"},
    {"id": "fp8", "format": "e5m2", "scales": "block"},
    {"id": "int2", "scales": "block", "block": 96},
    {"id": "int8", "scales": "block", "block": 33},
    {"id": "int4", "scales": "block", "block": 1000},
    {"id": "int4", "centroids": "uniform"},
    {"id": "int3", "scales": "block", "centroids": "uniform"},
    {"id": "int4", "scales": "block", "centroids": "minmax"},
    {"id": "binary", "scales": "rank"},
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dtypes_of(form: Any) -> tuple[torch.dtype, torch.dtype]:
    """Two dtypes of a form, or of a codec by its id: bfloat16, and by the codec float32 or float16.

    What loads and stores elements knows nothing of codes, and what codes knows nothing of dtypes, but Numba compiles
    each pair of them by itself, which takes a second.
    """
    number = CODECS.index(form if isinstance(form, str) else form["id"])
    return torch.bfloat16, (torch.float32, torch.float16)[number % 2]


FORMS_AND_DTYPES = [(form, dtype) for form in FORMS for dtype in dtypes_of(form)]
SOME_FORMS = FORMS[: 2 * len(CODECS) : 2]
CODECS_AND_DTYPES = [(codec_id, dtype) for codec_id in CODECS for dtype in dtypes_of(codec_id)]
VIEWS = (
    *(plain(g * r * c, g, c) for g, r, c in itertools.product((1, 3), (1, 2, 33, 63, 64, 65), (8, 56, 64, 72))),
    plain(70 * 3072, 1, 3072),
    plain(97 * 264, 1, 264),
    plain(200 * 136, 1, 136),
    plain(40 * 65, 1, 65),
    *(blocks(n) for n in (1, 17, 128, 129, 300, 128 * 64, 128 * 70 + 3)),
    Layout("(kv b h s d) -> kv (b s) (h d)", kv=2, b=2, h=3, d=32).resolve(2 * 2 * 3 * 33 * 32),
    Layout("(b h s d) -> 1 (b s) (h d)", b=2, h=5, d=24).resolve(2 * 5 * 35 * 24),
    Layout("(b h s d) -> (b h) s d", b=2, h=5, d=64).resolve(2 * 5 * 20 * 64),
    Layout("(s kv h d) -> (kv h) s d", kv=2, h=2, d=64).resolve(66 * 4 * 64),
    Layout("(h s d) -> 1 s (d h)", h=3, d=8).resolve(3 * 40 * 8),
)


def _special(kind: str, view: MatrixView, g: torch.Generator) -> Tensor:
    x = torch.zeros(view.numel, dtype=torch.float64)
    noise = torch.randn(view.numel, generator=g, dtype=torch.float64)
    if kind == "constant":
        x += 0.75
    elif kind == "denormal":
        x = noise * 2.0**-130
    elif kind == "denormal-and-normal":
        x = torch.where(noise > 0, noise, noise * 2.0**-128)
    elif kind == "huge":
        x = noise.clamp(-1, 1) * 1.6e38
    elif kind == "wide":
        x = noise * torch.exp2(torch.randn(view.numel, generator=g, dtype=torch.float64) * 40)
    elif kind == "one-hot":
        x[int(torch.randint(view.numel, (), generator=g))] = -3.0
    elif kind == "L":
        rows = torch.arange(view.numel) // view.channels
        x = torch.where((rows == 0) | (torch.arange(view.numel) % view.channels == 0), noise * 100, noise * 1e-3)
    elif kind == "zero-rows":
        x = noise * (torch.arange(view.numel) // view.channels % 3 == 0)
    elif kind == "gaussian":
        x = noise
    return x


KINDS = (
    "zeros",
    "constant",
    "denormal",
    "denormal-and-normal",
    "huge",
    "wide",
    "one-hot",
    "L",
    "zero-rows",
    "gaussian",
)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max / 2
    return x.clamp(-limit, limit).to(dtype)


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _both(spec: str | dict[str, Any] | Codec, x: Tensor, terms: tuple[Tensor, ...], view: MatrixView):
    codec = codecs.get(spec)
    expected, got = torch.empty_like(x), torch.empty_like(x)
    with use("reference"):
        reference = kit.encode_residual(codec, x, terms, view, expected)
    room = torch.full((reference.numel() + 16,), 255, dtype=torch.uint8)[16:]  # nothing of it may stay
    with use("cpu"):
        kit.encode_residual(codec, x, terms, view, got, room)
        assert torch.equal(room, reference)
        assert torch.equal(_bytes(got), _bytes(expected))
        again, copy = torch.empty_like(x), torch.empty(x.numel() + 1, dtype=x.dtype)[1:]  # begins no cache line
        assert torch.equal(kit.encode_residual(codec, x, terms, view, again, copy=copy), reference)
        assert torch.equal(_bytes(again), _bytes(expected))
        assert torch.equal(_bytes(copy), _bytes(expected))
        assert torch.equal(kit.encode_residual(codec, x, terms, view), reference)
        in_place = terms[0].clone() if terms else torch.empty_like(x)
        kit.decode_residual(codec, room, (in_place, *terms[1:]) if terms else (), view, in_place)
        assert torch.equal(_bytes(in_place), _bytes(expected))


@pytest.mark.slow
@given(
    pair=st.sampled_from(FORMS_AND_DTYPES),
    view=st.sampled_from(VIEWS),
    kind=st.sampled_from(KINDS),
    terms=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
@pytest.mark.timeout(400)
@settings(phases=[Phase.explicit, Phase.generate], deadline=None, max_examples=400)
def test_same_bytes_as_the_reference(pair, view, kind, terms, seed):
    spec, dtype = pair
    g = torch.Generator().manual_seed(seed)
    change, size = _special(kind, view, g), 1 if kind == "gaussian" else 0.01
    base = _cast(torch.randn(view.numel, generator=g) * size, dtype) if terms else None
    velocity = _cast(torch.randn(view.numel, generator=g) * size / 8, dtype) if terms > 1 else None
    given = tuple(term for term in (base, velocity) if term is not None)
    _both(spec, _cast(change if base is None else base.double() + change, dtype), given, view)


@pytest.mark.parametrize("shape", [(300,), (70, 72), (3, 33, 64), (2, 40, 3, 24), (1, 200), (5, 1, 64)])
@pytest.mark.parametrize("spec", quick_for(SOME_FORMS, FORMS), ids=str)
def test_encode_and_decode_take_the_same_kernels(spec, shape):
    codec = codecs.get(spec)
    for dtype in (*dtypes_of(spec), torch.float64):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
        with use("reference"):
            payload = codec.encode(x)
            expected = codec.decode(payload, shape, dtype)
        with use("cpu"):
            assert torch.equal(codec.encode(x), payload)
            got = codec.decode(payload, shape, dtype)
        assert got.shape == expected.shape
        assert torch.equal(_bytes(got), _bytes(expected))


@pytest.mark.parametrize(
    ("codec_id", "dtype"), quick_rows([(codec_id, torch.bfloat16) for codec_id in CODECS[::2]], CODECS_AND_DTYPES)
)
def test_same_bytes_in_every_arrangement(codec_id, dtype):
    for seed, view in enumerate(VIEWS):
        g = torch.Generator().manual_seed(seed)
        base = torch.randn(view.numel, generator=g).to(dtype)
        _both(codec_id, (base.float() + _special("L", view, g)).to(dtype), (base,), view)


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "dtype"), FORMS_AND_DTYPES, ids=str)
def test_same_bytes_past_the_caches(spec, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "STREAMED_NBYTES", 0)
    g = torch.Generator().manual_seed(5)
    for view in (plain(70 * 200, 1, 200), blocks(128 * 70 + 3), VIEWS[-2]):
        x, base = (torch.randn(view.numel, generator=g).to(dtype) for _ in range(2))
        _both(spec, x, (base,), view)


@pytest.mark.parametrize("spec", quick_for(SOME_FORMS, FORMS), ids=str)
def test_ordinary_values_are_not_left_to_the_reference(spec):
    """Steps that declined everything would pass the other tests."""
    codec, taken = codecs.get(spec), 0
    for dtype, view in itertools.product(
        dtypes_of(spec), (plain(400 * 1024, 1, 1024), blocks(128 * 70 + 3), VIEWS[-2])
    ):
        x, base, out = (torch.randn(view.numel, generator=torch.Generator().manual_seed(6)).to(dtype) for _ in range(3))
        steps = _steps(codec, view, dtype)
        if steps is not None:
            payload = torch.empty(codec.payload_nbytes(view.shape, dtype), dtype=torch.uint8)
            assert steps.encode(x + base, (base,), out, payload)
            assert steps.decode(payload, (base,), out)
            taken += 1
    assert taken or codec.spec is None or codec.spec.kind == "trits", "for which there are no fused steps"


def _steps(codec: Codec, view: MatrixView, dtype: torch.dtype = torch.float32):
    with use("cpu"):
        return None if codec.spec is None else steps_for(codec.spec, view, dtype, torch.device("cpu"))


def test_levels_too_uneven_to_be_looked_up_are_left_to_the_reference():
    """Two borders between the same whole numbers of grains, of which there are sixteen: no codec of ours."""
    view = plain(70 * 64, 1, 64)
    assert cpu.plan_of(codecs.get("int3").spec, view, "float32") is not None
    assert cpu.plan_of(QuantizerSpec("nearest", 3, (0.01, 0.02, 0.03, 9.0)), view, "float32") is None


@pytest.mark.parametrize(
    ("spec", "dtype"), quick_rows([(form, torch.bfloat16) for form in SOME_FORMS], FORMS_AND_DTYPES), ids=str
)
def test_a_new_base_need_not_begin_a_cache_line(spec, dtype):
    """What is streamed has to, or the processor refuses."""
    codec, view = codecs.get(spec), plain(70 * 256, 1, 256)
    x, base = (torch.randn(view.numel, generator=torch.Generator().manual_seed(7)).to(dtype) for _ in range(2))
    expected, got = torch.empty_like(x), torch.empty(view.numel + 1, dtype=dtype)[1:]
    with use("reference"):
        payload = kit.encode_residual(codec, x, (base / 8,), view, expected)
    with use("cpu"):
        assert torch.equal(kit.encode_residual(codec, x, (base / 8,), view, got), payload)
    assert torch.equal(_bytes(got), _bytes(expected))


def test_what_is_large_and_begins_a_cache_line_goes_past_the_caches():
    view = plain(cpu.STREAMED_NBYTES, 1, 1024)
    steps = _steps(codecs.get("int8"), view)
    session = codecs.get("int8").open(view, torch.float32, torch.device("cpu"))
    x, room = torch.randn(view.numel), torch.empty(view.numel + 64)
    payload = torch.empty(session.payload_nbytes, dtype=torch.uint8)
    assert room.data_ptr() % 64 == 0
    for shift in (0, 1):
        assert steps.encode(x, (), room[shift:][: view.numel], payload)
        assert steps._encoders[False].slots[call.OUT_STREAMS] == 1 - shift
    small = _steps(codecs.get("int8"), plain(1 << 16, 1, 1024))
    assert small.encode(
        x[: 1 << 16], (), room[: 1 << 16], payload[: codecs.get("int8").payload_nbytes((64, 1024), x.dtype)]
    )
    assert small._encoders[False].slots[call.OUT_STREAMS] == 0


@pytest.mark.parametrize("codec_id", CODECS)
def test_same_reconstruction_of_any_payload(codec_id):
    """Bytes no encoder makes: scales beyond one, infinite and negative ones. NaN may differ in its bits only."""
    view, codec = plain(2 * 70 * 72, 2, 72), codecs.get(codec_id)
    for seed, dtype in itertools.product(range(20), dtypes_of(codec_id)):
        g = torch.Generator().manual_seed(seed)
        payload = torch.randint(256, (codec.payload_nbytes(view.shape, torch.float32),), generator=g).to(torch.uint8)
        base, expected, got = (torch.randn(view.numel, generator=g).to(dtype) for _ in range(3))
        with use("reference"):
            kit.decode_residual(codec, payload, (base,), view, expected)
        with use("cpu"):
            kit.decode_residual(codec, payload, (base,), view, got)
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(_bytes(got.nan_to_num()), _bytes(expected.nan_to_num()))


def test_the_fused_steps_are_what_runs():
    view = plain(64 * 64, 1, 64)
    for codec_id in CODECS:
        assert isinstance(_steps(codecs.get(codec_id), view), cpu.CpuSteps)
    for codec_id in ("binary", "int2", "int4", "int8", "int3"):
        assert _steps(codecs.get(codec_id, scales="block"), view) is not None
    assert _steps(codecs.get("binary"), plain(40 * 65, 1, 65)) is None, "rows that share bytes"
    assert _steps(codecs.get("int2"), plain(40 * 65, 1, 65)) is not None
    assert _steps(codecs.get("binary"), view, torch.float64) is None
    steps, x = _steps(codecs.get("binary"), view), torch.randn(view.numel)
    payload = torch.empty(codecs.get("binary").payload_nbytes(view.shape, x.dtype), dtype=torch.uint8)
    assert steps.encode(x, (x / 2,), torch.empty_like(x), payload)
    for wrong in (x.half(), x.double(), x[:-1], torch.empty(view.numel, device="meta")):
        assert not steps.encode(wrong, (x,), None, payload)
        assert not steps.encode(x, (wrong,), None, payload)
        assert not steps.encode(x, (), wrong, payload)
        assert not steps.decode(payload, (wrong,), x)
        assert not steps.decode(payload, (), wrong)
    for wrong in (payload[1:], payload.view(torch.int8), torch.empty(2 * payload.numel(), dtype=torch.uint8)[::2]):
        assert not steps.encode(x, (), None, wrong)
        assert not steps.decode(wrong, (), x)


def test_kernels_can_be_switched_under_open_sessions():
    view = plain(64 * 64, 1, 64)
    session, x = codecs.get("int4").open(view, torch.float32, torch.device("cpu")), torch.randn(64 * 64)
    payload = torch.empty(session.payload_nbytes, dtype=torch.uint8)

    def steps():
        session.encode(x, (), None, payload)
        return session._steps

    assert steps() is None, "too small"
    with use("cpu"):
        assert isinstance(steps(), cpu.CpuSteps)
        with use("reference"):
            assert steps() is None
        assert isinstance(steps(), cpu.CpuSteps)
    assert steps() is None
    with pytest.raises(ValueError, match="tpu"), use("tpu"):
        pass


def test_a_step_takes_few_calls():
    view = plain(512 * 512, 1, 512)
    session, x = codecs.get("int4").open(view, torch.float32, torch.device("cpu")), torch.randn(view.numel)
    payload, base, out = torch.empty(session.payload_nbytes, dtype=torch.uint8), torch.randn(view.numel), x.clone()
    counted = {}
    for name, step in (
        ("encode", lambda: session.encode(x, (base,), out, payload)),
        ("decode", lambda: session.decode(payload, (base,), out)),
    ):
        step()
        calls = []
        sys.setprofile(lambda frame, event, argument, calls=calls: calls.append(frame) if event == "call" else None)
        step()
        sys.setprofile(None)
        counted[name] = len(calls) - 1  # the lambda
    assert counted["encode"] <= 3
    assert counted["decode"] <= 3


def test_every_16_bit_pattern_is_converted_as_torch_does():
    from compactdist.kernels.cpu.simd.memory import load_first, rounded_for, store_first
    from compactdist.kernels.cpu.simd.slots import ELEMENTS_AT

    def convert(x: Tensor, out: Tensor) -> None:
        from_at, to_at = (ELEMENTS_AT[cpu.DTYPES[one.dtype]] for one in (x, out))

        def body(args):
            source, target, count = from_at(args, 0), to_at(args, 4), args[13]
            for j in range(0, count, 64):
                store_first(rounded_for(target, load_first(source, j, count - j)), target, j, count - j)
            return 0

        block = cpu.Block(native.build(body), {0: x.data_ptr(), 4: out.data_ptr(), 13: x.numel()}, {})
        block.run(block.address)

    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    infinity = torch.tensor(torch.inf)
    for dtype in (torch.bfloat16, torch.float16):
        x, largest = patterns.view(dtype), torch.finfo(dtype).max
        finite = x[x.isfinite()]
        wide = torch.zeros(finite.numel() + 1)
        convert(finite, wide[:-1])
        assert torch.equal(_bytes(wide[:-1]), _bytes(finite.float()))
        assert wide[-1] == 0, "written past the end"
        # each value, the middles between neighbours, and what lies just beside those
        ordered = finite.float().sort().values
        middles = (ordered[1:].double() + ordered[:-1].double()).div(2).float()
        values = torch.cat([finite.float(), middles, middles.nextafter(infinity), middles.nextafter(-infinity)])
        values = torch.cat([values, torch.tensor([0.0, -0.0, 1e30, 3.4e38, torch.inf, -torch.inf])])
        narrow = torch.empty(values.numel(), dtype=dtype)
        convert(values, narrow)
        assert torch.equal(_bytes(narrow), _bytes(values.clamp(-largest, largest).to(dtype)))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("codec_id", "dtype"), CODECS_AND_DTYPES)
def test_not_finite_is_found_and_nothing_written(codec_id, dtype, bad):
    view, codec = plain(3 * 70 * 72, 3, 72), codecs.get(codec_id)
    x, base, out = (torch.randn(view.numel).to(dtype) for _ in range(3))
    x[-1] = bad
    before = out.clone()
    with use("cpu"), pytest.raises(NonFiniteError, match=f"1 of {view.numel} elements"):
        kit.encode_residual(codec, x, (base,), view, out)
    assert torch.equal(out, before)


@pytest.mark.parametrize("codec_id", CODECS)
def test_a_difference_beyond_float32_is_not_finite(codec_id):
    view = plain(70 * 72, 1, 72)
    x = torch.full((view.numel,), 3e38)
    with use("cpu"), pytest.raises(NonFiniteError):
        kit.encode_residual(codecs.get(codec_id), x, (-x,), view)


def test_a_payload_of_another_length_is_refused():
    view = plain(70 * 72, 1, 72)
    base = torch.randn(view.numel)
    with use("cpu"), pytest.raises(PayloadError):
        kit.decode_residual(codecs.get("int2"), torch.zeros(5, dtype=torch.uint8), (base,), view, base)


def test_strided_and_inference_tensors():
    view, codec = plain(70 * 72, 1, 72), codecs.get("int4")
    x = torch.randn(view.numel, 2)[:, 1]
    _both("int4", x, (), view)
    with torch.inference_mode():
        base = torch.randn(view.numel)
    payload, outs = kit.encode_residual(codec, x, (base,), view), []
    for kernels in ("reference", "cpu"):
        with torch.inference_mode():
            outs.append(base.clone())
        with use(kernels):
            kit.decode_residual(codec, payload, (outs[-1],), view, outs[-1])
    assert torch.equal(*outs)
    assert float((outs[0] - x).square().mean() / (x - base).square().mean()) < 0.02


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_same_bytes_on_a_processor_without_vector_extensions(tmp_path):
    """What Numba compiles for a plain processor: no AVX-512 permutation, no float16 conversion."""
    script = """
import torch
from compactdist.kernels.cpu.simd.vectors import HOST
from tests.kernels.test_fused_steps import _both, blocks, plain
assert not any(HOST.values())
views = {"token_channel": plain(70 * 264, 1, 264), "block": blocks(128 * 70 + 3)}
for (scales, view), codec_id, dtype in zip(views.items(), ("int4", "binary"), (torch.float16, torch.bfloat16)):
    base = torch.randn(view.numel, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = base + torch.randn(view.numel, generator=torch.Generator().manual_seed(1)).to(dtype) / 8
    _both({"id": codec_id, "scales": scales}, x, (base,), view)
"""
    plain_processor = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, **plain_processor}, timeout=480)
