"""The transform codec: what the allocation and the planes promise, both ends alike on any kernels, and its quality."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compactdist import codecs, kernels
from compactdist.cli.evaluate import play as play_trace
from compactdist.codecs.transform import ends, products, transform
from compactdist.codecs.transform.basis import first_basis, plain_basis, rows_of
from compactdist.codecs.transform.coding import Layout, Spread, Weights
from compactdist.codecs.transform.depths import allocate
from compactdist.codecs.transform.levels import SCALAR
from compactdist.codecs.transform.products import LARGEST_SUM, LARGEST_WEIGHT, Products, forward_dtype, gram
from compactdist.config import Options
from compactdist.errors import CodecConfigError, ConfigError
from compactdist.kernels.cpu import component_steps
from compactdist.kernels.reference.rotations import next_places, sweep
from compactdist.kernels.spec import MatrixView
from compactdist.observe.estimate import estimate
from compactdist.observe.trace import Trace
from compactdist.state import ResidualDecoder, ResidualEncoder, StreamConfig
from compactdist.state.decoder import StreamDecoder
from compactdist.state.encoder import StreamEncoder
from compactdist.state.staged import Wanted
from tests.codecs import kit

DIGITS = Path(__file__).parents[2] / "benchmarks" / "traces" / "digits_ring.safetensors"
STEPS = 28
bounded = settings(max_examples=60, deadline=None, derandomize=True)


def moving(steps: int = STEPS, rows: int = 40, channels: int = 48) -> list[torch.Tensor]:
    """Values whose channels and changes are correlated alike."""
    g = torch.Generator().manual_seed(3)
    mixed = torch.randn(6, channels, generator=g)
    x = torch.randn(rows, 6, generator=g) @ mixed + 0.05 * torch.randn(rows, channels, generator=g)
    values = []
    for _ in range(steps):
        x = x + 0.1 * (torch.randn(rows, 6, generator=g) @ mixed) + 0.01 * torch.randn(rows, channels, generator=g)
        values.append(x.bfloat16())
    return values


# ---- allocation, levels, planes


@bounded
@given(codes=st.lists(st.integers(0, 255), min_size=1, max_size=60), share=st.floats(0, 1))
def test_bits_are_given_to_the_strongest_claims(codes, share):
    given_codes = torch.tensor(codes, dtype=torch.uint8)
    planes = round(share * SCALAR.deepest * len(codes))
    bits = allocate(given_codes, planes, SCALAR)
    assert int(bits.sum()) == planes
    assert int(bits.min()) >= 0
    assert int(bits.max()) <= SCALAR.deepest
    order = sorted(range(len(codes)), key=lambda k: (-codes[k], k))
    assert [int(bits[k]) for k in order] == sorted((int(b) for b in bits), reverse=True)


def test_a_bit_goes_where_it_is_worth_most():
    """Twice the amplitude is worth one bit more, give or take rounding."""
    bits = allocate(torch.tensor([255, 247, 239, 231], dtype=torch.uint8), 10, SCALAR)
    assert bits.tolist() == [4, 3, 2, 1]


@pytest.mark.parametrize("depth", range(1, SCALAR.deepest + 1))
def test_levels_are_symmetric_whole_numbers(depth):
    values = SCALAR.whole(depth)
    assert len(values) == 2**depth
    assert values == tuple(sorted(values))
    assert values[-1] == 127
    assert all(a == -b for a, b in zip(values, reversed(values), strict=True))
    assert len(SCALAR.borders(depth)) == len(values) - 1


# ---- arithmetic that both ends share


@pytest.mark.parametrize("of_a_kind", [True, False])
def test_products_are_exact_in_any_order_and_precision(of_a_kind):
    """Weights as large as they get: two components alone, or all of a block."""
    g = torch.Generator().manual_seed(0)
    whole, counts = torch.randint(-127, 128, (124, 2500), generator=g).float(), [60, 0, 64]
    each = LARGEST_SUM // 64 if of_a_kind else LARGEST_WEIGHT
    weights = torch.randint(-each, each + 1, (124, 64), generator=g).float()
    if not of_a_kind:
        weights[8:60], weights[68:] = 0, 0
    whole[:, :9] = 127 * torch.where(weights[:, :9] < 0, -1, 1)
    exact = [a.double().mT @ b.double() for a, b in zip(whole.split(counts), weights.split(counts), strict=True)]
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.equal(gram(whole), (whole.double() @ whole.double().mT).float())
                made = Products(whole.to(torch.int8), weights, counts)
                out = torch.full((2500, 3 * 64), torch.nan)
                made.write(out)
                assert torch.equal(out.double(), torch.cat(exact, 1))
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("rows", "width", "counts"), [(130, 66, [66, 0, 5]), (17, 30, [1, 2]), (64, 128, [128])])
@pytest.mark.parametrize("of_a_kind", [True, False])
def test_products_of_bytes_are_put_out_as_those_of_floats(rows, width, counts, of_a_kind):
    """Rows that fill no run of 64, blocks that fill no register, a block without components, the largest sums."""
    if not component_steps.multiplies_bytes():
        pytest.skip("this processor does not multiply bytes")
    g = torch.Generator().manual_seed(rows)
    levels = torch.randint(-127, 128, (sum(counts), rows), generator=g).to(torch.int8)
    each = LARGEST_SUM // max(counts) if of_a_kind else LARGEST_WEIGHT
    weights = torch.randint(-each, each + 1, (sum(counts), width), generator=g).float().clamp(-16256, 16256)
    if not of_a_kind:
        weights[:, 0] = 0
        for start in np.cumsum([0, *counts[:-1]]):
            weights[start + 8 :] = 0
    levels[:, 0] = 127 * torch.where(weights[:, 1] < 0, -1, 1)
    made, channels = Products(levels, weights, counts), len(counts) * width - 3
    view = MatrixView(2 * rows * channels, 2, rows, channels)
    units, scales = torch.rand(2, len(counts) * width, generator=g) / 4e6, torch.rand(2, rows, generator=g)
    before = torch.get_num_threads()
    try:
        for threads, dtype in ((1, torch.bfloat16), (2, torch.float32)):
            torch.set_num_threads(threads)
            terms = torch.randn(2, view.numel, generator=g).to(dtype).unbind()
            expected, out = (torch.full((view.numel,), torch.nan, dtype=dtype) for _ in range(2))
            matrix = torch.full((2, rows, len(counts) * width), torch.nan)
            for group in range(2):
                made.write(matrix[group])
            component_steps.put_out(matrix, units, scales, terms, view, expected)
            for group in range(2):
                component_steps.put_out_bytes(*made, units[group], scales[group], terms, view, group, out)
            assert torch.equal(kit.as_bytes(out), kit.as_bytes(expected))
    finally:
        torch.set_num_threads(before)


def test_weights_stay_within_what_products_can_hold():
    g = torch.Generator().manual_seed(1)
    rows, _ = torch.linalg.qr(torch.randn(512, 512, generator=g))
    codes = torch.full((512,), 255, dtype=torch.uint8)
    for bits in (0.05, 1, 8):
        weights = Weights.of(rows[None], Spread.of(codes, Layout.of(100, 512, bits, 512)))
        assert float(weights.whole.abs().max()) <= LARGEST_WEIGHT
        assert 127 * float(weights.whole.abs().sum(0).max()) < 2**24
        assert float(weights.whole.abs().max()) > 2**10


@pytest.mark.parametrize("n", [2, 4, 6, 10, 128])
def test_a_sweep_turns_every_pair_once(n):
    places, seen = list(range(n)), set()
    for _ in range(n - 1):
        seen |= {frozenset((places[i], places[i + n // 2])) for i in range(n // 2)}
        places = [places[source] for source in next_places(n)]
    assert len(seen) == n * (n - 1) // 2
    assert places == list(range(n))


@pytest.mark.parametrize("n", [4, 6, 48, 128])
def test_the_compiled_sweep_gives_the_bits_of_the_reference(n):
    g = torch.Generator().manual_seed(n)
    some = torch.randn(3, 200, n, generator=g) * torch.rand(n, generator=g)
    matrices, basis = some.mT @ some / 200, torch.eye(n).repeat(3, 1, 1)
    matrices = (matrices + matrices.mT) / 2
    sizes = [n, 4, max(4, n // 4 * 2)]
    for smallest in (1e-6, 1e-3, 1e-6):
        with kernels.use("cpu"):
            fast = kernels.rotate(matrices, basis, sizes, smallest)
        slow = sweep(matrices, basis, sizes, smallest)
        assert torch.equal(fast[0], slow[0])
        assert torch.equal(fast[1], slow[1])
        matrices, basis = slow


def test_sweeps_diagonalise_and_keep_the_basis_orthonormal():
    values = moving(1, 200, 32)[0].float()[None, None]
    basis = first_basis(values)
    rows = rows_of(basis.rows)
    assert torch.allclose(rows @ rows.mT, torch.eye(32)[None, None], atol=2e-4)
    covariance = rows @ values.mT @ values @ rows.mT
    energies = covariance.diagonal(0, -2, -1)
    assert float((covariance - torch.diag_embed(energies)).norm()) < 5e-3 * float(covariance.norm())
    assert torch.allclose(basis.energies / basis.energies.max(), energies / energies.max(), atol=1e-2)


# ---- in the loop


def play(codec: str, values: list[torch.Tensor], **options: object) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Frames and what came out."""
    encoder, decoder = ResidualEncoder(codec, **options), ResidualDecoder(codec, **options)
    frames, out = [], []
    for x in values:
        frames.append(encoder.encode(x))
        out.append(decoder.decode(frames[-1]))
        assert torch.equal(kit.as_bytes(encoder.state), kit.as_bytes(decoder.state))
    return frames, out


