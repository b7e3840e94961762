"""Streams of ``lowrank`` and ``lowrank_int4`` on a device: one launch decodes to the bytes of every other decoder,
twelve find factors no worse than a CPU's, and the host reads nothing.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compactdist import codecs
from compactdist.errors import NonFiniteError, PayloadError
from compactdist.kernels import use
from compactdist.state.matrix_view import Layout, blocks, plain
from tests.kernels.gpu import kit
from tests.kernels.gpu.conftest import INTERPRETED
from tests.kernels.gpu.test_host_reads import NoReads

pytestmark = pytest.mark.timeout(120)
CPU = torch.device("cpu")
SPECS = (
    {"id": "lowrank", "rank": 3},
    {"id": "lowrank_int4", "rank": 2},
    {"id": "lowrank", "rank": 1},
    {"id": "lowrank_int4", "rank": 17},
)
VIEWS = (
    plain(65 * 130, 1, 130),
    plain(3 * 5 * 7, 3, 7),
    plain(2 * 9 * 17, 2, 17),
    blocks(1),
    blocks(1003),
    Layout("(kv b h s d) -> kv (b s) (h d)", kv=2, b=2, h=3, d=8).resolve(2 * 2 * 3 * 5 * 8),
    Layout("(h s d) -> 1 s (d h)", h=3, d=24).resolve(3 * 7 * 24),
)
every_spec = pytest.mark.parametrize("spec", SPECS, ids=kit.name_of)
small_specs = pytest.mark.parametrize("spec", SPECS[:2], ids=kit.name_of)


def _opened(spec: Any, view: Any, dtype: torch.dtype, kernels: Any = "gpu") -> Any:
    with use(kernels):
        session = codecs.get(spec).open(view, dtype, kit.DEVICE if kernels == "gpu" else CPU)
        assert (session.device_steps is not None) == (kernels == "gpu")
    return session


def _room(session: Any) -> torch.Tensor:
    """Room for a payload in which what is not written shows."""
    return torch.full((session.payload_nbytes,), 255, dtype=torch.uint8, device=session.device)


def _drift(view: Any, dtype: torch.dtype, steps: int, seed: int = 0) -> list[torch.Tensor]:
    """A stream of tensors whose change has a low rank, and noise."""
    source, made = torch.Generator().manual_seed(seed), []
    total = torch.zeros(view.shape)
    for _ in range(steps):
        left = torch.randn(view.groups, view.rows, 2, generator=source)
        total = total + left @ torch.randn(view.groups, 2, view.channels, generator=source)
        noisy = total + 0.1 * torch.randn(view.shape, generator=source)
        made.append(noisy.reshape(-1)[: view.numel].to(dtype))
    return made


@every_spec
def test_what_a_cpu_sends_decodes_to_the_same_bytes(spec: Any) -> None:
    """Ten frames of a stream, and in place: two layouts for each form, every dtype and number of terms."""
    for index, view in enumerate(VIEWS[SPECS.index(spec) :: 4]):
        dtype = kit.DTYPES[(index + SPECS.index(spec)) % 3]
        sender, receiver = _opened(spec, view, dtype, "cpu"), _opened(spec, view, dtype)
        payload, base, held = _room(sender), torch.zeros(view.numel, dtype=dtype), None
        for step, x in enumerate(_drift(view, dtype, 10)):
            terms = (base, 0.5 * base, x)[: (step + index) % 3] if step else ()
            terms = tuple(term.contiguous() for term in terms)
            out = torch.empty_like(x)
            with use("cpu"):
                sender.encode(x, terms, out, payload)
                sender.commit()
            there = tuple(term.to(kit.DEVICE, copy=True) for term in terms)
            held = there[0] if there else torch.empty_like(x, device=kit.DEVICE)
            with use("gpu"):
                receiver.decode(payload.to(kit.DEVICE), there, held)
            assert torch.equal(kit.raw(held), kit.raw(out)), (view, step)
            base = out


@every_spec
@pytest.mark.parametrize("dtype", kit.DTYPES)
def test_hard_values_decode_alike(spec: Any, dtype: torch.dtype) -> None:
    view = plain(27 * 40, 1, 40)
    sender, receiver = _opened(spec, view, dtype, "reference"), _opened(spec, view, dtype)
    payload = _room(sender)
    for kind in kit.KINDS:
        x = kit.cast(kit.draw(kind, view.numel, 40), dtype)
        for terms in ((), (x.flip(0),)):
            out, got = torch.empty_like(x), torch.empty_like(x, device=kit.DEVICE)
            with use("reference"):
                sender.encode(x, terms, out, payload)
            with use("gpu"):
                receiver.decode(payload.to(kit.DEVICE), tuple(term.to(kit.DEVICE) for term in terms), got)
            assert torch.equal(kit.raw(got), kit.raw(out)), kind


@every_spec
def test_payloads_that_nobody_sends_decode_alike(spec: Any) -> None:
    """NaN and infinity among the factors are taken as the reference takes them."""
    view = plain(33 * 40, 1, 40)
    with use("reference"):
        sender = _opened(spec, view, torch.float32, "reference")
    payload = torch.randint(0, 256, (sender.payload_nbytes,), generator=torch.Generator().manual_seed(0))
    payload = payload.to(torch.uint8)
    base, results = torch.full((view.numel,), -1e38), []
    for kernels in ("reference", "gpu"):
        session = _opened(spec, view, torch.float32, kernels)
        out = base.to(session.device, copy=True)
        with use(kernels):
            session.decode(payload.to(session.device), (out,), out)
        results.append(out.cpu().nan_to_num(nan=7.0))
    assert torch.equal(*results)


def _sent(spec: Any, view: Any, xs: list[torch.Tensor]) -> list[float]:
    """Errors of a stream on the device over those on a CPU; every decoder makes the same of every frame."""
    dtype = xs[0].dtype
    sender, receiver = _opened(spec, view, dtype), _opened(spec, view, dtype)
    reference = _opened(spec, view, dtype, "reference")
    payload, theirs = _room(sender), _room(reference)
    base, base_there, ratios = None, None, []
    for x in xs:
        terms = () if base is None else (base,)
        there = tuple(term.to(kit.DEVICE) for term in terms)
        out, held, read = torch.empty_like(x, device=kit.DEVICE), torch.empty_like(x, device=kit.DEVICE), x.clone()
        with use("gpu"):
            sender.encode(x.to(kit.DEVICE), there, out, payload)
            sender.commit()
            receiver.decode(payload, there, held)
        assert torch.equal(kit.raw(held), kit.raw(out))
        with use("reference"):
            reference.decode(payload.cpu(), terms, read)
            found = torch.empty_like(x)
            reference.encode(x, () if base_there is None else (base_there,), found, theirs)
            reference.commit()
        assert torch.equal(kit.raw(read), kit.raw(out))
        ours, cpu = ((one.float() - x.float()).norm() for one in (read, found))
        ratios.append(float(ours / cpu.clamp(min=1e-6)))
        base, base_there = read, found
    return ratios


@small_specs
def test_factors_are_as_good_as_a_cpus(spec: Any) -> None:
    view = plain(33 * 45, 1, 45)
    ratios = _sent(spec, view, _drift(view, kit.DTYPES[SPECS.index(spec)], 4))
    assert sum(ratios) / len(ratios) < 1.01, ratios


def test_large_matrices() -> None:
    """From 2**18 elements on products are in bfloat16, and what is remembered spares a round: cold and warm."""
    view = plain(512 * 520, 1, 520)
    ratios = _sent(SPECS[1], view, _drift(view, torch.bfloat16, 2))
    assert max(ratios) < 1.02, ratios


@pytest.mark.parametrize("view", VIEWS[1:], ids=str)
def test_a_sender_holds_what_its_receivers_decode(view: Any) -> None:
    index = VIEWS.index(view)
    _sent(SPECS[index % 2], view, _drift(view, kit.DTYPES[index % 3], 1))


@pytest.mark.parametrize("kind", ["zeros", "one hot", "denormal", "huge", "wide"])
def test_the_error_never_exceeds_the_input(kind: str) -> None:
    view = plain(20 * 24, 1, 24)
    x = kit.draw(kind, view.numel, 24).float()
    session = _opened(SPECS[1], view, x.dtype)
    out, payload = torch.empty_like(x, device=kit.DEVICE), _room(session)
    with use("gpu"):
        session.encode(x.to(kit.DEVICE), (), out, payload)
    error, energy = (out.cpu().double() - x.double()).square().sum(), x.double().square().sum()
    assert error <= energy
    assert error < energy or kind in ("zeros", "denormal")
    assert kind != "zeros" or not out.any()


@pytest.mark.parametrize(("spec", "bad"), [(SPECS[0], torch.nan), (SPECS[1], -torch.inf)], ids=["nan", "inf"])
def test_what_is_not_finite(spec: Any, bad: float) -> None:
    """Without a flag it is refused; with one the group is left as it was, at both ends, and the next frame is right."""
    view = plain(2 * 12 * 8, 2, 8)
    base = torch.linspace(-1, 1, view.numel).bfloat16().to(kit.DEVICE)
    good = base + torch.linspace(2, 1, view.numel).to(base)
    x = good.clone()
    x[77] = bad
    flag = torch.zeros(1, dtype=torch.int32, device=kit.DEVICE)
    session = _opened(spec, view, x.dtype)
    payload, out, held = _room(session), torch.empty_like(base), base.clone()
    with use("gpu"):
        with pytest.raises(NonFiniteError, match="1 of 192"):
            session.encode(x, (base,), out, payload)
        session.rollback()
        steps = session.device_steps
        assert steps.encode(x, (base,), out, payload, flag=flag)
        session.commit()
        assert flag.item() == 1
        assert steps.decode(payload, (held,), held)
        assert torch.equal(kit.raw(held), kit.raw(out))
        assert torch.equal(held[:96], base[:96])
        assert not torch.equal(held[96:], base[96:])
        flag.zero_()
        assert steps.encode(good, (base,), out, payload, flag=flag)
    assert flag.item() == 0
    assert (out.float() - good.float()).norm() < 0.5 * (good.float() - base.float()).norm()


def test_a_frame_that_is_refused_changes_nothing() -> None:
    view, x = plain(20 * 24, 1, 24), torch.randn(480, generator=torch.Generator().manual_seed(0)).to(kit.DEVICE)
    session = _opened(SPECS[0], view, x.dtype)
    payload, expected = _room(session), torch.empty_like(x)
    ones = torch.ones_like(x)
    with use("gpu"):
        session.encode(x, (ones,), expected, payload)
        for accepted in ((0, 0), (0, 1), (1, 0), (1, 1)):
            said = torch.tensor(accepted, dtype=torch.uint8, device=kit.DEVICE)
            held, copy = ones.clone(), torch.zeros_like(x)
            assert session.device_steps.decode(payload, (held,), held, copy=copy, accepted=said)
            assert torch.equal(held, expected if accepted[0] else ones)
            assert copy.isnan().all() if not accepted[1] else torch.equal(copy, expected) or not accepted[0]
        with pytest.raises(PayloadError, match="expected a uint8 payload"):
            session.decode(payload[:-16], (), x)


def test_memory_changes_with_a_commit_only() -> None:
    """Equal calls give equal bytes until one is committed, wherever the payload lies, and memory may move between."""
    view, x = plain(20 * 24, 1, 24), torch.randn(480, generator=torch.Generator().manual_seed(0)).to(kit.DEVICE)
    session = _opened(SPECS[1], view, x.dtype)
    first, second = _room(session), _room(session)
    third = torch.zeros(session.payload_nbytes + 3, dtype=torch.uint8, device=kit.DEVICE)
    with use("gpu"):
        session.encode(x, (), None, first)
        session.rollback()
        session.encode(x, (), None, third[3:])
        assert torch.equal(first, third[3:])
        session.commit()
        assert session.held_bytes == sum(tensor.nbytes for tensor in session.device_steps.memory)
        calls = [int(tensor) for tensor in session.device_steps.memory[1::2]]
        assert calls == [1, 0]
        session.move(lambda tensor: tensor.clone())
        session.encode(x, (), None, first)
        session.rollback()
        session.move(lambda tensor: tensor.clone())
        session.encode(x, (), None, second)
        assert torch.equal(first, second)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU benchmarks.gpu.host counts what waits")
@small_specs
def test_a_steady_step_reads_nothing(spec: Any) -> None:
    """Twelve launches encode, one decodes, from nothing and from remembered directions."""
    view = plain(20 * 24, 1, 24)
    x, base = torch.randn(480), torch.randn(480)
    flag, accepted = torch.zeros(1, dtype=torch.int32), torch.ones(2, dtype=torch.uint8)
    session, seen = _opened(spec, view, x.dtype), []
    payload, out = _room(session), torch.empty_like(x)
    with use("gpu"), pytest.MonkeyPatch.context() as patch, NoReads(patch) as reads:
        steps = session.device_steps
        for _ in range(2):
            reads.armed, reads.launches = True, 0
            assert steps.encode(x, (base,), out, payload, flag=flag)
            session.commit()
            encoding = reads.launches
            assert steps.decode(payload, (base,), base, accepted=accepted)
            seen.append((encoding, reads.launches - encoding))
            reads.armed = False
    assert seen == [(12, 1), (12, 1)]


def test_where_there_are_no_kernels() -> None:
    """More directions than a program holds, bits by energy, float64: torch's operations."""
    large = plain(200 * 300, 1, 300)
    cases = (
        ({"id": "lowrank", "rank": 100}, torch.float32),
        ({"id": "lowrank_int4", "allocation": "energy"}, torch.float32),
    )
    with use("gpu"):
        for spec, dtype in (*cases, (SPECS[0], torch.float64)):
            assert codecs.get(spec).open(large, dtype, kit.DEVICE).device_steps is None
