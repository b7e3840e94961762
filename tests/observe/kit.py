"""``explain`` of counters by themselves, without a process group."""

from __future__ import annotations

from types import SimpleNamespace

from compactdist.observe.explain import explain
from compactdist.observe.stats import GroupStats


def shown(stats: GroupStats) -> str:
    """What ``explain`` prints of these counters; a stand-in takes the group's place."""

    class Group(SimpleNamespace):
        def __repr__(self) -> str:
            return "<a group>"

    store, chooser = SimpleNamespace(budget_bytes=None, offload=None), SimpleNamespace(min_numel=1024, mode="wait")
    engine = SimpleNamespace(stats=stats, store=store, chooser=chooser)
    keys = SimpleNamespace(step=3, epoch=1)
    options = SimpleNamespace(policy_function=None, layouts=None)
    return explain(Group(options=options, _engine=engine, _keys=keys, stats=lambda wait: stats.snapshot({})))  # type: ignore[arg-type]