@pytest.mark.parametrize("bits", [0.4, 1, 4.5])
def test_decoding_is_the_same_on_all_kernels_and_threads(bits):
    """Basis updates included, over a request; an encoder on other kernels may choose other payloads."""
    values = moving()
    codec = f"transform:bits={bits}"
    frames, out = play(codec, values)
    before = torch.get_num_threads()
    try:
        for which, threads in (("reference", 1), ("cpu", 1), ("cpu", 2)):
            torch.set_num_threads(threads)
            decoder = ResidualDecoder(codec)
            with kernels.use(which):
                for frame, expected in zip(frames, out, strict=True):
                    assert torch.equal(decoder.decode(frame), expected)
    finally:
        torch.set_num_threads(before)


def test_a_learnt_basis_beats_the_channels_as_they_are():
    values = moving()
    errors = []
    for learns in (True, False):
        config = StreamConfig(find_layout=False)
        encoder = StreamEncoder(config, 0, "test")
        error = 0.0
        for step, x in enumerate(values):
            codec, hint = codecs.get("transform:bits=1"), MatrixView(x.numel(), 1, *x.shape)
            staged = encoder.stage(x.view(-1), codec, Wanted(value=True, hint=hint), keyframe=step == 0)
            encoder.commit(staged)
            if not learns and encoder._form is not None:
                encoder._form.session._basis = plain_basis((1, 1), x.shape[1], x.device)
            error += float((staged.value.view_as(x).float() - x.float()).norm())
        errors.append(error)
    assert errors[0] < 0.4 * errors[1]


