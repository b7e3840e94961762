"""Streams of ``topk`` and ``topk_int4`` on a device: the bytes of the reference, and no look at a value."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compactdist import codecs
from compactdist.codecs.scalar.with_zero import Int4WithZero
from compactdist.errors import NonFiniteError
from compactdist.kernels import use
from compactdist.state.matrix_view import Layout, blocks, plain
from tests.codecs import kit as codec_kit
from tests.kernels.gpu import kit
from tests.kernels.gpu.conftest import INTERPRETED
from tests.kernels.gpu.test_host_reads import NoReads

SPECS = ({"id": "topk"}, {"id": "topk_int4"}, {"id": "topk", "m": 5}, {"id": "topk_int4", "m": 16, "block": 33})
VIEWS = (
    plain(70 * 136, 1, 136),
    plain(3 * 5 * 72, 3, 72),
    plain(2 * 41 * 7, 2, 7),
    blocks(1),
    blocks(1000),
    blocks(1003),
    Layout("(kv b h s d) -> kv (b s) (h d)", kv=2, b=2, h=3, d=32).resolve(2 * 2 * 3 * 5 * 32),
    Layout("(h s d) -> 1 s (d h)", h=3, d=24).resolve(3 * 7 * 24),
)
every_spec = pytest.mark.parametrize("spec", SPECS, ids=kit.name_of)


def _opened(spec: Any, view: Any, dtype: torch.dtype, device: torch.device = kit.DEVICE) -> Any:
    """A session, and room for a payload in which what is not written shows."""
    session = codecs.get(spec).open(view, dtype, device)
    return session, torch.full((session.payload_nbytes,), 255, dtype=torch.uint8, device=device)


def _check(spec: Any, view: Any, x: torch.Tensor, terms: tuple[torch.Tensor, ...]) -> None:
    with use("reference"):
        session, expected = _opened(spec, view, x.dtype, torch.device("cpu"))
        result = torch.empty_like(x)
        session.encode(x, terms, result, expected)
    given = tuple(term.to(kit.DEVICE, copy=True) for term in terms)
    with use("gpu"):
        session, payload = _opened(spec, view, x.dtype)
        assert session.device_steps is not None
        out, held = torch.empty_like(x, device=kit.DEVICE), torch.empty_like(x, device=kit.DEVICE)
        session.encode(x.to(kit.DEVICE), given, out, payload)
        held = given[0] if given else held
        session.decode(payload, given, held)
    assert torch.equal(kit.raw(payload), kit.raw(expected))
    assert torch.equal(kit.raw(out), kit.raw(result))
    assert torch.equal(kit.raw(held), kit.raw(result))


@every_spec
def test_same_bytes(spec: Any) -> None:
    for index, view in enumerate(VIEWS):
        dtype = kit.DTYPES[(index + SPECS.index(spec)) % 3]
        x, base, velocity = (kit.cast(kit.draw("gaussian", view.numel, 8, seed), dtype) for seed in range(3))
        base[::3] = -0.0
        _check(spec, view, x, (base, velocity)[: index % 3])


@every_spec
@pytest.mark.parametrize("dtype", kit.DTYPES)
def test_hard_values(spec: Any, dtype: torch.dtype) -> None:
    x = torch.cat([kit.cast(kit.draw(kind, 9 * 40, 40), dtype) for kind in kit.KINDS])
    _check(spec, plain(x.numel(), 1, 40), x, ())
    _check(spec, plain(x.numel(), 1, 40), x, (x.flip(0),))


@pytest.mark.parametrize("block", [128, 1000])
def test_values_of_four_bits(block: int) -> None:
    """What codes the values of ``topk_int4``, on tensors of its own, by both kernels of blocks."""
    x = torch.cat([kit.draw(kind, 1000, 40).float() for kind in kit.KINDS])
    kit.check_same(Int4WithZero(block), x, (), plain(x.numel(), 1, x.numel()))
    kit.check_same(Int4WithZero(block), x, (x.roll(333),), plain(x.numel(), 2, x.numel() // 2))


@every_spec
def test_ties_keep_the_first(spec: Any) -> None:
    x = torch.tensor([0.0, -2.0, 2.0, -0.0, 2.0] * 160)
    _check(spec, plain(800, 1, 40), x, ())
    _check(spec, plain(800, 1, 40), -x, (torch.tensor([-0.0, 0.0] * 400),))


def test_every_size_of_a_value() -> None:
    """Those that bfloat16 cannot hold, that it rounds to even, and that count as zero."""
    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 14,), generator=torch.Generator().manual_seed(0)).int()
    special = torch.tensor([2.0**-118, -(2.0**-119), -1e-45, 3.4028e38, -3.4028e38, 1.00390625, -1.01171875, -0.0])
    x = torch.cat([bits.view(torch.float32), special])
    x = x[x.isfinite()]
    _check({"id": "topk", "m": 2}, blocks(x.numel()), x, ())


@pytest.mark.parametrize("m", range(2, 17))
def test_every_length_of_a_run(m: int) -> None:
    _check({"id": "topk", "m": m}, plain(2 * 3 * 50, 2, 50), kit.draw("wide", 300, 50).float(), (torch.ones(300),))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@every_spec
def test_what_is_not_finite(spec: Any, bad: float) -> None:
    """Without a flag it is refused; with one, a run that is concerned is left as it was at both ends."""
    view = plain(600, 1, 40)
    base = torch.randn(600, generator=torch.Generator().manual_seed(0)).bfloat16().to(kit.DEVICE)
    x = base + 1
    x[77] = bad
    flag = torch.zeros(1, dtype=torch.int32, device=kit.DEVICE)
    with use("gpu"):
        session, payload = _opened(spec, view, x.dtype)
        out, held = torch.empty_like(base), base.clone()
        with pytest.raises(NonFiniteError, match="1 of 600"):
            session.encode(x, (base,), out, payload)
        steps = session.device_steps
        assert steps.encode(x, (base,), out, payload, flag=flag)
        assert flag.item() == 1
        assert steps.decode(payload, (held,), held)
        m = session.codec.m
        run = slice(77 // m * m, (77 // m + 1) * m)
        assert torch.equal(kit.raw(held), kit.raw(out))
        assert torch.equal(held[run], base[run])
        assert not torch.equal(held, base)
        flag.zero_()
        assert steps.encode(base + 1, (base,), out, payload, flag=flag)
        assert flag.item() == 0


@every_spec
def test_a_frame_that_is_refused_changes_nothing(spec: Any) -> None:
    view, x = plain(600, 1, 40), torch.randn(600).to(kit.DEVICE)
    with use("gpu"):
        session, payload = _opened(spec, view, x.dtype)
        session.encode(x, (), None, payload)
        held = torch.ones_like(x)
        for accepted in (0, 1):
            said = torch.tensor([accepted, 1], dtype=torch.uint8, device=kit.DEVICE)
            assert session.device_steps.decode(payload, (held,), held, accepted=said)
            assert torch.equal(held, torch.ones_like(x)) == (accepted == 0)


def test_a_place_out_of_range_and_a_value_that_is_not_finite() -> None:
    """What no encoder sends is read as the reference reads it."""
    session, payload = _opened({"id": "topk", "m": 5}, plain(320, 1, 320), torch.float32, torch.device("cpu"))
    payload.random_(generator=torch.Generator().manual_seed(0))
    payload[32:36] = torch.tensor([0x80, 0x7F, 0x80, 0xFF], dtype=torch.uint8)
    base, results = torch.full((320,), -1e38), []
    for kernels, device in (("reference", torch.device("cpu")), ("gpu", kit.DEVICE)):
        with use(kernels):  # type: ignore[arg-type]
            session, _ = _opened({"id": "topk", "m": 5}, plain(320, 1, 320), torch.float32, device)
            out = base.to(device, copy=True)
            session.decode(payload.to(device), (out,), out)
            results.append(out.cpu().nan_to_num(nan=7.0))
    assert torch.equal(*results)


@every_spec
@pytest.mark.parametrize("accepted", [(1, 1), (1, 0), (0, 0)], ids=["values", "none", "refused"])
def test_a_copy_holds_nan_where_there_are_no_values(spec: Any, accepted: tuple[int, int]) -> None:
    view, x = plain(2 * 41 * 7, 2, 7), torch.randn(2 * 41 * 7).bfloat16().to(kit.DEVICE)
    with use("gpu"):
        session, payload = _opened(spec, view, x.dtype)
        expected, held, copy = torch.empty_like(x), torch.ones_like(x), torch.zeros_like(x)
        session.encode(x, (held,), expected, payload)
        said = torch.tensor(accepted, dtype=torch.uint8, device=kit.DEVICE)
        assert session.device_steps.decode(payload, (held,), held, copy=copy, accepted=said)
    assert torch.equal(held, expected if accepted[0] else torch.ones_like(x))
    assert torch.equal(copy, expected) if accepted[1] else copy.isnan().all()


@every_spec
def test_payloads_at_any_address(spec: Any) -> None:
    view, x = plain(600, 1, 40), torch.randn(600).to(kit.DEVICE)
    with use("gpu"):
        session, payload = _opened(spec, view, x.dtype)
        session.encode(x, (), None, payload)
        room = torch.empty(payload.numel() + 3, dtype=torch.uint8, device=kit.DEVICE)
        session.encode(x, (), None, room[3:])
        assert torch.equal(room[3:], payload)
        first, second = torch.empty_like(x), torch.empty_like(x)
        session.decode(payload, (), first)
        session.decode(room[3:], (), second)
        assert torch.equal(first, second)
    assert codec_kit.as_bytes(first.cpu()).any()


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU benchmarks.gpu.host counts what waits")
@pytest.mark.parametrize(("spec", "launches"), list(zip(SPECS, ((1, 1), (3, 2), (1, 1), (3, 2)), strict=True)), ids=str)
def test_a_steady_step_reads_nothing(spec: Any, launches: tuple[int, int]) -> None:
    view, x, flag = plain(8192, 1, 64), torch.randn(8192), torch.zeros(1, dtype=torch.int32)
    base, accepted = torch.randn(8192), torch.ones(2, dtype=torch.uint8)
    with use("gpu"), pytest.MonkeyPatch.context() as patch, NoReads(patch) as reads:
        session, payload = _opened(spec, view, x.dtype)
        out, steps, seen = torch.empty_like(x), session.device_steps, []
        for reads.armed in (False, True):
            reads.launches = 0
            assert steps.encode(x, (base,), out, payload, flag=flag)
            seen = [reads.launches]
            assert steps.decode(payload, (base,), base, accepted=accepted)
            seen.append(reads.launches - seen[0])
        reads.armed = False
    assert tuple(seen) == launches
