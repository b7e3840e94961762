"""Large tensors in parts: the same values and histories as whole ones, in frames that say which part they carry."""

from __future__ import annotations

import math
from dataclasses import replace
from types import MethodType

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol

import compactdist
from compactdist import Layout
from compactdist.errors import (
    ConfigError,
    ConfigMismatchError,
    FrameError,
    NonFiniteError,
    PlanMismatchError,
    StateMismatchError,
)
from compactdist.exchange.parts import PART_NBYTES, cut, number_of_parts
from compactdist.group.environment import settings_from_environment
from compactdist.observe.estimate import estimate
from compactdist.state import ResidualDecoder, ResidualEncoder
from compactdist.testing import Fault, act_like_nccl, inject, remove
from compactdist.wire import HEADER_NBYTES, seal, unpack
from tests.launch import run_ranks
from tests.quick import quick_for

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:torch.*"),
    pytest.mark.timeout(120),
]

ROWS, CHANNELS, STEPS = 37, 64, 4


def tensor(rank, step, shape=(ROWS, CHANNELS)):
    made = torch.Generator().manual_seed(7 + rank)
    first, change = (torch.randn(shape, generator=made) for _ in range(2))
    return first + 0.2 * step * change


def run(g, rank, size, *, form="tensor", how="sync", steps=STEPS, make=tensor, check=True):
    """The outputs of each step's all-gather, by rank."""
    outs = []
    for step in range(steps):
        g.step()
        x = make(rank, step)
        outs.append(gathered(g, x, size, form, how))
    if check:
        g.check()
    return outs


def gathered(g, x, size, form="tensor", how="sync"):
    """All ranks' tensors, ``(size, *x.shape)``."""
    if form == "functional":
        return torch.stack(funcol.all_gather_tensor(x, 0, g).wait().chunk(size))
    if form == "strided":
        out = [torch.full((*x.shape, 2), math.nan)[..., 0] for _ in range(size)]
        assert not out[0].is_contiguous()
        work = dist.all_gather(out, x, group=g, async_op=how == "async")
    elif form == "list":
        out = [torch.full(x.shape, math.nan) for _ in range(size)]
        work = dist.all_gather(out, x, group=g, async_op=how == "async")
    else:
        out = torch.full((size * x.shape[0], *x.shape[1:]), math.nan)
        work = dist.all_gather_into_tensor(out, x, group=g, async_op=how == "async")
    if how == "async":
        work.wait()
    return torch.stack(list(out)) if form != "tensor" else out.view(size, *x.shape)


def gathered_into(g, out, x, how):
    work = dist.all_gather(out, x, group=g, async_op=how == "async")
    if work is not None:
        work.wait()


def headers(g):
    """A list to which the group adds the header of every frame it gathers."""
    seen, link = [], g._engine.link
    plain = link.all_gather

    def spied(self, arrived, frame, opts):
        seen.append(unpack(frame.clone(), "test"))
        return plain(arrived, frame, opts)

    link.all_gather = MethodType(spied, link)
    return seen


def wrapped(**options):
    return compactdist.wrap(dist.group.WORLD, **{"codec": "int8", "min_numel": 64} | options)


# --- where a tensor is cut --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "parts", "numels"),
    [
        ((37, 64), 2, [18 * 64, 19 * 64]),
        ((4096,), 4, [1024] * 4),
        ((1000,), 3, [320, 320, 360]),  # at multiples of 64 elements
        ((2, 1, 9, 64), 2, [9 * 64] * 2),  # K and V
        ((2, 1, 9, 64), 4, [4 * 64, 5 * 64] * 2),  # and each of them along its rows
        ((2, 1, 9, 64), 3, [9 * 64] * 2),  # which does not come out even: fewer parts than asked for
        ((3, 100), 3, [300]),  # no row but the first begins at a multiple of 64
        ((1, 1), 5, [1]),
        ((), 2, [1]),
    ],
)
def test_a_tensor_is_cut_along_its_rows(shape, parts, numels):
    cuts = cut(shape, parts, None)
    assert [each.numel for each in cuts] == numels
    assert all(each.hint is None for each in cuts)