def test_a_rolled_back_frame_changes_nothing():
    x, y = (value.view(-1) for value in moving(2))
    view = MatrixView(x.numel(), 1, 40, 48)
    codec = codecs.get("transform")
    session, other = (codec.open(view, x.dtype, x.device) for _ in range(2))
    payloads = torch.empty(3, session.payload_nbytes, dtype=torch.uint8)
    session.encode(y.flip(0), (x,), None, payloads[0])
    session.rollback()
    session.commit()
    assert session.held_bytes == 0
    session.encode(y, (x,), None, payloads[1])
    other.encode(y, (x,), None, payloads[2])
    assert torch.equal(payloads[1], payloads[2])


def test_estimate_counts_what_sessions_hold():
    values, config = moving(3), StreamConfig(find_layout=False)
    codec, encoder = codecs.get("transform"), StreamEncoder(config, 0, "test")
    for step, x in enumerate(values):
        hint = MatrixView(x.numel(), 1, *x.shape)
        encoder.commit(encoder.stage(x.view(-1), codec, Wanted(value=True, hint=hint), keyframe=step == 0))
    options = Options(codec="transform")
    held = [estimate(options, 2, x.numel(), op="send", channels=channels).state_bytes for channels in (None, 48)]
    assert encoder._form is not None
    assert held[1] - held[0] == encoder._form.session.held_bytes == 48 * (2 * 48 + 4)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 200, 101), torch.bfloat16), ((3, 65, 48), torch.float32), ((2, 7, 30), torch.float16)]
)
@pytest.mark.parametrize("bits", [0.4, 4])
def test_compiled_loops_write_the_bytes_of_the_reference(bits, shape, dtype):
    """Payloads and reconstructions of a frame with one term, on 1 and 2 threads; channels that do not fill blocks."""
    g = torch.Generator().manual_seed(5)
    view = MatrixView(math.prod(shape), *shape)
    base, x = torch.randn(2, view.numel, generator=g).to(dtype)
    results, before = [], torch.get_num_threads()
    try:
        for which, threads in (("reference", 1), ("cpu", 1), ("cpu", 2)):
            torch.set_num_threads(threads)
            with kernels.use(which):
                session = codecs.get("transform", bits=bits, block=60).open(view, dtype, torch.device("cpu"))
                payload, out = torch.empty(session.payload_nbytes, dtype=torch.uint8), torch.empty_like(x)
                session.encode(x, (base,), out, payload)
                session.commit()
                results.append((payload, out, *session.shared_memory))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@pytest.mark.timeout(60)
