"""state_offload: with any budget, every rank sends and receives, to the bit, what it does without one."""

from __future__ import annotations

import hashlib

import pytest
import torch

import compactdist
from compactdist import Rule
from compactdist.codecs.base import tensors_in
from compactdist.config import Options
from compactdist.errors import ConfigError, ConfigMismatchError, NonFiniteError
from compactdist.exchange.work import drain
from compactdist.state import StreamDecoder, StreamEncoder, offloaded
from compactdist.state import store as store_module
from compactdist.state.offloaded import copy_to_host
from compactdist.testing import act_like_nccl
from compactdist.wire import hash64
from tests.group.lifecycle import kit
from tests.group.lifecycle.test_eviction_attack import MixedAttack
from tests.launch import run_ranks
from tests.lockstep import compare
from tests.quick import quick_for

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")

ONE = 4 * kit.N
N = 512
UNEVEN = [[100, 300], [200, 140]]
SUMS = [Rule(op="all_reduce", codec="int8"), Rule(op="reduce_scatter", codec="int8")]
LEARNT = [*SUMS, Rule(op="all_gather", codec={"id": "transform", "bits": 1.0}), Rule(op="send", codec="rates")]


def tensors_of(streams) -> list[torch.Tensor]:
    return [tensor for stream in streams for tensor in tensors_in(stream.move)]


def listen(dist) -> list[str]:
    """A list that grows by a digest of every frame that leaves this rank."""
    sent: list[str] = []
    link = dist._engine.link

    def record(name, at, call):
        def recorded(*args):
            if name != "broadcast" or args[1].rootRank == dist.rank():
                sent.append(hashlib.sha256(args[at].numpy().tobytes()).hexdigest())
            return call(*args)

        setattr(link, name, recorded)

    for name, at in {"all_gather": 1, "all_to_all": 1, "broadcast": 0, "send": 0}.items():
        record(name, at, getattr(link, name))
    return sent


@pytest.fixture
def guarded(monkeypatch):
    """Streams refuse to work with what lies in host memory, which on a CPU would go unnoticed."""
    away: dict[int, torch.Tensor] = {}  # keeps the copies, so that no other tensor gets their addresses

    def to_host(tensor):
        copy = copy_to_host(tensor)
        away[copy.data_ptr()] = copy
        return copy

    def guard(kind, name):
        work = getattr(kind, name)

        def guarded(stream, *args, **kwargs):
            result = None
            for _ in range(2):
                tensors = tensors_of([stream])
                assert not any(tensor.data_ptr() in away for tensor in tensors), stream.where
                result = result or (work(stream, *args, **kwargs),)
            return result[0]

        monkeypatch.setattr(kind, name, guarded)

    monkeypatch.setattr(offloaded, "copy_to_host", to_host)
    guard(StreamEncoder, "stage_or_flag")
    guard(StreamEncoder, "commit")
    guard(StreamDecoder, "decode")
    guard(StreamDecoder, "predict")


def every_collective(dist, rank: int, t: int, name: str) -> list[torch.Tensor]:
    """One call of each kind, at sites of this name; the outputs."""
    size, seed, outs = dist.size(), rank + 7 * sum(map(ord, name)), []

    def tensor(k, n=N):
        return kit.tensor(seed + k, t, n)

    with dist.key(name):
        outs.append(kit.gather(dist, tensor(0)))
        outs.append(torch.empty(size * N))
        dist.all_to_all_single(outs[-1], tensor(1, size * N))
        arriving = [UNEVEN[sender][rank] for sender in range(size)]
        outs.append(torch.empty(sum(arriving)))
        dist.all_to_all_single(outs[-1], tensor(2, sum(UNEVEN[rank])), arriving, UNEVEN[rank])
        outs.append(tensor(3))
        dist.broadcast(outs[-1], src=1)
        outs.append(torch.empty(N))
        dist.reduce_scatter_tensor(outs[-1], tensor(4, size * N))
        outs.append(tensor(5))
        dist.all_reduce(outs[-1])
        x = tensor(6)
        for tag in range(2):  # what arrives is passed on
            outs.append(torch.empty(N))
            work = dist.irecv(outs[-1], 1 - rank, tag=tag)
            dist.isend(x, 1 - rank, tag=tag).wait()
            work.wait()
            x = outs[-1]
    return outs


