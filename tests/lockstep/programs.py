"""Random programs of collective and point-to-point calls, and how a rank runs one.

A program is a list of actions, the same on every rank; tensors are drawn from (program seed, action, rank), so ranks
differ in data only. `run_program` runs one on a group (wrapped, or plain for comparison) and returns every result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from hypothesis import strategies as st

from compactdist import _torch
from tests.group.kit import GLOO_HAS_ALL_TO_ALL

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPS = (
    "gather",
    "gather list",
    "gather coalesced",
    "gather functional",
    "to all",
    "to all uneven",
    "to all list",
    "broadcast",
    "pair",
    "ring",
    "batch",
    "relay",
    "rotate",
)

call = st.fixed_dictionaries(
    {
        "do": st.sampled_from(OPS),
        "n": st.sampled_from([1, 6, 48, 130, 960, 3072]),
        "dtype": st.sampled_from(DTYPES),
        "prefix": st.sampled_from(["", "", "k:a", "k:b", "b:cond", "b:uncond"]),
        "root": st.integers(0, 2),
        "tag": st.sampled_from([0, 0, 3]),
        "later": st.booleans(),
        "drop": st.sampled_from([False, False, False, True]),
        "scale": st.sampled_from([1.0, 1.0, 0.0, 1e3]),
    }
)
OTHERS = ["wait", "step", "step", "step", "reset", "reset k", "again", "again", "again", "save", "go back"]
other = st.sampled_from(OTHERS).map(lambda what: {"do": what})
actions = st.lists(st.one_of(call, call, other), min_size=3, max_size=25)


@st.composite
def options(draw: Any, codecs: tuple[str, ...] = ("binary", "int2", "int4", "int8", "raw")) -> dict[str, Any]:
    order = draw(st.sampled_from([0, 1, 1, 2, "auto"]))
    return {
        "codec": draw(st.sampled_from(codecs)),
        "order": order,
        "local": draw(st.sampled_from(["exact", "reconstructed"])),
        "error_feedback": draw(st.sampled_from([None, None, False])),
        "warmup_steps": draw(st.integers(0, 2)),
        "min_numel": draw(st.sampled_from([1, 1, 100])),
        "parts": draw(st.sampled_from([1, 1, 2, 3])),
        "state_budget_bytes": draw(st.sampled_from([None, None, 0, 20_000, 60_000])),
        "find_layout": draw(st.booleans()),
        "state": draw(st.sampled_from(["exact", "int8", "fp8"])),
        "keyframe": draw(st.sampled_from(["int8", "int8", "int4", "raw"])),
    }


@st.composite
def programs(draw: Any) -> dict[str, Any]:
    return {"options": draw(options()), "actions": draw(actions), "seed": draw(st.integers(0, 2**31))}


def data(seed: int, index: int, rank: int, n: int, dtype: torch.dtype, scale: float) -> torch.Tensor:
    """Slowly varying: a part that depends on the rank and size only, and a small part of its own."""
    base = torch.randn(n, generator=torch.Generator().manual_seed(n * 7 + rank))
    change = torch.randn(n, generator=torch.Generator().manual_seed((seed * 31 + index * 7 + rank) % 2**40))
    return ((base + 0.1 * change) * scale).to(dtype)


def split_sizes(n: int, world: int, sender: int) -> list[int]:
    """Chunks of a sender for every receiver: some empty, some small, some large."""
    return [(n * ((sender + 2 * receiver) % 3)) // 2 for receiver in range(world)]


class Runner:
    """Runs a program on one rank.

    Attributes:
        results: clones of the outputs of every call, once waited for.
    """

    def __init__(self, group: Any, seed: int, make: Callable[..., torch.Tensor] = data) -> None:
        self.group = group
        self.make = make
        self.wrapped = hasattr(group, "step")
        self.rank, self.world = group.rank(), group.size()
        self.seed = seed
        self.works: list[tuple[int, list[Any], list[torch.Tensor]]] = []
        self.results: dict[int, list[torch.Tensor]] = {}
        self.random = torch.Generator().manual_seed(seed)
        self.saved: Any = None

    def run(self, actions: list[dict[str, Any]]) -> dict[int, list[torch.Tensor]]:
        last = None
        for index, action in enumerate(actions):
            what = action["do"]
            if what == "again":
                if last is not None:
                    self.call(index, last)
            elif what == "wait":
                self.wait_all()
            elif what == "step":
                if self.wrapped:
                    self.group.step()
            elif what.startswith("reset"):
                self.wait_all()
                if self.wrapped:
                    self.group.reset("a" if what == "reset k" else None)
                    self.group.step()
            elif what in ("save", "go back"):
                self.wait_all()
                if self.wrapped and self.group.options.state_budget_bytes is None:
                    if what == "save":
                        self.saved = self.group.snapshot()
                    elif self.saved is not None:
                        self.group.restore(self.saved)
            else:
                last = action
                self.call(index, action)
        self.wait_all()
        return self.results

    def wait_all(self) -> None:
        """In random order, the same on no two ranks."""
        order = torch.randperm(len(self.works), generator=self.random)
        if self.rank % 2:
            order = order.flip(0)
        for i in order.tolist():
            index, works, outputs = self.works[i]
            for work in works:
                work.wait()
            self.results[index] = [t.clone() for t in outputs]
        self.works.clear()

    @contextlib.contextmanager
    def prefix(self, name: str) -> Iterator[None]:
        """Enter a key or a branch; without a key calls are named as well, for steps differ in the number of calls."""
        kind, _, rest = name.partition(":")
        with contextlib.ExitStack() as entered:
            if self.wrapped and kind == "b":
                entered.enter_context(self.group.branch(rest))
            if self.wrapped and (kind == "k" or self.group.current_step >= 0):
                entered.enter_context(self.group.key(rest if kind == "k" else "other"))
            yield

    def call(self, index: int, action: dict[str, Any]) -> None:
        with self.prefix(action["prefix"]):
            works, outputs = self.issue(index, action)
        works = [work for work in works if work is not None]
        if action["later"] and action["do"] not in ("pair", "gather functional"):
            if not (action["drop"] and self.may_drop(action)):
                self.works.append((index, works, outputs))
            return
        for work in works:
            work.wait()
        self.results[index] = [t.clone() for t in outputs]

    def may_drop(self, action: dict[str, Any]) -> bool:
        """gloo itself loses or crashes on a dropped point-to-point work, so only where it is sure to be ours: a small
        message passes through, and so may any where there is a budget.
        """
        if action["do"] not in ("ring", "batch"):
            return self.wrapped
        return self.wrapped and action["n"] >= 130 and self.group.options.state_budget_bytes is None

    def issue(self, index: int, a: dict[str, Any]) -> tuple[list[Any], list[torch.Tensor]]:
        g, n, dtype, me, world = self.group, a["n"], a["dtype"], self.rank, self.world
        x = self.make(self.seed, index, me, n, dtype, a["scale"])

        def out(*shape: int) -> torch.Tensor:
            return torch.full(shape, 7.0, dtype=dtype)

        what = a["do"]
        if what == "gather":
            y = out(world * n)
            x = y.view(world, n)[me].copy_(x) if a["tag"] else x  # over its input
            works, outputs = [dist.all_gather_into_tensor(y, x, group=g, async_op=True)], [y]
        elif what == "gather list":
            outputs = [out(n) for _ in range(world)]
            works = [dist.all_gather(outputs, x, group=g, async_op=True)]
        elif what == "gather coalesced":
            # one to three tensors of different sizes: some of their sites may be new to a call while others are not
            inputs = [x[: max(1, n - i)] + i for i in range(a["root"] + 1)]
            outputs = [out(world * len(t)) for t in inputs]
            options = dist.distributed_c10d.AllgatherOptions()
            works = [_torch.inner_call(g, _torch.ALL_GATHER_COALESCED, outputs, inputs, options)]
        elif what == "gather functional":
            works, outputs = [], [funcol.wait_tensor(funcol.all_gather_tensor(x, 0, g))]
        elif what == "to all":
            whole = self.make(self.seed, index, me, n * world, dtype, a["scale"])
            y = out(world * n)
            works, outputs = [dist.all_to_all_single(y, whole, group=g, async_op=True)], [y]
        elif what in ("to all uneven", "to all list"):
            # gloo's own list form takes equal sizes only
            into = split_sizes(n, world, me) if what == "to all uneven" else [n] * world
            out_of = [split_sizes(n, world, s)[me] for s in range(world)] if what == "to all uneven" else into
            whole = self.make(self.seed, index, me, sum(into), dtype, a["scale"])
            if what == "to all uneven" or not GLOO_HAS_ALL_TO_ALL:
                y = out(sum(out_of))
                works, outputs = [dist.all_to_all_single(y, whole, out_of, into, group=g, async_op=True)], [y]
            else:
                outputs = [out(size) for size in out_of]
                works = [dist.all_to_all(outputs, list(whole.split(into)), group=g, async_op=True)]
        elif what == "broadcast":
            root = a["root"] % world
            works, outputs = [dist.broadcast(x, group=g, group_src=root, async_op=True)], [x]
        elif what == "pair":
            source, target = a["root"] % world, (a["root"] + 1) % world
            works, outputs = [], []
            if me == source:
                dist.send(x, group=g, group_dst=target, tag=a["tag"])
            elif me == target:
                outputs = [out(n)]
                dist.recv(outputs[0], group=g, group_src=source, tag=a["tag"])
        elif what == "ring":
            y = out(n)
            works = [
                dist.irecv(y, group=g, group_src=(me - 1) % world, tag=a["tag"]),
                dist.isend(x, group=g, group_dst=(me + 1) % world, tag=a["tag"]),
            ]
            outputs = [y]
            if self.wrapped:
                x.fill_(-1)  # the frame is complete
            else:
                self.keep = [*getattr(self, "keep", []), x]
        elif what in ("relay", "rotate"):
            works, outputs = [], self.around(a, x)
        else:
            # one to three messages to the same peer, as K and V in a ring
            outputs = [out(n) for _ in range(a["root"] + 1)]
            peers = {"group": g, "tag": a["tag"]}
            ops = [
                op
                for i, y in enumerate(outputs)
                for op in (
                    dist.P2POp(dist.isend, x + i, group_peer=(me + 1) % world, **peers),
                    dist.P2POp(dist.irecv, y, group_peer=(me - 1) % world, **peers),
                )
            ]
            post = g.batch_isend_irecv if self.wrapped and a["tag"] == 0 else dist.batch_isend_irecv
            works = list(post(ops))
        return works, outputs

    def around(self, a: dict[str, Any], x: torch.Tensor) -> list[torch.Tensor]:
        """A whole round of a ring: each rank sends its own, then what it received; one may write to that before."""
        g, me, world = self.group, self.rank, self.world
        after, before = (me + 1) % world, (me - 1) % world
        outputs = []
        for hop in range(world):
            y = torch.full_like(x, 7.0)
            if a["do"] == "rotate":
                out_of, into = [0] * world, [0] * world
                out_of[before], into[after] = len(y), len(x)
                dist.all_to_all_single(y, x.clone(), out_of, into, group=g)
            else:
                ops = [
                    dist.P2POp(dist.isend, x, group=g, group_peer=after, tag=a["tag"]),
                    dist.P2POp(dist.irecv, y, group=g, group_peer=before, tag=a["tag"]),
                ]
                for work in dist.batch_isend_irecv(ops):
                    work.wait()
            if a["drop"] and me == a["root"] and hop == 0:
                y.neg_()
            outputs.append(y.clone())
            x = y
        return outputs
