"""The transform codec's Triton kernels: what is decoded and learnt has the bits of the reference, and nothing waits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from compactdist import codecs
from compactdist.codecs.scalar.quantized import finite_amax
from compactdist.codecs.transform import on_device
from compactdist.codecs.transform.basis import Basis, followed, plain_basis, rows_of
from compactdist.codecs.transform.coding import Layout, Spread, Weights
from compactdist.codecs.transform.levels import SCALAR
from compactdist.codecs.transform.on_device import spec_of, tables_of
from compactdist.codecs.transform.products import LARGEST_SUM, gram
from compactdist.errors import NonFiniteError
from compactdist.kernels import use
from compactdist.kernels.gpu import allotment, component_steps, components, fitting, following, rotations, trellis
from compactdist.kernels.gpu.component_steps import Learnt
from compactdist.kernels.gpu.launch import Launch
from compactdist.kernels.reference.rotations import sweep
from compactdist.kernels.spec import MatrixView
from compactdist.state import ResidualDecoder, ResidualEncoder
from compactdist.state.matrix_view import Layout as Hint
from compactdist.state.matrix_view import blocks, plain
from tests.kernels.gpu import kit
from tests.kernels.gpu.conftest import INTERPRETED
from tests.kernels.gpu.test_host_reads import NoReads
from tests.quick import quick_for

CASES = {
    "one bit": (plain(20 * 4, 1, 4), torch.bfloat16, 1.0, 4, 1),
    "odd rows and channels, a velocity": (plain(13 * 5, 1, 5), torch.float32, 3.0, 4, 2),
    "less than a plane": (plain(66 * 6, 1, 6), torch.float16, 0.05, 8, 1),
    "more rows than a tile": (plain(2 * 70 * 9, 2, 9), torch.bfloat16, 0.4, 5, 1),
    "more rows than are sampled": (plain(1100 * 4, 1, 4), torch.float32, 2.5, 4, 1),
    "pairs of channels": (plain(65 * 5, 1, 5), torch.float32, 7.5, 2, 2),
    "permuted": (Hint("(h s d) -> 1 s (d h)", h=3, d=4).resolve(3 * 7 * 4), torch.bfloat16, 4.0, 6, 1),
    "groups apart": (Hint("(b h s d) -> b s (h d)", b=2, h=2, d=4).resolve(2 * 2 * 9 * 4), torch.float16, 8.0, 8, 2),
    "a tail that is not there": (blocks(128 * 2 + 8), torch.float32, 1.5, 16, 1),
    "a wide block": (plain(40 * 24, 1, 24), torch.bfloat16, 0.7, 24, 1),
}
ON_A_TRELLIS = {
    "short courses": (plain(70 * 12, 1, 12), torch.bfloat16, 1.0, 12, 1),
    "a course of one turn": (plain(5 * 6, 1, 6), torch.float32, 2.5, 6, 2),
    "long courses": (plain(1090 * 6, 1, 6), torch.bfloat16, 1.5, 6, 1),
    "all bits": (plain(1024 * 4, 1, 4), torch.float32, 7.0, 4, 1),
    "more components than a program takes": (plain(2 * 20 * 70, 2, 70), torch.float16, 0.4, 64, 1),
}


KERNELS = (components.weigh_basis, components.decode_components, components.correlate)


def _values(view: MatrixView, dtype: torch.dtype, count: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(view.numel)
    mixed = torch.randn(3, view.channels, generator=g)
    rows, change = view.groups * view.rows, torch.zeros(view.shape)
    values = []
    for _ in range(count):
        change = change + (torch.randn(rows, 3, generator=g) @ mixed).view(view.shape)
        change = change + 0.1 * torch.randn(view.shape, generator=g)
        values.append(view.to_flat(change).to(dtype).contiguous())
    return values


def _check_stream(
    view: MatrixView, dtype: torch.dtype, bits: float, block: int, terms: int, steps: int, trellis: bool = False
) -> None:
    """Senders and receivers with the kernels and with the reference; then all begin again."""
    codec = codecs.get("transform", bits=bits, block=block, trellis=trellis)
    values = _values(view, dtype, steps + 1)
    here = torch.device("cpu")
    devices = here, here, kit.DEVICE, kit.DEVICE
    reference, receiver_here, sender, receiver = sessions = [codec.open(view, dtype, device) for device in devices]
    base = values[0]
    for step, x in enumerate(values[1:]):
        if step == 2:  # as if a keyframe had been sent
            for session in sessions:
                session.forget()
        given = (base, base / 8)[:terms]
        there = tuple(term.to(kit.DEVICE, copy=True) for term in given)
        payload, expected = torch.empty(reference.payload_nbytes, dtype=torch.uint8), torch.empty_like(x)
        made, out = torch.full_like(payload, 255, device=kit.DEVICE), torch.empty_like(x, device=kit.DEVICE)
        with use("reference"):
            reference.encode(x, given, expected, payload)
            reference.commit()
        with use("gpu"):
            sender.encode(x.to(kit.DEVICE), there, out, made)
            if INTERPRETED:  # elsewhere another library multiplies, and the sender may choose other codes
                _nearly_the_same(made, payload, view.groups)
            sender.rollback()
            sender.learn(payload.to(kit.DEVICE), there)
            sender.commit()
            receiver.decode(payload.to(kit.DEVICE), there, there[0])
            receiver.commit()
        decoded = torch.empty_like(x)
        with use("reference"):
            receiver_here.decode(made.cpu(), given, decoded)
            receiver_here.rollback()
            receiver_here.learn(payload, given)
            receiver_here.commit()
        assert torch.equal(kit.raw(decoded), kit.raw(out))
        assert torch.equal(kit.raw(there[0]), kit.raw(expected))
        for one, *others in zip(*(session.shared_memory for session in sessions), strict=True):
            assert all(torch.equal(kit.raw(other), kit.raw(one)) for other in others)
        base = expected


def _nearly_the_same(made: Tensor, payload: Tensor, groups: int) -> None:
    """Sums in another order: the largest amplitude differs in its last bits, hardly any code does."""
    made, payload = made.view(groups, -1), payload.view(groups, -1)
    tops = [one[:, :4].contiguous().view(torch.float32) for one in (made, payload)]
    assert torch.allclose(*tops, rtol=1e-5)
    assert (made[:, 4:] != payload[:, 4:]).float().mean() < 0.001


@pytest.fixture
def launched(monkeypatch):
    """Names of kernels that ran."""
    seen = []
    real = Launch.__call__

    def call(self, *given):
        seen.append(self._kernel)
        return real(self, *given)

    monkeypatch.setattr(Launch, "__call__", call)
    return seen


def test_payloads_tensors_and_bases_are_those_of_the_reference(launched):
    _check_stream(*CASES["one bit"], steps=2)
    ends = [allotment.allot, allotment.read_rows, allotment.order_components, *KERNELS]
    ends += [following.gather_basis, following.scatter_basis]
    sender = [fitting.largest_residuals, fitting.take_in, fitting.fit_rows, fitting.component_powers]
    sender += [fitting.weigh_rows, fitting.write_scales, components.choose_components]
    assert {*ends, *sender, rotations.sweep_matrices} == set(launched)


@pytest.mark.parametrize("case", quick_for(["short courses"], list(ON_A_TRELLIS)))
def test_along_a_trellis(case, launched):
    _check_stream(*ON_A_TRELLIS[case], steps=3, trellis=True)
    assert trellis.choose_on_trellis in launched
    assert components.choose_components not in launched


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES)
def test_in_many_shapes(case):
    _check_stream(*CASES[case], steps=3)


@pytest.mark.slow
def test_no_tile_changes_a_bit(monkeypatch, launched):
    """A block that is wider than a tile."""
    grids = []
    for tile in (16, 128):
        monkeypatch.setattr(component_steps, "_LARGEST_TILE", tile)
        component_steps.steps_of.cache_clear()
        launched.clear()
        _check_stream(plain(33 * 24, 1, 24), torch.bfloat16, 1.3, 24, 1, steps=2)
        grids.append(len(launched))
    component_steps.steps_of.cache_clear()
    assert grids[0] == grids[1]


@pytest.mark.slow
def test_a_stream_goes_on_from_the_reference_and_back():
    """Frames of a whole stream, whose receiver changes its kernels."""
    values = [x.view(16, 4) for x in _values(plain(16 * 4, 1, 4), torch.bfloat16, 4)]
    options = {"keyframe": "raw"}
    encoder, decoder = (kind("transform:bits=2", **options) for kind in (ResidualEncoder, ResidualDecoder))
    for step, x in enumerate(values):
        with use("reference"):
            frame = encoder.encode(x)
        with use("gpu" if step != 2 else "reference"):
            out = decoder.decode(frame.to(kit.DEVICE))
        assert torch.equal(kit.raw(out).flatten(), kit.raw(encoder.state))


@pytest.mark.skipif(not INTERPRETED, reason="the guard knows the interpreter's launches")
@pytest.mark.parametrize("on_trellis", [False, True])
def test_a_receiver_reads_nothing_and_a_sender_once(on_trellis):
    view, dtype = plain(9 * 4, 1, 4), torch.bfloat16
    base, *values = _values(view, dtype, 3)
    sender, receiver = (codecs.get("transform", trellis=on_trellis).open(view, dtype, kit.DEVICE) for _ in range(2))
    payload, out, expected = torch.empty(sender.payload_nbytes, dtype=torch.uint8), torch.empty_like(base), base.clone()
    looked = []
    with use("gpu"), pytest.MonkeyPatch.context() as patch, NoReads(patch) as reads:

        def look(magnitude, elements):
            reads.armed = False
            looked.append(finite_amax(magnitude, elements))
            reads.armed = step > 0
            return looked[-1]

        patch.setattr(on_device, "finite_amax", look)
        for step, x in enumerate(values):
            reads.armed = step > 0  # the first step makes tables
            sender.encode(x, (base,), expected, payload)
            receiver.decode(payload, (base,), out)
            receiver.commit()
            sender.commit()
            receiver.learn(payload, (base,))
            receiver.rollback()
            reads.armed = False
            assert torch.equal(kit.raw(out), kit.raw(expected))
            base = out.clone()
    assert len(looked) == len(values)


def test_payloads_anywhere():
    view = plain(9 * 6, 1, 6)
    x, codec = _values(view, torch.float32, 1)[0].to(kit.DEVICE), codecs.get("transform", bits=2)
    results = []
    for start in (0, 1):
        session = codec.open(view, x.dtype, kit.DEVICE)
        payload = torch.empty(session.payload_nbytes + start, dtype=torch.uint8, device=kit.DEVICE)[start:]
        out = torch.empty_like(x)
        with use("gpu"):
            session.encode(x, (), None, payload)
            session.rollback()
            session.decode(payload, (), out)
        results.append((payload, out))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


class _Operations(TorchDispatchMode):
    """What torch launches, but for memory and views of it, and for what Triton's interpreter does for a launch."""

    interprets = False

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (
            not self.interprets
            and not func.is_view
            and not any(word in str(func) for word in ("empty", "set_.source", "detach", "_unsafe_view"))
        ):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("on_trellis", [False, True])
