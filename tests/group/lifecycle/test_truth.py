"""stats, explain and estimate tell what was really sent."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed

from compactdist import Layout
from compactdist.wire import HEADER_NBYTES
from tests.group.kit import replace_inner
from tests.group.lifecycle import kit
from tests.launch import run_ranks
from tests.quick import quick_for

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


class Counting:
    """Stands before the inner group and counts the bytes handed to it, per link."""

    def __init__(self, inner):
        self._inner, self.sent, self.calls = inner, 0, []
        self._me, self._links = inner.rank(), inner.size() - 1

    def __getattr__(self, name):
        method = getattr(self._inner, name)

        def counted(*args):
            self.sent += self._bytes(name, args)
            self.calls.append(name)
            return method(*args)

        return counted if name in NAMES else method

    def _bytes(self, name, args):
        def size(t):
            return t.numel() * t.element_size()

        if name in ("all_gather_single", "_allgather_base"):
            return self._links * size(args[1])
        if name == "allgather":
            return self._links * size(args[1][0])
        if name in ("all_to_all_single", "alltoall_base"):
            x, splits = args[1], args[3]
            rows = x.shape[0]
            mine = splits[self._me] if splits else rows // (self._links + 1)
            return size(x) - mine * (size(x) // rows)
        if name == "broadcast":
            return self._links * size(args[0][0]) if args[1].rootRank == self._me else 0
        if name == "send":
            return size(args[0][0])
        return 0


NAMES = (
    "all_gather_single",
    "_allgather_base",
    "allgather",
    "all_to_all_single",
    "alltoall_base",
    "broadcast",
    "send",
    "recv",
)


def everything(dist, rank, t, world):
    """Calls of every kind: compressed, too small, of other dtypes, even and uneven."""
    raw = 0
    for n, dtype in ((2048, torch.float32), (3000, torch.bfloat16), (10, torch.float32), (2000, torch.int32)):
        x = kit.tensor(rank, t, n, dtype)
        kit.gather(dist, x)
        raw += (world - 1) * n * dtype.itemsize
        dist.all_gather([torch.empty(n, dtype=dtype) for _ in range(world)], x)
        raw += (world - 1) * n * dtype.itemsize
        out = torch.empty(world * n, dtype=dtype)
        dist.all_to_all_single(out, kit.tensor(rank, t, world * n, dtype))
        raw += (world - 1) * n * dtype.itemsize
        dist.broadcast(x, src=1)
        raw += (world - 1) * n * dtype.itemsize if rank == 1 else 0
        y = torch.empty(n, dtype=dtype)
        works = [
            dist.irecv(y, (rank - 1) % world),
            dist.isend(kit.tensor(rank, t, n, dtype), (rank + 1) % world),
        ]
        for work in works:
            work.wait()
        raw += n * dtype.itemsize
    for scale in (1000, 7):
        into = [scale * (1 + (rank + peer) % 2) for peer in range(world)]
        out = torch.empty(sum(into))
        dist.all_to_all_single(out, kit.tensor(rank, t, sum(into)), into, into)
        raw += 4 * (sum(into) - into[rank])
    return raw


def test_bytes_are_those_handed_to_the_inner_group():
    def body(rank, world_size):
        with kit.wrap() as dist:
            counting = Counting(dist.inner)
            replace_inner(dist, counting)
            raw = 0
            for t in range(4):
                if t:
                    dist.step()
                raw += everything(dist, rank, t, world_size)
                stats = dist.stats()
                assert stats.wire_bytes == counting.sent, (t, stats.wire_bytes - counting.sent)
                assert stats.raw_bytes == raw, (t, stats.raw_bytes - raw)
            assert stats.compressed_calls > 0
            assert set(stats.passed_reasons) >= {"no-step", "small", "dtype"}
            assert stats.ratio == stats.raw_bytes / stats.wire_bytes > 1
            for site in stats.sites.values():
                assert site.state_bytes == dist._engine.store.site(site.key).state_bytes
            replace_inner(dist, counting._inner)

    run_ranks(body, world_size=3)


def test_explain_names_codec_ratio_and_reasons():
    def body(rank, world_size):
        with kit.wrap(codec="int8", keyframe="raw", sample_errors_every=1) as dist:
            kit.gather(dist, kit.tensor(rank))
            for t in range(4):
                dist.step()
                with dist.key("l3.kv"):
                    kit.gather(dist, kit.tensor(rank, t))
                kit.gather(dist, kit.tensor(rank, t, 10))
                torch.distributed.all_reduce(torch.ones(3), group=dist)
            text, stats = dist.explain(), dist.stats()
        site = stats.sites["l3.kv/all_gather#0"]
        row = next(line for line in text.splitlines() if line.startswith("l3.kv/all_gather#0")).split()
        assert row[1:4] == ["int8", "4", "1"]
        assert row[4:6] == [f"{site.raw_bytes / 1e3:.2f}", f"{site.wire_bytes / 1e3:.2f}"]
        assert row[6] == f"{site.ratio:.2f}"
        assert row[7] == f"{site.last_wire_bits_per_element:.2f}"
        assert row[8] == f"{2 * 4 * kit.N / 1e3:.2f}"
        assert row[9:] == [f"{site.nmse_db:.1f}"]  # nothing was forwarded or received
        small = f"4 x all_gather: small (10 elements, and min_numel is {dist.options.min_numel})"
        for fact in ("1 x all_gather: no-step", small, "4 x all_reduce: op", "4 steps"):
            assert fact in text, text
        assert f"{stats.raw_bytes} raw bytes as {stats.wire_bytes} wire bytes" in " ".join(text.split())
        dead = 8 * (site.wire_bytes - (4 * kit.N + HEADER_NBYTES)) / 3 / kit.N
        assert site.last_wire_bits_per_element == pytest.approx(dead)

    run_ranks(body)


@pytest.mark.parametrize("every", [1, 2])
def test_sampled_error_is_the_true_error(every):
    def body(rank, world_size):
        with kit.wrap(codec="binary", sample_errors_every=every) as dist:
            error = energy = 0.0
            for t in range(6):
                dist.step()
                x = kit.tensor(rank, t)
                out = kit.gather(dist, x).view(world_size, -1)[rank]
                if (t + 1) % every == 0:
                    error += float((out.double() - x.double()).square().sum())
                    energy += float(x.double().square().sum())
            site = dist.stats().sites["all_gather#0"]
            assert site.sampled == 6 // every
            assert site.nmse_db == pytest.approx(10 * math.log10(error / energy), abs=1e-6)
            dist.reset_stats()
            assert dist.stats().sites == {}
            assert dist.stats().wire_bytes == 0
            assert dist.stats().state_bytes > 0

    run_ranks(body)


@pytest.mark.parametrize("local", ["exact", "reconstructed"])
def test_local(local):
    def body(rank, world_size):
        with kit.wrap(codec="binary", local=local) as dist:
            outs = []
            for t in range(4):
                dist.step()
                x = kit.tensor(rank, t)
                out = kit.gather(dist, x)
                assert torch.equal(out.view(world_size, -1)[rank], x) == (local == "exact")
                outs.append(out)
            return outs

    ranks = run_ranks(body, world_size=3)
    for t in range(4):
        same = [torch.equal(ranks[0][t], other[t]) for other in ranks[1:]]
        assert all(same) if local == "reconstructed" else not any(same)
        if local == "exact":
            chunks = [r[t].view(3, -1) for r in ranks]
            assert torch.equal(chunks[0][1], chunks[2][1])


def test_the_roots_tensor_stays_as_it_was():
    def body(rank, world_size):
        with kit.wrap(codec="binary") as dist:
            for t in range(3):
                dist.step()
                x = kit.tensor(0, t)
                dist.broadcast(x, src=0)
                assert torch.equal(x, kit.tensor(0, t)) == (rank == 0)

    run_ranks(body)


@pytest.mark.parametrize("codec", ["int2", "transform:bits=1"])
def test_estimate_with_channels_is_what_a_run_with_a_layout_hint_reports(codec):
    def body(rank, world_size):
        rows, channels, dtype, steps = 40, 192, torch.bfloat16, 3
        layouts = {"*": Layout("(g r c) -> g r c", g=1, c=channels)}
        with kit.wrap(codec=codec, layouts=layouts, find_layout=False) as dist:
            guess = dist.estimate(rows * channels, dtype=dtype, steps=steps, channels=channels)
            sent = []
            for t in range(steps):
                dist.step()
                before = dist.stats().wire_bytes
                kit.gather(dist, kit.tensor(rank, t, rows * channels, dtype))
                sent.append(dist.stats().wire_bytes - before)
            assert sent == [guess.keyframe_bytes, *[guess.wire_bytes] * (steps - 1)]
            assert dist.stats().state_bytes == guess.state_bytes

    run_ranks(body)


CONFIGS = [{}, {"order": 2}, {"order": 0}, {"error_feedback": False}, {"codec": "raw"}]


@pytest.mark.parametrize("config", quick_for(CONFIGS[:2], CONFIGS), ids=repr)
@pytest.mark.parametrize("op", ["all_gather", "all_to_all", "send", "broadcast"])
def test_estimate_is_what_a_run_reports(op, config):
    def body(rank, world_size):
        n, dtype, steps, sites = 3000, torch.bfloat16, 4, 2
        with kit.wrap(find_layout=False, **config) as dist:
            guess = dist.estimate(n, op=op, dtype=dtype, sites=sites, steps=steps)
            sent = []
            for t in range(steps):
                dist.step()
                before = dist.stats().wire_bytes
                for call in range(sites):
                    x = kit.tensor(rank + 10 * call, t, n, dtype)
                    if op == "all_gather":
                        kit.gather(dist, x)
                    elif op == "all_to_all":
                        dist.all_to_all_single(torch.empty(world_size * n, dtype=dtype), x.repeat(world_size))
                    elif op == "broadcast":
                        dist.broadcast(x, src=1)
                    elif rank == 1:
                        dist.send(x, 2)
                    elif rank == 2:
                        dist.recv(torch.empty_like(x), 1)
                sent.append(dist.stats().wire_bytes - before)
            stats = dist.stats()
        if rank == 1 or op in ("all_gather", "all_to_all"):
            assert stats.state_bytes == guess.state_bytes
            assert sent == [guess.keyframe_bytes, *[guess.wire_bytes] * (steps - 1)]
            assert stats.raw_bytes == steps * guess.raw_bytes
            assert stats.ratio == pytest.approx(guess.request_ratio)

    run_ranks(body, world_size=3)
