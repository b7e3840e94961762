"""Random calls over many sites under a small budget: values stay right, all ranks keep one book, and it adds up."""

from __future__ import annotations

import random

import pytest
import torch

import compactdist
from compactdist import Rule
from compactdist.exchange.work import drain
from compactdist.testing import act_like_nccl
from tests.group.lifecycle import kit
from tests.launch import run_ranks
from tests.lockstep import compare

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")

N = 96  # elements that each rank contributes, times a factor
ONE = 4 * N
SUMS = [Rule(op="all_reduce", codec="int8"), Rule(op="reduce_scatter", codec="int8")]
WORST = 3e-4  # NMSE of int8, keyframes of eight bits and sums of such


class Attack:
    """One rank's part in a random program that is the same on all ranks, but for the data and the order of waits."""

    def __init__(self, dist, rank: int, seed: int) -> None:
        self.dist, self.rank, self.size = dist, rank, dist.size()
        self.draw = random.Random(seed)  # equal on all ranks
        self.own = random.Random(1000 * seed + rank)
        self.step = 0
        self.works: list = []
        self.requests: dict = {}
        self.legs = 0
        self.journal: list = []

    def data(self, rank: int, name: str, n: int) -> torch.Tensor:
        base = sum(map(ord, name)) * 100 + rank
        return kit.tensor(base, self.step, n)

    def act(self) -> None:
        what = self.draw.choices(
            ["call", "step", "wait", "reset", "reset site", "request", "end"], [60, 22, 8, 1, 2, 5, 2]
        )[0]
        if what == "call":
            self.call()
        elif what == "step":
            self.begin_step()
        elif what == "wait":
            self.wait()
        elif what == "reset":
            self.dist.reset()
            self.begin_step()
        elif what == "reset site":
            self.dist.reset(self.draw.choice("abcdef"))
        elif what == "request":
            self.request()
        elif self.requests:
            self.requests.pop(self.draw.choice(sorted(self.requests))).end()
        self.look()

    def begin_step(self) -> None:
        self.step += 1
        self.dist.step()

    def finish(self) -> None:
        self.wait()
        self.look()
        self.dist.check()

    def request(self) -> None:
        """One step of a request, which may have begun long ago."""
        name = self.draw.choice(["r1", "r2", "r3"])
        request = self.requests.setdefault(name, None) or self.dist.request(name)
        self.requests[name] = request
        with request.resume():
            self.begin_step()
            for _ in range(self.draw.randint(1, 2)):
                self.call()

    def call(self) -> None:
        """One call; asynchronous ones are waited for later, in another order on each rank."""
        op = self.draw.choice(["gather", "gather", "gather", "swap", "broadcast", "reduce", "scatter"])
        name, factor, later = self.draw.choice("abcdef"), self.draw.choice([1, 1, 1, 2]), self.draw.random() < 0.4
        bad = self.draw.randrange(self.size) if self.draw.random() < 0.1 else None
        self.legs += 2 if op == "reduce" else 1
        with self.dist.key(name):
            work, out, expected = getattr(self, op)(name, N * factor * self.size, bad)
        if work is None:
            later = False
        loose = 2.0 if op == "gather" and self.dist.options.mode == "predict-now" else WORST
        self.works.append((work, out, expected, loose))
        if not later:
            self.wait(self.works.pop())

    def gather(self, name, n, bad):
        n //= self.size
        x, out = self.data(self.rank, name, n), torch.empty(self.size * n)
        if bad == self.rank and not self.passes_through(
            f"{name}/all_gather"
        ):  # this rank alone errs at first, sends nothing, and then makes the call
            with pytest.raises(compactdist.errors.BadOutputError):
                self.dist.all_gather([torch.empty(1)] * self.size, x)
        work = self.dist.all_gather_into_tensor(out, x, async_op=True)
        return work, out, torch.cat([self.data(r, name, n) for r in range(self.size)])

    def passes_through(self, key: str) -> bool:
        """Whether some such site may pass through: what errs then is gloo."""
        sites = [site for site in self.dist._engine.store.sites() if key in site.key]
        for site in sites:
            drain(site)
        return any(site.refused or (site.plan is not None and site.plan.reason) for site in sites)

    def swap(self, name, n, bad):
        x, out = self.data(self.rank, name, n), torch.empty(n)
        work = self.dist.all_to_all_single(out, x, async_op=True)
        return work, out, torch.cat([self.data(r, name, n).chunk(self.size)[self.rank] for r in range(self.size)])

    def broadcast(self, name, n, bad):
        root = self.draw.randrange(self.size)
        x = self.data(self.rank, name, n)
        return self.dist.broadcast(x, src=root, async_op=True), x, self.data(root, name, n)

    def reduce(self, name, n, bad):
        x = self.data(self.rank, name, n)
        self.dist.all_reduce(x)
        return None, x, sum(self.data(r, name, n) for r in range(self.size))

    def scatter(self, name, n, bad):
        out = torch.empty(n // self.size)
        self.dist.reduce_scatter_tensor(out, self.data(self.rank, name, n))
        return None, out, sum(self.data(r, name, n) for r in range(self.size)).chunk(self.size)[self.rank]

    def wait(self, *chosen) -> None:
        works = list(chosen) or self.works
        self.own.shuffle(works)
        for work, out, expected, worst in works:
            if work is not None:
                work.wait()
            assert kit.nmse(out, expected) < worst
        if not chosen:
            self.works.clear()

    def look(self) -> None:
        """The book and the memory that is really held, after every action."""
        book, store = self.dist._engine.ledger, self.dist._engine.store
        held = book.held()
        self.journal.append(tuple(held.items()))
        assert book._total == sum(held.values()) <= book._budget
        reserved = {site.key: sum(n for _, n in site.reserved.values()) for site in store.sites()}
        assert store._reserved == sum(reserved.values()) <= book._budget
        assert sum(site.state_bytes for site in store.sites()) <= book._budget
        if not self.works:
            for site in store.sites():
                drain(site)
            reserved = {site.key: sum(n for _, n in site.reserved.values()) for site in store.sites()}
            mine = {key: self.of_this_rank(key, n) for key, n in held.items()}
            assert {key: n for key, n in reserved.items() if n} == mine
            assert {site.key: site.state_bytes for site in store.sites() if site.state_bytes} == mine

    def of_this_rank(self, key: str, nbytes: int) -> int:
        """Without error feedback a sender holds twice as much, which the book counts for all ranks of a broadcast."""
        receives = "broadcast/" in key and f"broadcast/{self.rank}#" not in key
        return nbytes // 2 if receives and self.dist.options.error_feedback is False else nbytes

    def outcome(self) -> tuple:
        """Compared among ranks: the book after every action, the evictions of all sites, and what is held at last."""
        stats = self.dist.stats()
        evictions = {key: site.evictions for key, site in stats.sites.items() if site.evictions}
        assert stats.evictions == sum(evictions.values()) > 0
        calls = [site.calls + sum(site.passed.values()) for site in stats.sites.values()]
        assert sum(calls) == self.legs
        assert set(stats.passed_reasons) <= {"state-budget", "state-budget-pair", "shape-varies"}
        return self.journal, evictions, kit.finish(self.dist)


class MixedAttack(Attack):
    """With messages between neighbours and uneven exchanges, whose bytes the book does not know."""

    def call(self) -> None:
        op = self.draw.choice(["ring", "uneven", None, None, None, None, None])
        if op is None:
            super().call()
            return
        name, n = self.draw.choice("abcdef"), N * self.draw.choice([1, 2])
        self.legs += 1
        with self.dist.key(name):
            getattr(self, op)(name, n)

    def ring(self, name: str, n: int) -> None:
        before, after = (self.rank - 1) % self.size, (self.rank + 1) % self.size
        y = torch.empty(n)
        arriving = self.dist.irecv(y, before)
        leaving = self.dist.isend(self.data(self.rank, name, n), after)
        arriving.wait()
        leaving.wait()
        assert kit.nmse(y, self.data(before, name, n)) < WORST

    def uneven(self, name: str, n: int) -> None:
        ranks = range(self.size)
        sizes = [[n * (1 + (sender + 2 * receiver) % 3) for receiver in ranks] for sender in ranks]
        x = [self.data(sender, name, sum(sizes[sender])) for sender in ranks]
        arriving = [sizes[sender][self.rank] for sender in ranks]
        out = torch.empty(sum(arriving))
        self.dist.all_to_all_single(out, x[self.rank], arriving, sizes[self.rank])
        expected = torch.cat([x[sender].split(sizes[sender])[self.rank] for sender in ranks])
        assert kit.nmse(out, expected) < WORST

    def look(self) -> None:
        """A rank may hold less than the book says, and more outside it; what it holds is reserved, and given back."""
        book, store = self.dist._engine.ledger, self.dist._engine.store
        self.journal.append(tuple(book.held().items()))
        assert book._total == sum(book.held().values()) <= book._budget
        if not self.works:
            for site in store.sites():
                drain(site)
                assert site.state_bytes <= sum(n for _, n in site.reserved.values())
        assert store._reserved == sum(n for site in store.sites() for _, n in site.reserved.values())


PROGRAMS = [
    {"state_budget_bytes": 4 * 3 * ONE},
    {"state_budget_bytes": 9 * 3 * ONE, "order": 2, "warmup_steps": 2, "local": "exact"},
    {"state_budget_bytes": 5 * 3 * ONE, "mode": "predict-now", "warmup_steps": 0},
    {"state_budget_bytes": 2 * 3 * ONE, "state": "int8", "error_feedback": False},
]


def attack(rank, seeds, actions, nccl, kind):
    """Two programs at a time, on two groups of the same ranks."""
    world = torch.distributed.group.WORLD
    groups = [world, torch.distributed.new_group(list(range(world.size())))]
    if nccl:
        groups = [act_like_nccl(group, delay=0) for group in groups]
    outcomes = []
    for seed in seeds:
        options = [PROGRAMS[n % len(PROGRAMS)] for n in (2 * seed, 2 * seed + 1)]
        wrapped = [
            kit.wrap(group=g, codec="int8", min_numel=1, policy=SUMS, **o) for g, o in zip(groups, options, strict=True)
        ]
        attacks = [kind(dist, rank, 10 * seed + n) for n, dist in enumerate(wrapped)]
        for one in attacks:
            one.begin_step()
        for n in range(2 * actions):
            attacks[n % 2].act()
        for one in attacks:
            one.finish()
        outcomes += [one.outcome() for one in attacks]
        for dist in wrapped:
            dist.close()
    return outcomes


def check(world_size, seeds, actions, *, nccl=False, kind=Attack):
    def body(rank, world):
        return attack(rank, seeds, actions, nccl, kind)

    for outcome in zip(*run_ranks(body, world_size, timeout=300), strict=True):
        journal, evictions, _ = outcome[0]
        assert all((j, e) == (journal, evictions) for j, e, _ in outcome), "all ranks keep one book"
        compare.check([held for *_, held in outcome])


def test_random_calls_under_a_small_budget():
    check(3, range(2), 40)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "nccl"), [(2, True), (3, False), (4, True)])
def test_many_random_calls_under_a_small_budget(world_size, nccl):
    check(world_size, range(10, 12), 60, nccl=nccl)


@pytest.mark.slow
def test_many_random_calls_beside_those_that_the_book_does_not_know():
    check(3, range(20, 23), 60, kind=MixedAttack)