def test_a_steady_frame_is_some_launches(launched, monkeypatch, on_trellis):
    """Of the sender: zeros for the largest magnitude and the payload, a basis in float32, and its product."""
    interpret = Launch.__call__

    def call(self, *given):
        monkeypatch.setattr(_Operations, "interprets", True)
        interpret(self, *given)
        monkeypatch.setattr(_Operations, "interprets", False)

    monkeypatch.setattr(Launch, "__call__", call)
    view, dtype = plain(70 * 12, 1, 12), torch.bfloat16
    base, *values = _values(view, dtype, 4)
    sender, receiver = (
        codecs.get("transform", block=12, trellis=on_trellis).open(view, dtype, kit.DEVICE) for _ in range(2)
    )
    payload, out = torch.empty(sender.payload_nbytes, dtype=torch.uint8), torch.empty_like(base)
    flag, counts = torch.zeros(1, dtype=torch.int32), []
    with use("gpu"):
        for x in values:
            launched.clear()
            with _Operations() as made:
                assert sender.device_steps.encode(x, (base,), out, payload, flag=flag)
                sender.commit()
                sender.prepare()
            counts.append((len(launched), made.seen))
            launched.clear()
            with _Operations() as made:
                receiver.decode(payload, (base,), base)
                receiver.commit()
                receiver.prepare()
            counts.append((len(launched), made.seen))
    (sent, by_torch), (received, no_torch) = counts[-2:]
    assert (sent, received) == (19, 9)
    assert len(by_torch) <= 6, by_torch
    assert not no_torch