def test_a_frame_waits_for_what_another_thread_prepares(monkeypatch):
    """A receiver that learns in one thread, slowly, while the next frame arrives in another."""
    values = [x.view(-1) for x in moving(4)]
    view = MatrixView(values[0].numel(), 1, *moving(1)[0].shape)
    sender, alone, shared = (
        codecs.get("transform", bits=2).open(view, torch.bfloat16, torch.device("cpu")) for _ in range(3)
    )
    followed, begun = transform.followed, threading.Event()

    def slowly(*given):
        begun.set()
        time.sleep(0.2)
        return followed(*given)

    payload, base = torch.empty(sender.payload_nbytes, dtype=torch.uint8), values[0]
    for x in values[1:]:
        out, one, two = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
        sender.encode(x, (base,), out, payload)
        for session, got in ((alone, one), (shared, two)):
            session.decode(payload, (base,), got)
        assert torch.equal(kit.as_bytes(one), kit.as_bytes(out))
        assert torch.equal(kit.as_bytes(two), kit.as_bytes(out))
        for session in (sender, alone, shared):
            session.commit()
        sender.prepare()
        alone.prepare()
        begun.clear()
        with monkeypatch.context() as patch:
            patch.setattr(transform, "followed", slowly)
            thread = threading.Thread(target=shared.prepare)
            thread.start()
            assert begun.wait(10)
        base = out
    thread.join()
    assert all(torch.equal(one, two) for one, two in zip(alone.shared_memory, shared.shared_memory, strict=True))