@pytest.mark.parametrize(
    ("pattern", "sizes", "parts", "shapes"),
    [
        ("(s c) -> 1 s c", {"c": 64}, 2, [(1, 18, 64), (1, 19, 64)]),
        ("(kv s c) -> kv s c", {"kv": 2, "c": 64}, 2, [(1, 37, 64)] * 2),
        ("(kv s c) -> kv s c", {"kv": 2, "c": 64}, 4, [(1, 18, 64), (1, 19, 64)] * 2),
        ("(kv b h s d) -> kv (b s) (h d)", {"kv": 2, "b": 1, "h": 2, "d": 64}, 4, [(1, 37, 64)] * 4),
    ],
)
def test_a_part_has_its_share_of_the_layout_hint(pattern, sizes, parts, shapes):
    numel = math.prod(sizes.values()) * ROWS
    hint = Layout(pattern, **sizes).resolve(numel)
    flat = torch.arange(numel)
    cuts = cut((numel,), parts, hint)
    assert [each.hint.shape for each in cuts] == shapes
    whole = {tuple(row) for group in hint.to_matrix(flat) for row in group.tolist()}
    start = 0
    for each in cuts:
        assert each.hint.numel == each.numel
        for row in each.hint.to_matrix(flat[start : start + each.numel])[0].tolist():
            assert any(set(row) <= set(one) for one in whole), "a part's row lies within one row of the whole"
        start += each.numel
    assert start == numel


def test_the_number_of_parts_follows_from_the_size():
    numel = PART_NBYTES // 2
    assert [number_of_parts("auto", n, torch.bfloat16, 1024) for n in (1024, numel, 2 * numel)] == [1, 1, 2]
    assert number_of_parts("auto", 100 * numel, torch.bfloat16, 1024) == 4
    assert [number_of_parts(3, n, torch.float32, 1024) for n in (1024, 2048, 3072, 10**6)] == [1, 2, 3, 3]


@pytest.mark.parametrize("parts", [0, -1, 1 << 16, True, 2.0, "many"])
def test_impossible_numbers_are_refused(parts):
    with pytest.raises(ConfigError, match="parts must be 'auto' or an integer"):
        compactdist.Options(parts=parts)


def test_the_environment_names_it_too():
    for text, parts in (("3", 3), ("auto", "auto")):
        assert settings_from_environment({"COMPACTDIST_PARTS": text}) == {"parts": parts}
    with pytest.raises(ConfigError, match="COMPACTDIST_PARTS='some' is not an integer or auto"):
        settings_from_environment({"COMPACTDIST_PARTS": "some"})


# --- the same values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", quick_for([2], [2, 3]))
@pytest.mark.parametrize("form", ["tensor", "list", "strided", "functional"])
@pytest.mark.parametrize("how", ["sync", "async"])
def test_results_are_those_of_whole_tensors(world_size, form, how):
    """raw to the bit; int8, whose scales are those of rows and blocks of a part, about as close."""

    def body(rank, size):
        truth = [torch.stack([tensor(r, step) for r in range(size)]) for step in range(STEPS)]
        for codec in ("raw", "int8"):
            errors = []
            for parts in (1, 2, 3):
                with wrapped(codec=codec, parts=parts) as g:
                    outs = run(g, rank, size, form=form, how=how)
                    site = next(iter(g.stats().sites.values()))
                    assert (site.parts, site.calls, site.passed) == (parts, STEPS, {})
                if codec == "raw":
                    assert all(map(torch.equal, outs, truth))
                errors.append(sum(float((a - b).square().sum()) for a, b in zip(outs, truth, strict=True)))
            assert max(errors) <= 1.5 * errors[0]
        return outs

    results = run_ranks(body, world_size=world_size)
    for outs in results[1:]:
        assert all(map(torch.equal, outs, results[0])), "every rank holds the same bytes"


@pytest.mark.parametrize(
    "options",
    [
        {"order": 2},
        {"order": "auto"},
        {"state": "int8"},
        {"keyframe": "raw"},
        {"error_feedback": False},
        {"codec": "transform"},
        {"codec": "topk"},
        {"target": "nmse_db=-30", "codec": "rates"},
        {"local": "exact"},
        {"sample_errors_every": 1},
        {"mode": "predict-now"},
        {"agree": "off"},
    ],
    ids=str,
)
def test_other_options_go_with_parts(options):
    def body(rank, size):
        with wrapped(**{"parts": 3} | options) as g:
            outs = run(g, rank, size, how="async", steps=6)
            site = next(iter(g.stats().sites.values()))
            assert site.parts == 3
            if "sample_errors_every" in options:
                assert site.nmse_db < -35
            g.reset()
            run(g, rank, size, steps=2)
        truth = torch.stack([tensor(r, 5) for r in range(size)])
        if options.get("local") == "exact":
            assert torch.equal(outs[-1][rank], truth[rank])
        return float((outs[-1] - truth).square().sum() / truth.square().sum())

    assert max(run_ranks(body, world_size=2)) < (0.2 if options.get("codec") == "topk" else 0.05)