def test_what_is_not_finite_is_refused():
    view = plain(9 * 6, 1, 6)
    base, x = _values(view, torch.float32, 2)
    x[7] = torch.nan
    session = codecs.get("transform").open(view, x.dtype, kit.DEVICE)
    payload = torch.empty(session.payload_nbytes, dtype=torch.uint8, device=kit.DEVICE)
    with use("gpu"), pytest.raises(NonFiniteError, match="1 of 54 elements"):
        session.encode(x.to(kit.DEVICE), (base.to(kit.DEVICE),), None, payload)


@pytest.mark.parametrize("on_trellis", [False, True])
@pytest.mark.parametrize("scale", [2.0**-40, 2.0**90])
def test_residuals_beyond_what_can_be_squared(scale, on_trellis):
    view = plain(9 * 6, 1, 6)
    base, x = (value * scale for value in _values(view, torch.float32, 2))
    results = []
    for kernels, device in (("reference", torch.device("cpu")), ("gpu", kit.DEVICE)):
        with use(kernels):
            session = codecs.get("transform", bits=4, trellis=on_trellis).open(view, x.dtype, device)
            payload = torch.empty(session.payload_nbytes, dtype=torch.uint8, device=device)
            made = torch.empty_like(x, device=device)
            session.encode(x.to(device), (base.to(device),), made, payload)
            results.append((kit.raw(payload), kit.raw(made)))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
    assert float((made.cpu().double() - x).norm()) < 0.3 * float((x.double() - base).norm())