def two_requests_and_a_site_of_none(dist, rank: int) -> list[torch.Tensor]:
    outs, requests = [], [dist.request(name) for name in ("one", "two")]
    for t in range(3):
        for request in requests:
            with request.resume():
                dist.step()
                outs += every_collective(dist, rank, t, "r" + request.name)
        dist.step()
        with dist.key("none"):
            outs.append(kit.gather(dist, kit.tensor(rank, t, N)))
            out = torch.empty(dist.size() * N)
            work = dist.all_gather_into_tensor(out, kit.tensor(rank + 9, t, N), async_op=True)
            outs.append(kit.gather(dist, kit.tensor(rank + 11, t, N)))  # while that one is under way
            work.wait()
            outs.append(out)
    dist.check()
    requests[0].end()
    return outs


ALL_KINDS = [
    {"codec": "int4", "policy": SUMS},
    {"codec": "binary", "order": 2, "state": "int8", "local": "exact", "policy": SUMS},
    {"codec": {"id": "lowrank", "rank": 2}, "error_feedback": False, "state": "fp8", "policy": SUMS},
    {"codec": "topk", "order": "auto", "policy": SUMS},
    {"codec": "lowrank_int4", "order": 2, "mode": "predict-now", "policy": LEARNT},
]


@pytest.mark.parametrize(
    "options",
    quick_for(ALL_KINDS[:2], ALL_KINDS),
    ids=lambda options: str(options["codec"]),
)
def test_a_budget_changes_no_byte_of_any_collective(options, monkeypatch, guarded):
    # frames name the group, whose name differs between two wraps
    monkeypatch.setattr(store_module, "stream_fingerprint", lambda group, key, described: hash64(key))

    def body(rank, world_size):
        runs, state = [], 0
        for budget in (None, 5, 0) if options["codec"] == "int4" else (None, 5):
            bound = {}
            if budget is not None:
                bound = {"state_budget_bytes": state // 5 if budget else 0, "state_offload": "cpu"}
            with kit.wrap(min_numel=1, agree="off", **options, **bound) as dist:
                sent = listen(dist)
                outs = two_requests_and_a_site_of_none(dist, rank)
                stats = dist.stats()
                state = state or stats.state_bytes
                assert stats.passed_reasons == {}
                assert stats.evictions == 0
                assert stats.offloads == 0 if budget is None else stats.offloads > 20
                assert stats.state_bytes + stats.offloaded_bytes == state
                forwarded = stats.forwarded
                runs.append((outs, sent, kit.finish(dist)))
        first = runs[0]
        for outs, sent, held in runs[1:]:
            assert len(sent) == len(first[1]) > 50
            assert sent == first[1]
            assert all(map(torch.equal, outs, first[0]))
            assert held == first[2]
        assert forwarded > 0 or options["codec"] != "int4"
        return first[2]

    compare.check(run_ranks(body, timeout=120.0))


class OffloadAttack(MixedAttack):
    """Random calls, requests and resets on two groups that do the same, of which one is without a budget."""

    def look(self) -> None:
        store = self.dist._engine.store
        offload = store.offload
        if offload is None:
            return
        assert {key: use.site for key, use in offload._uses.items()}.items() <= store.known.items()
        assert offload._total == sum(use.nbytes for use in offload._uses.values())
        if not self.works:
            for site in store.sites():
                drain(site)
            assert {key: use.nbytes for key, use in offload._uses.items()} == {
                key: site.state_bytes for key, site in store.known.items() if key in offload._uses
            }
            assert not any(use.staged for use in offload._uses.values())
            largest = max((site.held_bytes for site in store.sites()), default=0)
            assert offload._total <= max(offload.budget_bytes, largest)

    def outcome(self) -> tuple:
        stats = self.dist.stats()
        assert stats.evictions == 0
        assert set(stats.passed_reasons) <= {"shape-varies"}
        assert self.dist._engine.store.offload is None or stats.offloads > 10
        return kit.finish(self.dist), {key: (s.calls, s.keyframes, s.wire_bytes) for key, s in stats.sites.items()}


def attack(rank, world_size, seed, actions, nccl, options):
    world = torch.distributed.group.WORLD
    groups = [world, torch.distributed.new_group(list(range(world.size())))]
    if nccl:
        groups = [act_like_nccl(group, delay=0) for group in groups]
    budget = {"state_budget_bytes": 3000 * rank, "state_offload": "cpu"}  # each rank may have its own
    attacks = []
    for group, more in zip(groups, ({}, budget), strict=True):
        dist = kit.wrap(group=group, codec="int8", min_numel=1, policy=SUMS, **options, **more)
        attacks.append(OffloadAttack(dist, rank, seed))
    for one in attacks:
        one.begin_step()
    for _ in range(actions):
        for one in attacks:
            one.act()
    for one in attacks:
        one.finish()
    expected, got = (one.outcome() for one in attacks)
    for one in attacks:
        one.dist.close()
    assert got == expected
    return got[0]


def test_random_calls_move_histories_as_without_a_budget():
    options = {"order": 2, "warmup_steps": 2}
    compare.check(run_ranks(attack, 3, args=(1, 30, False, options), timeout=120))


@pytest.mark.slow
@pytest.mark.parametrize("nccl", [False, True])
@pytest.mark.parametrize("options", [{"mode": "predict-now"}, {"state": "int8", "error_feedback": False}], ids=str)
def test_many_random_calls_move_histories_as_without_a_budget(options, nccl):
    compare.check(run_ranks(attack, 3, args=(2 + nccl, 50, nccl, options), timeout=300))


def test_requests_take_turns_on_the_device_and_free_the_host_when_they_end():
    def body(rank, world_size):
        with kit.wrap(state_budget_bytes=4 * ONE, state_offload="cpu") as dist:
            requests = {name: dist.request(name) for name in ("one", "two", "three")}
            for t in range(3):
                for request in requests.values():
                    with request.resume():
                        dist.step()
                        for _ in range(2):
                            kit.gather(dist, kit.tensor(rank, t))
                    assert dist.stats().state_bytes <= 4 * ONE
            stats = dist.stats()
            assert (stats.state_bytes, stats.offloaded_bytes, stats.offloads) == (4 * ONE, 8 * ONE, 2 * 8)
            away = {key for key, site in stats.sites.items() if site.offloaded_bytes}
            assert away == {f"request:{name}/all_gather#{n}" for name in ("one", "two") for n in range(2)}
            assert all((site.calls, site.keyframes) == (3, 1) for site in stats.sites.values())
            said = " ".join(dist.explain().split())
            assert f"{4 * ONE} bytes of state of {4 * ONE} that may stay on the device, {8 * ONE} bytes in host" in said
            assert "in host memory, 16 offloads" in said
            assert "offloaded: 3 x to make room for other sites" in said
            assert stats.to_dict()["offloaded_bytes"] == 8 * ONE
            requests["one"].end()
            assert dist.stats().offloaded_bytes == 4 * ONE
            dist.check()
            dist.reset()
            stats = dist.stats()
            assert (stats.state_bytes, stats.offloaded_bytes, dist._engine.store.offload._total) == (0, 0, 0)
            with requests["two"].resume():
                dist.step()
                kit.gather(dist, kit.tensor(rank, 0))
            engine = dist._engine
        assert engine.store.known == engine.store.offload._uses == {}, "close() lets go of everything"

    run_ranks(body)


def test_a_call_that_fails_leaves_what_it_brought_back_as_it_was():
    def body(rank, world_size):
        with kit.wrap(codec="int8", state_budget_bytes=2 * ONE, state_offload="cpu", warmup_steps=0) as dist:
            for t in range(2):
                for name in ("a", "b"):
                    dist.step()
                    with dist.key(name):
                        kit.gather(dist, kit.tensor(rank, t))
            site, link = dist._engine.store.site("a/all_gather#0"), dist._engine.link
            assert site.offloaded_bytes == 2 * ONE
            good, link.all_gather = link.all_gather, lambda *_: (_ for _ in ()).throw(RuntimeError("no link"))
            dist.step()
            with dist.key("a"), pytest.raises(RuntimeError, match="no link"):
                kit.gather(dist, kit.tensor(rank, 2))
            link.all_gather = good
            assert dist._engine.store.offload._uses[site.key].staged == 0, "it may be taken away again"
            bad = kit.tensor(rank, 2)
            bad[0] = torch.nan
            with dist.key("b"), pytest.raises(NonFiniteError):
                kit.gather(dist, bad)
            dist.step()
            for name in ("a", "b"):
                with dist.key(name):
                    out = kit.gather(dist, kit.tensor(rank, 3))
                    assert kit.nmse(out, kit.gather_exact(kit.tensor(rank, 3))) < 3e-4
            dist.check()
            assert kit.keyframes(dist)["a/all_gather#0"] == (3, 1)
            return kit.finish(dist)

    compare.check(run_ranks(body))


def test_ranks_may_differ_in_what_they_offload_but_not_in_what_they_drop():
    def body(rank, world_size):
        mine = [{}, {"state_budget_bytes": ONE, "state_offload": "cpu"}][rank]
        with kit.wrap(warmup_steps=0, **mine) as dist:
            for t in range(3):
                dist.step()
                for name in ("a", "b"):
                    with dist.key(name):
                        kit.gather(dist, kit.tensor(rank, t))
            dist.check()
            assert kit.keyframes(dist) == {"a/all_gather#0": (3, 1), "b/all_gather#0": (3, 1)}
            assert (dist.stats().offloads > 0) == (rank == 1)
        mine = [{"state_budget_bytes": ONE}, {"state_budget_bytes": ONE, "state_offload": "cpu"}][rank]
        with pytest.raises(ConfigMismatchError) as info:
            kit.wrap(**mine)
        here, there = [str(ONE), "None"][rank], [str(ONE), "None"][1 - rank]
        said = str(info.value)
        assert f"state_budget_bytes: {here} here, {there} on rank {1 - rank}" in said
        assert "either all of them or none state_offload: a rank with it drops nothing, so None is said" in said

    run_ranks(body)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"state_offload": "disk", "state_budget_bytes": 1}, "state_offload is None or 'cpu', got 'disk'"),
        ({"state_offload": "cpu"}, "state_budget_bytes=None sets no limit"),
    ],
)
def test_impossible_options_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        Options(**options)


def test_a_tensor_that_travels_in_other_parts_lets_go_of_what_lies_in_host_memory():
    """Its history is forgotten where it lies, before the call brings the rest back."""

    def body(rank, world_size):
        with compactdist.wrap(codec="int4", min_numel=64, parts=2, state_budget_bytes=0, state_offload="cpu") as dist:
            for numel in (64, 64, 128, 128, 256, 64, 64, 512):
                dist.step()
                for seed in range(2):  # the first site is taken away for the second one
                    x = torch.linspace(-1, 1, numel) * (1 + rank + seed)
                    out = torch.empty(world_size * numel)
                    dist.all_gather_into_tensor(out, x)
                    assert (out.view(world_size, numel)[rank] - x).abs().max() < 0.1
                assert all(nbytes >= 0 for nbytes in dist._engine.store.state_bytes().values())
            dist.check()

    run_ranks(body, world_size=2)
