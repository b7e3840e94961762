"""Forward once: plain ring code costs one encoding a chunk, and every rank gets the same bytes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import compactdist
from compactdist.errors import ConfigError, NonFiniteError
from tests.exchange.rings import N, chunk, counts, hop, relative, ring, site, wrap
from tests.group.lifecycle import kit as lifecycle_kit
from tests.launch import run_ranks

STEPS = 6


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (3, {}),
        (4, {}),
        (4, {"order": 2}),
        (3, {"order": 2, "warmup_steps": 3, "state": "int8"}),
        (3, {"order": 1, "state": "fp8"}),
        (3, {"error_feedback": False}),
        (3, {"codec": "lowrank", "find_layout": False}),
        (4, {"codec": "binary", "warmup_steps": 0}),
        (3, {"warmup_steps": 3}),
        (4, {"keyframe": "raw"}),
        (3, {"keyframe": "raw", "state": "fp8"}),
        (4, {"keyframe": "int4", "order": 2}),
    ],
)
def test_every_copy_of_a_chunk_is_the_owners_reconstruction(size, options):
    def body(rank, size):
        g = wrap(**options)
        seen, kept = [], []
        for t in range(STEPS):
            g.step()
            seen.append(ring(g, [chunk(rank, t)]))
            kept.append(g._engine.store.site(site(g, 0)).encoder((rank + 1) % size).predictor.base.clone())
        return seen, kept, [counts(g, h) for h in range(size - 1)], g.stats().forwarded

    ranks = run_ranks(body, size)
    for t in range(STEPS):
        for owner in range(size):
            copies = [ranks[(owner + 1 + h) % size][0][t][h][0] for h in range(size - 1)]
            assert all(torch.equal(copy, copies[0]) for copy in copies[1:])
            assert relative(copies[0], chunk(owner, t)) < 0.3
            if options.get("state", "exact") == "exact":
                assert torch.equal(copies[0], ranks[owner][1][t])
    keyframes = max(1, options.get("warmup_steps", 1))
    # without an exact state a first keyframe of one's own shows that states are equal, but not that tensors are
    own = options.get("keyframe") == "raw" and options.get("state", "exact") != "exact"
    forwarded = STEPS - 1 if own else STEPS
    for _, _, sent, total in ranks:
        assert sent == [(STEPS, keyframes, 0)] + [(STEPS, keyframes, forwarded)] * (size - 2)
        assert total == forwarded * (size - 2)


def test_without_history_frames_are_forwarded_too():
    def body(rank, size):
        g = wrap(order=0)
        seen = []
        for t in range(STEPS):
            g.step()
            seen.append(ring(g, [chunk(rank, t)]))
        return seen, g.stats()

    ranks = run_ranks(body, 3)
    assert all(stats.forwarded == STEPS and stats.state_bytes == 0 for _, stats in ranks)
    for t in range(STEPS):
        assert all(torch.equal(ranks[(r + 1) % 3][0][t][0][0], ranks[(r + 2) % 3][0][t][1][0]) for r in range(3))


def test_the_error_does_not_grow_with_hops():
    def body(rank, size):
        errors = {}
        for forward in (True, False):
            g = wrap(codec="int2", forward=forward)
            for t in range(STEPS):
                g.step()
                seen = ring(g, [chunk(rank, t)])
            errors[forward] = [relative(x, chunk((rank - 1 - h) % size, t)) for h, (x,) in enumerate(seen)]
            assert (g.stats().forwarded > 0) == forward
            assert [counts(g, h)[2] for h in range(size - 1)] == ([0, STEPS, STEPS] if forward else [0, 0, 0])
        return errors

    ranks = run_ranks(body, 4)
    last = {forward: sum(errors[forward][-1] for errors in ranks) / 4 for forward in (True, False)}
    first = {forward: sum(errors[forward][0] for errors in ranks) / 4 for forward in (True, False)}
    assert last[True] == pytest.approx(first[True], rel=1e-6)  # the same four chunks, to the bit
    assert last[False] > 1.1 * first[False]


def touched_at(steps, rank, where):
    """Run a ring of three in which one rank writes to what it received in some steps."""

    def body(me, size, options):
        g = wrap(**options)
        seen, log = [], []
        for t in range(9):
            g.step()

            def touch(h, held, t=t):
                if me == rank and h == where and t in steps:
                    held[0][5] += 1

            seen.append(ring(g, [chunk(me, t)], touch))
            log.append(counts(g, 1))
        return seen, log

    return body


def test_a_touched_tensor_is_encoded_again_after_a_keyframe():
    ranks = run_ranks(touched_at({3}, 1, 0), 3, args=({},))
    seen, log = ranks[1]
    # (calls, keyframes, forwarded): a keyframe back to encoding, a residual, a keyframe that forwarding starts from
    assert log == [
        (1, 1, 1),
        (2, 1, 2),
        (3, 1, 3),
        (4, 2, 3),
        (5, 2, 3),
        (6, 3, 4),
        (7, 3, 5),
        (8, 3, 6),
        (9, 3, 7),
    ]
    for t in range(9):
        sent, arrived = seen[t][0][0].clone(), ranks[2][0][t][1][0]
        if t == 3:
            sent[5] += 1
        assert torch.equal(sent, arrived) == (t not in (3, 4))  # those that were encoded here
        assert relative(arrived, sent) < 0.1
    for other in (0, 2):
        assert ranks[other][1][-1] == (9, 1, 9)


def test_a_site_that_keeps_changing_its_mind_pays_for_few_keyframes():
    def body(rank, size):
        g = wrap()
        for t in range(120):
            g.step()
            ring(g, [chunk(rank, t)], lambda h, held, t=t: held[0].add_(t % 8 == 0) if h == 0 else None)
        return counts(g, 1)

    for calls, keyframes, forwarded in run_ranks(body, 3):
        assert calls == 120
        assert keyframes < 10
        assert forwarded > 10


def test_order_two_needs_no_keyframe_to_encode_again():
    ranks = run_ranks(touched_at({3}, 1, 0), 3, args=({"order": 2},))
    assert ranks[1][1][-1] == (9, 1, 3)
    assert ranks[0][1][-1] == ranks[2][1][-1] == (9, 1, 9)
    for t in range(9):
        sent = ranks[1][0][t][0][0].clone()
        sent[5] += t == 3
        assert relative(ranks[2][0][t][1][0], sent) < 0.2
        assert torch.equal(ranks[2][0][t][1][0], sent) == (t < 3)


@pytest.mark.parametrize("numel", [N, N + 32])
def test_a_ring_that_begins_in_the_middle(numel):
    """Each stream has found its own layout by then; the keyframe of the switch announces that of the other stream."""

    def body(rank, size):
        g = wrap(codec="int2")
        seen = []
        for t in range(8):
            g.step()
            own = chunk(rank, t, numel)
            if t < 3:  # the stream of the second hop carries something else, cut otherwise
                hop(g, [own])
                seen.append(hop(g, [chunk(rank, t, numel).view(-1, 32).flip(1).repeat_interleave(2).view(-1)[:numel]]))
            else:
                seen.append(ring(g, [own]))
        view = g._engine.store.site(site(g, 1)).encoder((rank + 1) % size).view
        return seen, counts(g, 1), view.shape

    ranks = run_ranks(body, 3)
    for rank, (_, sent, shape) in enumerate(ranks):
        assert sent == (8, 2, 5)
        assert shape == (1, numel // 32, 32)
        for t in range(3, 8):
            assert torch.equal(ranks[(rank + 1) % 3][0][t][1][0], ranks[rank][0][t][0][0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keys_and_values_under_prefixes_with_receives_posted_first(dtype):
    def body(rank, size):
        g = wrap(codec="int8")
        after, before = (rank + 1) % size, (rank - 1) % size
        for t in range(STEPS):
            g.step()
            for layer in range(2):
                k, v = chunk(rank, t, dtype=dtype), chunk(rank + 7 * (layer + 1), t, dtype=dtype)
                for h in range(size - 1):
                    with g.key(f"layer{layer}"):
                        new = [torch.empty_like(k), torch.empty_like(v)]
                        works = [dist.irecv(y, group=g, group_src=before) for y in new]
                        works += [dist.isend(x.view(-1), group=g, group_dst=after) for x in (k, v)]
                    for work in works[::-1]:
                        work.wait()
                    k, v = new
                    owner = (rank - 1 - h) % size
                    assert relative(k, chunk(owner, t)) < 0.02
                    assert relative(v, chunk(owner + 7 * (layer + 1), t)) < 0.02
        for layer in range(2):
            for i in range(2):
                sites = [g.stats().sites[site(g, h, f"layer{layer}", 2, i)] for h in range(size - 1)]
                assert [s.forwarded for s in sites] == [0, STEPS, STEPS]

    run_ranks(body, 4)


def test_reset_begins_again_and_a_prefix_alone():
    def body(rank, size):
        g = wrap()
        for request in range(3):
            for t in range(3):
                g.step()
                for prefix in ("a", "b"):
                    with g.key(prefix):
                        ring(g, [chunk(rank, t)])
            g.reset() if request == 0 else g.reset("a")
        stats = g.stats()
        b = stats.sites[site(g, 1, "b")]
        return stats.forwarded, (b.calls, b.keyframes, b.forwarded)

    # the first reset is of everything, so "b" starts twice
    assert run_ranks(body, 3) == [(18, (9, 2, 9))] * 3


def test_what_is_not_the_received_tensor_is_encoded():
    def body(rank, size):
        g = wrap()
        peer = 1 - rank
        same = {
            "itself": lambda x: x,
            "a view of all of it": lambda x: x.view(64, 64).view(-1),
            "detached": lambda x: x.detach(),
            "a copy": lambda x: x.clone(),
            "other strides": lambda x: x.view(64, 64).t(),
            "another shape": lambda x: x.view(64, 64),
        }
        for t in range(4):
            g.step()
            for name, pick in same.items():
                x = chunk(rank, t)
                with g.key(name):
                    (y,) = hop(g, [x])
                    y = pick(y)
                    (z,) = hop(g, [y])
                assert relative(z, x.view(z.shape).t() if "strides" in name else x.view(z.shape)) < 0.1
        return {name: g.stats().sites[f"{name}/send/{rank}>{peer}/t0#1"].forwarded for name in same}

    for forwarded in run_ranks(body, 2):
        assert forwarded == {
            "itself": 4,
            "a view of all of it": 4,
            "detached": 4,
            "a copy": 0,
            "other strides": 0,
            "another shape": 0,
        }


def test_forward_can_be_switched_off_and_trusted():
    def body(rank, size):
        g = wrap(forward=False)
        with pytest.raises(ConfigError, match="forward=False"), g.forwarding():
            pass
        g = wrap()
        seen = []
        for t in range(4):
            g.step()
            with g.forwarding():
                seen.append(ring(g, [chunk(rank, t)], lambda h, held, t=t: held[0].mul_(2) if t == 2 else None))
        return seen, counts(g, 1)

    ranks = run_ranks(body, 3)
    assert all(sent == (4, 1, 4) for _, sent in ranks)
    for rank in range(3):  # a broken promise: what was received went on
        assert all(torch.equal(ranks[rank][0][t][0][0], ranks[(rank + 1) % 3][0][t][1][0]) for t in range(4))


def test_no_tensor_is_kept_alive_and_memory_does_not_grow():
    def body(rank, size):
        g = wrap()
        held = []
        for t in range(8):
            g.step()
            ring(g, [chunk(rank, t)])
            arrivals = g._engine.arrivals
            assert not arrivals._by_stream
            assert not arrivals._by_address
            held.append(g.stats().state_bytes)
        # three streams come in, and one that is encoded goes out; the others share the history of those that come in
        assert held[-1] == held[2] == 4 * 4 * N
        buffers = [torch.empty(N) for _ in range(2)]
        for t in range(8, 12):  # into buffers that stay: a payload a forwarded stream is kept, and counted
            g.step()
            x = chunk(rank, t)
            for y in buffers:
                for work in dist.batch_isend_irecv(
                    [
                        dist.P2POp(dist.isend, x, (rank + 1) % size, g),
                        dist.P2POp(dist.irecv, y, (rank - 1) % size, g),
                    ]
                ):
                    work.wait()
                x = y
        kept = sum(g._engine.arrivals.kept_bytes().values())
        assert 2 * N // 2 < kept < 2 * N
        assert g.stats().state_bytes == held[-1] + kept

    run_ranks(body, 4)


@pytest.mark.parametrize("forward", [True, False])
def test_a_shared_history_needs_no_budget(forward):
    def body(rank, size):
        g = wrap(forward=forward, state_budget_bytes=4 * 4 * N)
        for t in range(3):
            g.step()
            ring(g, [chunk(rank, t)])
        with g.key("more"):
            hop(g, [chunk(rank, 9)])
        return g.stats().state_bytes, g.stats().passed_reasons

    # two streams come in and two go out, of which one shares: that leaves room for the sender of a third
    assert run_ranks(body, 3) == [(5 * 4 * N, {}) if forward else (4 * 4 * N, {"state-budget-pair": 1})] * 3


def test_nan_in_a_ring_ends_with_an_error_and_heals():
    def body(rank, size):
        g = wrap()
        errors = 0
        for t in range(8):
            g.step()
            x = chunk(rank, t)
            if rank == 0 and t == 3:
                x[7] = torch.nan
            held = x
            for _ in range(size - 1):
                y = torch.empty_like(held)
                ops = [
                    dist.P2POp(dist.isend, held, (rank + 1) % size, g),
                    dist.P2POp(dist.irecv, y, (rank - 1) % size, g),
                ]
                for work in dist.batch_isend_irecv(ops):
                    try:
                        work.wait()
                    except NonFiniteError:
                        errors += 1
                        y.zero_()
                held = y
            if t > 4:
                assert relative(held, chunk((rank + 1) % size, t)) < 0.1
        return errors, counts(g, 1)

    ranks = run_ranks(body, 3)
    assert [errors for errors, _ in ranks] == [1, 1, 0]  # the sender and the receiver of the NaN
    calls, keyframes, forwarded = ranks[1][1]
    assert (calls, keyframes) == (8, 3)  # the first, zeros in place of the NaN, and the stream that begins again
    assert forwarded == 3 + 3


def test_codecs_that_differ_from_hop_to_hop():
    def policy(call):
        if call.key.endswith("#1") and call.step == 2:
            return "int8"
        return "raw" if call.step == 4 else None

    def body(rank, size):
        g = wrap(policy=policy)
        seen = []
        for t in range(8):
            g.step()
            seen.append(ring(g, [chunk(rank, t)]))
        return seen, counts(g, 1)

    ranks = run_ranks(body, 3)
    for rank, (_, sent) in enumerate(ranks):
        # int8 at one hop cannot go on as int4 came: a keyframe, which later ones are passed on after
        assert sent == (8, 3, 8)
        for t in range(8):
            assert torch.equal(ranks[rank][0][t][0][0], ranks[(rank + 1) % 3][0][t][1][0])
    assert all(relative(ranks[r][0][4][1][0], chunk((r - 2) % 3, 4)) == 0 for r in range(3))


def test_received_from_anybody():
    def body(rank, size):
        g = wrap()
        for t in range(4):
            g.step()
            x = chunk(rank, t)
            if rank == 0:
                dist.send(x, group=g, group_dst=1)
                dist.recv(x, group=g, group_src=1)
                assert relative(x, chunk(0, t)) < 0.05
            else:
                dist.recv(x, group=g)
                dist.send(x, group=g, group_dst=0)
        return g.stats().forwarded

    assert run_ranks(body, 2) == [0, 4]


def test_a_tensor_that_requires_grad_goes_as_it_is():
    def body(rank, size):
        g = wrap()
        for t in range(4):
            g.step()
            (y,) = hop(g, [chunk(rank, t)])
            if t == 2:
                y.requires_grad_()
            (z,) = hop(g, [y])
            assert relative(z, chunk(rank, t)) < 0.05
        return counts(g, 1), g.stats().passed_reasons

    for sent, passed in run_ranks(body, 2):
        assert passed == {"autograd": 1}
        assert sent == (3, 2, 3)


def test_what_is_passed_on_is_recorded_and_its_error_is_not_sampled(tmp_path):
    def body(rank, size):
        g = wrap(sample_errors_every=1)
        with compactdist.record(g, tmp_path / "{rank}.safetensors", sites="send/*#1") as recording:
            for t in range(STEPS):
                g.step()
                ring(g, [chunk(rank, t)])
        own, passed_on = (g.stats().sites[site(g, h)].sampled for h in (0, 1))
        return recording.written[site(g, 1)][0], own, passed_on

    assert run_ranks(body, 3) == [(STEPS, STEPS, 0)] * 3


@pytest.mark.parametrize("codec", ["transform:block=64", "int2:scales=token_history"])
def test_a_codec_with_a_memory_goes_on_after_frames_of_another_one_were_passed_on(codec):
    """A policy answers otherwise for one step, whose frame is passed on; later tensors are changed, and coded anew."""
    n = 2048

    def rotate(dist, x):
        y, me, world = torch.empty(n), dist.rank(), dist.size()
        sizes = [[n if rank == (me + step) % world else 0 for rank in range(world)] for step in (1, -1)]
        dist.all_to_all_single(y, x, *sizes)
        return y

    def body(rank, world):
        errors = []
        policy = [compactdist.Rule("int8", first_step=3, last_step=3)]
        with compactdist.wrap(codec=codec, policy=policy, find_layout=False) as dist:
            for t in range(7):
                dist.step()
                arrived = rotate(dist, lifecycle_kit.tensor(rank, t))
                if t > 3:
                    arrived = arrived + 0.05 * torch.randn(n, generator=torch.Generator().manual_seed(t))
                again = rotate(dist, arrived)
                sent_on = [torch.empty(n) for _ in range(world)]
                torch.distributed.all_gather(sent_on, arrived)
                errors.append(lifecycle_kit.nmse(again, sent_on[(rank + 1) % world]))
                dist.check()
            assert dist.stats().forwarded == 4
        return errors

    for errors in run_ranks(body):
        assert errors[:4] == [0, 0, 0, 0]
        assert max(errors) < 4e-3