@pytest.mark.parametrize("on_trellis", [False, True])
def test_any_payload_has_the_bits_of_the_reference(on_trellis):
    """Gains that are no number, units and sums beyond float32, rows without a scale."""
    view, g = plain(40 * 12, 1, 12), torch.Generator().manual_seed(0)
    codec = codecs.get("transform", bits=2, block=12, trellis=on_trellis)
    for number in range(6):
        terms = tuple(torch.randn(view.numel, generator=g).sign() * 3e38 for _ in range(number % 3))
        payload = torch.randint(0, 256, (codec.payload_nbytes(view.shape, torch.float32),), generator=g).byte()
        payload[:4] = torch.tensor([3e38]).view(torch.uint8)
        payload[4:6] = torch.tensor([0x7F80 + number // 3], dtype=torch.int16).view(torch.uint8)
        results = []
        for kernels, device in (("reference", torch.device("cpu")), ("gpu", kit.DEVICE)):
            with use(kernels):
                out = torch.empty(view.numel, device=device)
                there = tuple(term.to(device) for term in terms)
                codec.open(view, out.dtype, device).decode(payload.to(device), there, out)
                results.append(out.cpu())
        assert results[0].isfinite().all()
        assert torch.equal(kit.raw(results[0]), kit.raw(results[1]))


# ---- each kernel by itself


@pytest.mark.parametrize("n", [16, 30])
@pytest.mark.parametrize("flat", [False, True])
def test_weights_are_those_of_the_reference(n, flat):
    """Where all of a channel's weights are as large as they get, the sum of their magnitudes is what limits them."""
    layout = Layout.of(10, 2 * n, 4.0, n)
    view, g = plain(10 * 2 * n, 1, 2 * n), torch.Generator().manual_seed(n)
    basis = torch.randint(-32767, 32768, (1, 2, n, n), generator=g, dtype=torch.int16)
    if flat:
        basis = torch.where(basis < 0, -32767, 32767).to(torch.int16)
    else:
        basis[torch.rand(basis.shape, generator=g) > 0.15] = 0
    codes = torch.full((2 * n,), 255, dtype=torch.uint8)
    codes[:n] -= torch.arange(n, dtype=torch.uint8)
    spread = Spread.of(codes, layout)
    expected = Weights.of(rows_of(basis[0]), spread)
    units = torch.zeros(1, 2 * n)
    units[0, spread.chosen.places] = spread.unit_levels
    steps = component_steps.ComponentSteps(spec_of(layout), tables_of(SCALAR, kit.DEVICE), view, kit.DEVICE)
    high, low, unit = steps.weigh(basis.to(kit.DEVICE), units.to(kit.DEVICE))
    whole = torch.zeros(2 * n, n)
    whole[spread.chosen.places] = expected.whole
    assert torch.equal(high.cpu().float() * 128 + low.cpu().float(), whole.view(1, 2, n, n))
    assert torch.equal(unit.cpu()[0], expected.unit)
    sums = whole.view(2, n, n).abs().sum(1).max()
    assert bool(sums > LARGEST_SUM - 2 * n) == flat


@pytest.mark.parametrize("sizes", [[6, 4], [8]])
def test_sweeps_have_the_bits_of_the_reference(sizes):
    n, g = max(sizes), torch.Generator().manual_seed(len(sizes))
    some = torch.randn(len(sizes), 50, n, generator=g) * torch.rand(n, generator=g)
    matrices, basis = (some.mT @ some) / 50, torch.randn(len(sizes), n, n + 1, generator=g)
    for matrix, size in zip(matrices, sizes, strict=True):
        matrix[size:, :size], matrix[:size, size:] = 0, 0
    for smallest in (1e-6, 1e-2):
        on_device = torch.tensor(sizes, dtype=torch.int32, device=kit.DEVICE)
        expected = sweep(matrices, basis, sizes, smallest)
        got = rotations.sweep(matrices.to(kit.DEVICE), basis.to(kit.DEVICE), on_device, smallest)
        assert all(torch.equal(kit.raw(one), kit.raw(two)) for one, two in zip(got, expected, strict=True))
        matrices, basis = expected


def test_a_basis_follows_where_few_or_no_components_got_bits():
    n, g = 6, torch.Generator().manual_seed(0)
    codes = torch.zeros(3 * n, dtype=torch.uint8)
    codes[[1, 3, 4, 17]] = torch.tensor([255, 250, 240, 251], dtype=torch.uint8)  # three, none and one
    layout = Layout.of(40, 3 * n, 0.3, n)
    spread = Spread.of(codes, layout)
    places = spread.chosen.places
    evidence = torch.randint(-127, 128, (len(places), 40), generator=g).to(torch.int8)
    held = plain_basis((1, 3), n, torch.device("cpu"))
    expected = followed(held.rows[0], held.energies[0], spread, evidence)
    view = plain(40 * 3 * n, 1, 3 * n)
    steps = component_steps.ComponentSteps(spec_of(layout), tables_of(SCALAR, kit.DEVICE), view, kit.DEVICE)
    depths = torch.zeros(1, 3 * n, dtype=torch.int32)
    depths[0, places] = spread.chosen.depths.int()
    sums = torch.zeros(1, 3, n, n)
    for one, some in zip(sums[0], evidence.split(spread.counts), strict=True):
        one[: len(some), : len(some)] = gram(some.float())
    learnt = Learnt(spread.amplitudes[None].to(kit.DEVICE), *steps.order(depths.to(kit.DEVICE)), sums.to(kit.DEVICE))
    got = Basis(*steps.followed(*(part.to(kit.DEVICE) for part in held), learnt))
    assert learnt.counts.tolist() == [spread.counts]
    assert torch.equal(got.rows.cpu()[0], expected[0])
    assert torch.equal(got.energies.cpu()[0], expected[1])