@pytest.mark.timeout(120)
def test_a_forward_in_bfloat16_costs_little(monkeypatch):
    """Even where few components take all bits, 8 each: 0.05 dB. Whatever a sender chose, kernels decode it alike."""
    values = moving(2, 600, 480)
    view = MatrixView(values[0].numel(), 1, *values[0].shape)
    errors = {}
    for kept in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(ends, "forward_dtype", lambda *given, to=kept: to)
        outs = []
        for which in ("reference", "cpu"):
            with kernels.use(which):
                session = codecs.get("transform", bits=2).open(view, torch.bfloat16, torch.device("cpu"))
                payload = torch.empty(session.payload_nbytes, dtype=torch.uint8)
                out = torch.empty_like(values[1].view(-1))
                session.encode(values[1].view(-1), (values[0].view(-1),), out, payload)
            outs.append((payload, out))
        assert torch.equal(kit.as_bytes(outs[0][1]), kit.as_bytes(outs[1][1]))
        errors[kept] = float((outs[0][1].float() - values[1].view(-1).float()).norm())
    assert errors[torch.bfloat16] < 1.01 * errors[torch.float32]


def test_bfloat16_is_for_large_residuals_and_few_bits():
    cpu, tiles = torch.device("cpu"), torch.bfloat16 if products._has_tiles() else torch.float32
    assert forward_dtype((1, 4096, 3072), 2.0, cpu) == tiles
    assert forward_dtype((1, 4096, 3072), 2.5, cpu) == torch.float32
    assert forward_dtype((1, 64, 3072), 1.0, cpu) == torch.float32
    assert forward_dtype((1, 4096, 3072), 1.0, torch.device("meta")) == torch.float32


def test_what_was_learnt_ends_with_a_keyframe():
    """A receiver that begins with a keyframe, as one that frames are passed on to, reads what follows."""
    values = moving(6)
    config, codec = StreamConfig(find_layout=False), codecs.get("transform")
    encoder, first, late = StreamEncoder(config, 0, "test"), StreamDecoder(config, 0, "test"), None
    hint = MatrixView(values[0].numel(), 1, *values[0].shape)
    for step, x in enumerate(values):
        keyframe = step in (0, 3)
        staged = encoder.stage(x.view(-1), codec, Wanted(value=True, hint=hint), keyframe=keyframe)
        encoder.commit(staged)
        if step == 3:
            late = StreamDecoder(config, 0, "test")
            late.sequence = first.sequence
        for decoder in (first, late):
            if decoder is not None:
                out = decoder.decode(staged.frame, codec, x.numel(), x.dtype, hint=hint)
                assert torch.equal(out, staged.value)


def test_needs_error_feedback():
    encoder = ResidualEncoder("transform", error_feedback=False)
    x = moving(1)[0]
    encoder.encode(x)
    with pytest.raises(ConfigError, match="the two ends do not share with error_feedback=False"):
        encoder.encode(x)


@pytest.mark.parametrize("bits", [0, 0.01, 8.5, True, "1", math.nan])
def test_bits_out_of_range(bits):
    with pytest.raises(CodecConfigError, match=r"bits must be a number from 0\.05 to 8"):
        codecs.get("transform", bits=bits)


# ---- quality


def test_ten_decibels_below_binary_at_fewer_bytes():
    names = ("binary", "int2", "transform:bits=0.95", "transform:bits=2", "transform:bits=0.3")
    scores = play_trace(Trace(DIGITS), {name: codecs.get(name) for name in names}, StreamConfig())
    binary, int2, low, mid, least = (scores[name].residuals for name in names)
    assert low.bits_per_element < 1.15 < binary.bits_per_element
    assert low.nmse_db < binary.nmse_db - 9
    assert mid.bits_per_element < int2.bits_per_element
    assert mid.nmse_db < int2.nmse_db - 9
    assert least.bits_per_element < 0.4 * binary.bits_per_element
    assert least.nmse_db < binary.nmse_db + 2