def test_frames_say_their_part_and_one_part_changes_no_byte():
    def body(rank, size):
        with wrapped(parts=2) as g:
            seen = headers(g)
            run(g, rank, size, steps=2, check=False)
        assert [(h.part, h.parts, h.numel, h.sequence) for h in seen] == [
            (0, 2, 18 * CHANNELS, 0),
            (1, 2, 19 * CHANNELS, 0),
            (0, 2, 18 * CHANNELS, 1),
            (1, 2, 19 * CHANNELS, 1),
        ]
        assert "part 2 of 2" in seen[1].describe()
        with wrapped(parts="auto") as g:
            seen = headers(g)
            run(g, rank, size, steps=2, check=False)
        assert [(h.part, h.parts, h.numel) for h in seen] == [(0, 1, ROWS * CHANNELS)] * 2
        assert "part" not in seen[0].describe()

    run_ranks(body, world_size=2)


def test_layout_hints_are_cut_too():
    numel = 2 * ROWS * CHANNELS
    layouts = {"*": Layout("(kv s c) -> kv s c", kv=2, c=CHANNELS)}

    def body(rank, size):
        with wrapped(parts=2, layouts=layouts, codec="int4") as g:
            seen = headers(g)
            run(g, rank, size, make=lambda r, t: tensor(r, t, (numel,)), check=False)
        assert {(h.numel, h.groups, h.rows, h.channels) for h in seen if not h.is_keyframe} == {
            (numel // 2, 1, ROWS, CHANNELS)
        }

    run_ranks(body, world_size=2)


def test_a_changed_size_begins_anew_and_leaves_no_history_behind():
    def body(rank, size):
        with wrapped(parts=3) as g:
            for shape in ((ROWS, CHANNELS), (2, 32), (ROWS, CHANNELS), (12, 64), (ROWS, CHANNELS)):
                outs = run(g, rank, size, steps=2, make=lambda r, t, shape=shape: tensor(r, t, shape))
                truth = torch.stack([tensor(r, 1, shape) for r in range(size)])
                assert float((outs[-1] - truth).abs().max()) < 0.1
                held = g.stats().state_bytes
                assert held <= size * math.prod(shape) * 4 * 1.2, "histories of other divisions are gone"

    run_ranks(body, world_size=2)


def test_works_may_be_waited_for_in_any_order_dropped_and_polled():
    def body(rank, size):
        with wrapped(parts=3) as g:
            truth = [torch.stack([tensor(r, t) for r in range(size)]) for t in range(STEPS)]
            for step in range(STEPS):
                g.step()
                outs = [torch.empty(size * ROWS, CHANNELS) for _ in range(3)]
                works = [dist.all_gather_into_tensor(o, tensor(rank, step), group=g, async_op=True) for o in outs]
                works[2].wait()
                if step == 1:
                    del works[1]  # nobody waits, and nothing is written late
                else:
                    while not works[1].is_completed():
                        pass
                    assert works[0].get_future().wait()[0] is outs[0]
                for number in (0, 2) if step == 1 else (0, 1, 2):
                    if step == 1 and number == 0:
                        works[0].wait()
                    assert float((outs[number].view(size, ROWS, CHANNELS) - truth[step]).abs().max()) < 0.1
            g.check()

    run_ranks(body, world_size=2)


@pytest.mark.parametrize("how", ["sync", "async"])
def test_nccl_manners(how):
    def body(rank, size):
        inner = act_like_nccl(dist.group.WORLD, delay=0.002)
        with compactdist.wrap(inner, "int8", min_numel=64, parts=3) as g:
            outs = run(g, rank, size, how=how)
            outs += run(g, rank, size, form="list", how=how)
            truth = torch.stack([tensor(r, STEPS - 1) for r in range(size)])
            assert float((outs[-1] - truth).abs().max()) < 0.1
            for step in range(2):
                g.step()
                pair = [torch.empty(size * ROWS, CHANNELS) for _ in range(2)]
                with dist.distributed_c10d._coalescing_manager(g):
                    for out in pair:
                        dist.all_gather_into_tensor(out, tensor(rank, step), group=g)
                truth = torch.cat([tensor(r, step) for r in range(size)])
                assert all(float((out - truth).abs().max()) < 0.1 for out in pair)
            g.check()
        remove(inner)

    run_ranks(body, world_size=2)


# --- what overlaps ----------------------------------------------------------------------------------------------------


def test_a_part_is_decoded_before_the_next_has_arrived():
    def body(rank, size):
        events = []
        with wrapped(parts=3) as g:
            run(g, rank, size, steps=2)
            (plan,) = [site.plan for site in g._engine.store.sites()]
            link = g._engine.link
            plain = link.all_gather

            def spied(self, arrived, frame, opts):
                number = unpack(frame, "test").part
                events.append(f"post {number}")
                work = plain(arrived, frame, opts)
                wait = work.wait

                class Waited:
                    def wait(self):
                        events.append(f"wait {number}")
                        return wait()

                return Waited()

            link.all_gather = MethodType(spied, link)
            take = g._engine._take

            def taken(flight, part, *more):
                events.append(f"decode {part.number}")
                return take(flight, part, *more)

            g._engine._take = taken
            g.step()
            gathered(g, tensor(rank, 2), size)
            assert len(plan.incoming) == 3 * (size - 1)
        return events

    for events in run_ranks(body, world_size=2):
        posted = [f"post {n}" for n in range(3)]
        assert events == posted + [f"{what} {n}" for n in range(3) for what in ("wait", "decode")]


# --- damage and disagreement ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["sync", "async"])
def test_a_damaged_part_moves_nothing_of_its_stream_and_reset_recovers(how):
    """Each call is three inner calls, so the one numbered 4 carries the second part of the first residual."""

    def body(rank, size):
        fault = Fault("flip-received", "all_gather", nth=4, byte=HEADER_NBYTES + 8 if rank else 0)
        inner = inject(dist.group.WORLD, [fault] if rank else [])
        with compactdist.wrap(inner, "int8", min_numel=64, parts=3) as g:
            run(g, rank, size, steps=1, check=False)
            (site,) = g._engine.store.sites()
            peer = 1 - rank

            def state():
                streams = [site.decoder(peer, part, 3) for part in range(3)]
                return [(s.sequence, s.digest, s.predictor.base.clone()) for s in streams]

            before = state()
            g.step()
            if rank:
                out = [torch.full((ROWS, CHANNELS), 7.0) for _ in range(size)]
                with pytest.raises(FrameError, match="part 2 of 3") as caught:
                    gathered_into(g, out, tensor(rank, 1), how)
                assert "reset()" in str(caught.value)
                lengths = [s.numel for s in site.plan.incoming]
                got = out[peer].view(-1).split(lengths)
                assert bool((got[1] == 7).all()), "nothing of the refused part was written"
                assert not bool((got[0] == 7).any())
                assert not bool((got[2] == 7).any())
            else:
                gathered(g, tensor(rank, 1), size)
            moved = [a[:2] != b[:2] for a, b in zip(before, state(), strict=True)]
            same = torch.equal(before[1][2], state()[1][2])
            assert (moved, same) == (([True, False, True], True) if rank else ([True] * 3, False))
            dist.barrier()
            with pytest.raises(StateMismatchError, match="part 2 of 3"):
                g.check()
            g.step()
            if rank:
                with pytest.raises(FrameError, match=r"part 2 of 3.*sequence"):
                    gathered(g, tensor(rank, 2), size)
            else:
                gathered(g, tensor(rank, 2), size)
            g.reset()
            outs = run(g, rank, size)
            truth = torch.stack([tensor(r, STEPS - 1) for r in range(size)])
            assert float((outs[-1] - truth).abs().max()) < 0.1
        remove(inner)

    run_ranks(body, world_size=2)


def test_a_transport_that_fails_for_one_part_raises_and_reset_recovers():
    def body(rank, size):
        inner = inject(dist.group.WORLD, [Fault("fail-wait", "all_gather", nth=4)] if rank else [])
        with compactdist.wrap(inner, "int8", min_numel=64, parts=3) as g:
            run(g, rank, size, steps=1, check=False)
            g.step()
            if rank:
                with pytest.raises(RuntimeError):
                    gathered(g, tensor(rank, 1), size)
            else:
                gathered(g, tensor(rank, 1), size)
            dist.barrier()
            g.reset()
            outs = run(g, rank, size)
            truth = torch.stack([tensor(r, STEPS - 1) for r in range(size)])
            assert float((outs[-1] - truth).abs().max()) < 0.1
        remove(inner)

    run_ranks(body, world_size=2)


def test_a_tensor_that_is_not_finite_in_one_part_raises_everywhere_and_starts_again():
    def body(rank, size):
        with wrapped(parts=3) as g:
            run(g, rank, size, steps=2)
            bad = tensor(rank, 2)
            if rank == 0:
                bad[ROWS - 1, 0] = math.nan  # in the last part
            g.step()
            with pytest.raises(NonFiniteError):
                gathered(g, bad, size)
            outs = run(g, rank, size, check=True)
            truth = torch.stack([tensor(r, STEPS - 1) for r in range(size)])
            assert float((outs[-1] - truth).abs().max()) < 0.1

    run_ranks(body, world_size=2)


@pytest.mark.parametrize("what", ["part", "parts"])
def test_a_frame_of_another_part_is_refused(what):
    encoder, decoder = ResidualEncoder("int8"), ResidualDecoder("int8")
    frame = encoder.encode(tensor(0, 0))
    header = unpack(frame, "test")
    forged = seal(frame.clone(), replace(header, **{what: 3}))
    with pytest.raises(FrameError, match=r"wrong part: the frame says .* expected 1 of 1"):
        decoder.decode(forged)


def test_ranks_with_other_options_are_refused():
    def body(rank, size):
        with pytest.raises(ConfigMismatchError, match="parts"):
            wrapped(parts=1 + rank)

    run_ranks(body, world_size=2)


def test_ranks_that_cut_differently_are_refused():
    """Equal sizes in other shapes would be cut elsewhere: the plans differ, and nothing is sent."""

    def body(rank, size):
        with wrapped(parts=2, agree_timeout=5.0) as g:
            g.step()
            shape = (ROWS, CHANNELS) if rank else (2, ROWS * CHANNELS // 2)
            with pytest.raises(PlanMismatchError, match="in parts of") as caught:
                gathered(g, tensor(rank, 0, shape), size)
            assert "1152, 1216" in str(caught.value)
            g.reset()
            run(g, rank, size)

    run_ranks(body, world_size=2)


def test_a_target_in_bytes_counts_all_parts_and_none_that_rest():
    def body(rank, size):
        numel = 8 * ROWS * CHANNELS
        asked = numel / 2  # four bits for each element
        with wrapped(codec="rates", target=f"bytes_per_step={asked}", parts=3) as g:
            run(g, rank, size, steps=24, make=lambda r, t: tensor(r, t, (8 * ROWS, CHANNELS)))
            assert len(g._engine.store.control.rates()) == 3
            assert g.stats().target["met"] == pytest.approx(asked, rel=0.1)
            run(g, rank, size, steps=2, make=lambda r, t: tensor(r, t, (1, CHANNELS)))
            assert len(g._engine.store.control.rates()) == 1

    run_ranks(body, world_size=2)


def test_an_estimate_counts_the_headers_of_all_parts():
    whole, cut_up = (estimate(compactdist.Options("int8", parts=n), 2, 1 << 16) for n in (1, 4))
    assert cut_up.state_bytes == whole.state_bytes
    assert cut_up.raw_bytes == whole.raw_bytes
    assert 3 * HEADER_NBYTES <= cut_up.wire_bytes - whole.wire_bytes < 3 * HEADER_NBYTES + 1024


def test_budget_counts_all_parts():
    def body(rank, size):
        whole = size * ROWS * CHANNELS * 4
        for budget, passes in ((whole, 0), (whole - 1, STEPS - 1)):
            with wrapped(parts=3, state_budget_bytes=budget) as g:
                run(g, rank, size)
                stats = g.stats()
                assert stats.passed_through == passes
                assert stats.state_bytes <= budget

    run_ranks(body, world_size=2)
