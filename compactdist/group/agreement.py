"""Ranks agree on something through the store, one thing after the other, before a byte of it travels.

An agreement has a number ``epoch.n``; ``n`` counts from 0 in each epoch. A rank compares what it is about to do with
what the first rank to come wrote (``compare_set``), and counts itself in (``add``). The last rank to come writes
``done``; a rank that is about to do something else writes ``veto`` there. Everyone looks for that one key. Successful
agreements leave a constant number of keys: the first rank to come removes them when it next has to wait.

A rank that has waited for half a second says that it is there, so that an error can name those that are missing. What
is compared pair by pair has keys of its own, which are removed once all ranks have come to a later agreement.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch.distributed.distributed_c10d import PrefixStore

from compactdist.errors import PlanMismatchError, PlanTimeoutError
from compactdist.observe.stats import PassReason

__all__ = ["PASSES", "Agreement", "Subject"]

_log = logging.getLogger("compactdist")
_PAUSE_OF_A_RANK, _LONGEST_PAUSE, _SHARE = 0.00005, 0.05, 0.125
"""Seconds between two looks at the store: ``_SHARE`` of the wait so far, by which a rank may go on late. A pause is at
least ``_PAUSE_OF_A_RANK`` times the group's size, for looks of many ranks delay one another, and at most
``_LONGEST_PAUSE``.
"""

_WARN_SECONDS = 20.0
_HERE_SECONDS = 0.5
"""Seconds after which a rank that waits says that it is there."""

_MOST_LEFT = 8
"""Keys of ended agreements that a rank leaves in the store before it takes the time to remove them."""

_DONE, _VETO, _GONE = "done", "veto", "gone"  # the latter two with what, or who, it was
PASSES = "passes through"
"""The fact ``tensor`` of a call that is not compressed; the fact ``codec`` says why."""
_CONNECTED = "connected for frames"
_OPEN = "open"
"""Never written: ``compare_set`` answers with what it expected where there is no such key."""


class Subject(NamedTuple):
    """What ranks agree on.

    Attributes:
        epoch: resets of the group so far.
        facts: names and values that must be equal on all ranks.
        pairs: for each rank, what this rank sends to it and gets from it; empty where ``facts`` say it all.
    """

    epoch: int
    facts: Mapping[str, Any]
    pairs: Sequence[tuple[str, str]] = ()


class _Coming(NamedTuple):
    """What the first rank to come to an agreement is about to do.

    Attributes:
        name: of the agreement.
        digest: of the facts.
        rank: of the group.
        facts: as in :class:`Subject`.
    """

    name: str
    digest: str
    rank: int
    facts: Mapping[str, Any]

    def text(self) -> str:
        """As the store keeps it."""
        return json.dumps(self)

    @classmethod
    def read(cls, text: str) -> _Coming:
        """The inverse of :meth:`text`."""
        return cls(*json.loads(text))

    def agrees_with(self, other: _Coming) -> bool:
        """Whether both are about to do the same in the same agreement."""
        return self.name == other.name and self.digest == other.digest


class Agreement:
    """One rank's part in the agreements of a group.

    Args:
        store: the group's store; the agreement works on a connection of its own.
        prefix: of all keys; no other group of this store, before or after, has it.
        rank, size: in the group.
        label: names group and rank in error messages.
        timeout: seconds to wait for the other ranks.
        heard_of: called with the epoch of a rank that is about to do something else, and of this one.
    """

    def __init__(
        self,
        store: Any,
        prefix: str,
        rank: int,
        size: int,
        label: str,
        timeout: float,
        heard_of: Callable[[int], None] = lambda epoch: None,
    ) -> None:
        # calls of other threads on the caller's connection must not wait for ours
        self._store = store.clone()
        self._prefix = prefix
        self._rank = rank
        self._size = size
        self._label = label
        self._timeout = timeout
        self._heard_of = heard_of
        self._epoch = 0
        self._number = 0
        self._last = ""
        self._ended = self._ended_before = ""
        self._agreed: Mapping[str, Any] = {}
        self._left: list[str] = []
        self._posted: list[str] = []
        self._broken: tuple[int, str] | None = None
        self._lock = threading.Lock()

    def refuse(self, epoch: int) -> None:
        """Refuse every call of an epoch in which ranks could not agree: what they do no longer belongs together.

        Raises:
            PlanMismatchError: there was such an agreement in this epoch.
        """
        if self._broken is not None and self._broken[0] == epoch:
            raise PlanMismatchError(
                f"{self._label}: since the last reset() ranks could not agree on a call, so none of its collectives is "
                f"safe now. Call reset() on all ranks. What happened then: {self._broken[1]}"
            )

    def agree(self, subject: Subject, keep_waiting: Any = None) -> None:
        """Wait until all ranks have come with the same subject.

        Args:
            subject: what this rank is about to do.
            keep_waiting: called now and then; a false answer ends the wait.

        Raises:
            PlanMismatchError: some rank came with another subject. All ranks that come get this error.
            PlanTimeoutError: some ranks did not come in time, or the wait was ended.
        """
        with self._lock:
            self._agree_or_break(subject, keep_waiting)

    def _agree_or_break(self, subject: Subject, keep_waiting: Any = None) -> None:
        """As :meth:`agree`; the lock is held."""
        try:
            self._agree(subject, keep_waiting)
        except (PlanMismatchError, PlanTimeoutError) as error:
            self._broken = subject.epoch, str(error)
            self._heard_of(subject.epoch)
            raise

    def _agree(self, subject: Subject, keep_waiting: Any) -> None:
        if subject.epoch != self._epoch:
            self._epoch, self._number = subject.epoch, 0
        name = f"{self._epoch}.{self._number}"
        self._number += 1
        store = self._store
        pairs = self._post_pairs(name, subject)
        facts = dict(subject.facts)
        digest = hashlib.blake2b(repr(sorted(facts.items())).encode(), digest_size=12).hexdigest()
        mine = _Coming(name, digest, self._rank, facts)
        found = self._found(mine)
        done = self._key(f"done/{name}")
        if not found.agrees_with(mine):
            against = {found.rank: found.facts}
            if store.check([done]):  # it has failed before: what the others agree on by now is no matter of this rank
                against |= self._against(store.get(done).decode())
            else:
                # both, for who reads it may be about to do the same as one of them
                veto = _VETO + json.dumps([[self._rank, facts], [found.rank, found.facts]])
                for key in {done, self._key(f"done/{found.name}")}:
                    store.compare_set(key, "", veto)
            raise self._mismatch(subject, against)
        came = store.add(self._key(f"count/{name}"), 1)
        if came == 1 and self._ended:
            # all ranks have been counted in the last agreement, so they have seen the end of the one before
            self._left.append(f"count/{self._ended}")
            if self._ended_before:
                self._left.append(f"done/{self._ended_before}")
        if came == self._size:
            end = store.compare_set(done, "", _DONE).decode()
        else:
            end = self._wait(done, name, subject, keep_waiting)
        if end != _DONE:
            raise self._mismatch(subject, self._against(end), self._gave_up(end))
        self._ended_before, self._ended, self._agreed = self._ended, name, facts
        for key in self._posted:  # all ranks have come to this agreement, so they have read what was posted before
            store.delete_key(key)
        self._posted = [pairs] if pairs else []
        if pairs:
            self._compare_pairs(name, subject)

    def connect(self, make: Callable[[Any], None], keys: Sequence[str]) -> None:
        """Make a gloo group, which all ranks do now: after the same agreement. Then all agree that they have.

        Args:
            make: makes it with the store that it is given, and that nobody else uses.
            keys: that it leaves there.

        Raises:
            PlanTimeoutError: this rank could not be connected.
            PlanMismatchError: another rank could not.
        """
        with self._lock:
            prefix, failure = self._key(f"connected/{self._ended}"), None
            self._posted += [f"{prefix}/{key}" for key in keys]
            try:
                make(PrefixStore(prefix, self._store))
            except RuntimeError as error:
                failure = error
            facts = {"epoch": self._epoch, _CONNECTED: "yes" if failure is None else f"no ({failure})"}
            try:
                self._agree_or_break(Subject(self._epoch, facts))
            except (PlanMismatchError, PlanTimeoutError):
                if failure is None:
                    raise
            if failure is not None:
                raise PlanTimeoutError(
                    f"{self._label}: ranks agreed on their first collective, and could not connect a gloo group for "
                    f"its frames ({failure}). Nothing was sent; see that all ranks run and that a rank may open one "
                    "more connection to each of the others, and call reset() on all ranks"
                ) from failure

    def close(self) -> None:
        """Take part no more. The last rank to close removes the keys of all: others may still read them before."""
        with contextlib.suppress(RuntimeError):  # the store may be gone already
            self._clear_up()
            if self._store.add(self._key("closed"), 1) == self._size:
                ranks = range(self._size)
                of_ranks = [f"{what}/{rank}" for rank in ranks for what in ("here", f"pairs/{self._ended}")]
                ends = [f"done/{self._ended_before}", f"done/{self._ended}", f"count/{self._ended}"]
                for key in ("now", "closed", *ends, *of_ranks):
                    self._store.delete_key(self._key(key))

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def _clear_up(self) -> None:
        """Remove what ended agreements have left."""
        for key in self._left:
            self._store.delete_key(self._key(key))
        self._left.clear()

    def _post_pairs(self, name: str, subject: Subject) -> str:
        """Post what is compared pair by pair; the key, or nothing if there is nothing to compare."""
        if not subject.pairs:
            return ""
        key = self._key(f"pairs/{name}/{self._rank}")
        self._store.set(key, json.dumps([list(pair) for pair in subject.pairs]))
        return key

    def _found(self, mine: _Coming) -> _Coming:
        """What the first rank of this agreement is about to do: the same as this rank, or something else."""
        store, now, expected, written = self._store, self._key("now"), self._last, mine.text()
        while True:
            text: str = store.compare_set(now, expected, written).decode()
            found = _Coming.read(text) if text else None
            if found is not None and found.name == mine.name:
                self._last = text
                return found
            if text == expected:  # the answer where there is no such key
                expected = ""
            elif found is not None and store.check([self._key(f"done/{found.name}")]):
                expected = text  # left by an agreement that has ended
            elif found is not None:
                self._last = text
                return found

    def _wait(self, done: str, name: str, subject: Subject, keep_waiting: Any) -> str:
        """Wait for the end of an agreement; how it ended."""
        began, warned, here = time.monotonic(), False, False
        pause = shortest = _PAUSE_OF_A_RANK * self._size
        # asked for again and again: a blocking wait of the store prints a warning whenever its time is up
        end: str
        while (end := self._store.compare_set(done, _OPEN, _OPEN).decode()) == _OPEN:
            if self._left:
                self._clear_up()
                continue
            time.sleep(pause)
            waited = time.monotonic() - began
            pause = min(max(_SHARE * waited, shortest), _LONGEST_PAUSE)
            if waited > _HERE_SECONDS and not here:
                here = True
                self._store.set(self._key(f"here/{self._rank}"), name)
            if waited > _WARN_SECONDS and not warned:
                warned = True
                _log.warning("%s", self._missing(name, subject, waited))
            ended = keep_waiting is not None and not keep_waiting()
            if waited > self._timeout or ended:
                end = self._store.compare_set(done, "", f"{_GONE}{self._rank}").decode()
                if not end.startswith(_GONE):
                    return end  # the others came at the last moment
                raise PlanTimeoutError(self._missing(name, subject, waited))
        if len(self._left) > _MOST_LEFT:
            self._clear_up()
        return end

    def _missing(self, name: str, subject: Subject, waited: float) -> str:
        others = [rank for rank in range(self._size) if rank != self._rank]
        missing = [f"rank {rank}" for rank in others if not self._has_come(rank, name)]
        who = ", ".join(missing) or "nobody any more, but not all came in time"
        last = f"{_shown(self._agreed)} (agreement {self._ended})" if self._ended else "nothing yet"
        return (
            f"{self._label}: waiting for {waited:.0f} s to agree on {_shown(subject.facts)} (agreement {name}); "
            f"missing: {who}. All ranks last agreed on {last}. A rank that is missing has not come to a call that is "
            "new to all: it makes other calls, has missed or added a step() or reset(), or lets it pass through. "
            "Make the same calls on all ranks; after this error call reset() on all ranks"
        )

    def _has_come(self, rank: int, name: str) -> bool:
        """Whether another rank has said that it waits in an agreement."""
        key = self._key(f"here/{rank}")
        return bool(self._store.check([key])) and self._store.get(key).decode() == name

    @staticmethod
    def _against(end: str) -> dict[int, dict[str, Any]]:
        """Facts by rank in a veto: of the rank that wrote it, and of the rank that it differs from.

        What these two have in the store may belong to a later agreement by now.
        """
        return dict(json.loads(end[len(_VETO) :])) if end.startswith(_VETO) else {}

    @staticmethod
    def _gave_up(end: str) -> str:
        """Who has given up an agreement that nobody has ended otherwise, in words."""
        if not end.startswith(_GONE):
            return ""
        return f"rank {end[len(_GONE) :]} has waited for it in vain, and its error says for which ranks"

    def _mismatch(
        self, subject: Subject, others: Mapping[int, Mapping[str, Any]], otherwise: str = ""
    ) -> PlanMismatchError:
        """The error of this rank, once it has been noted which epochs the others are in."""
        for theirs in others.values():
            self._heard_of(theirs.get("epoch", 0))
        return PlanMismatchError(self._difference(subject, others, otherwise))

    def _difference(self, subject: Subject, others: Mapping[int, Mapping[str, Any]], otherwise: str) -> str:
        ours = dict(subject.facts)
        lines = []
        for rank, theirs in sorted(others.items()):
            differing = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
            if rank != self._rank and differing:
                values = ", ".join(
                    f"{key}: {ours.get(key)} here, {theirs.get(key)} on rank {rank}" for key in differing
                )
                lines.append(f"{values} ({_cause(ours, theirs, rank)})")
        if lines:
            what = f"ranks are about to do different things: {'; '.join(lines)}"
        else:
            what = f"ranks have not agreed: {otherwise or 'their agreements before this one were not the same'}"
        return f"{self._label}, {_shown(ours)}: {what}. Nothing was sent; mend that, and call reset() on all ranks"

    def _compare_pairs(self, name: str, subject: Subject) -> None:
        keys = [self._key(f"pairs/{name}/{rank}") for rank in range(self._size)]
        if self._store.has_extended_api():
            posted = self._store.multi_get(keys)
        else:
            posted = [self._store.get(key) for key in keys]
        pairs = [json.loads(post.decode()) for post in posted]
        wrong = []
        for source in range(self._size):
            for target in range(self._size):
                sent, expected = pairs[source][target][0], pairs[target][source][1]
                if source != target and sent != expected:
                    wrong.append(f"rank {source} sends {sent} to rank {target}, which expects {expected}")
        if wrong:
            raise PlanMismatchError(
                f"{self._label}, {_shown(subject.facts)}: {'; '.join(wrong)}. Nothing was sent; mend that, and call "
                "reset() on all ranks"
            )


def _shown(facts: Mapping[str, Any]) -> str:
    if _CONNECTED in facts:
        return "the gloo group that frames travel on"
    shown = f"site '{facts.get('site')}', step {facts.get('step')}"
    if facts.get("tensor") == PASSES:
        shown += f", which passes through here: {PassReason.explained(facts['codec'])}"
    return shown


def _cause(ours: Mapping[str, Any], theirs: Mapping[str, Any], rank: int) -> str:
    """What most probably lies behind the first of several differences."""
    if ours.get("epoch") != theirs.get("epoch"):
        return "reset() was not called on all ranks"
    if ours.get(_CONNECTED) != theirs.get(_CONNECTED):
        return "a rank could not connect the gloo group that frames travel on"
    if ours.get("step") != theirs.get("step"):
        late = "this rank" if ours.get("step", 0) < theirs.get("step", 0) else f"rank {rank}"
        return f"{late} missed a step(), or the other made one more"
    if ours.get("site") != theirs.get("site"):
        return "another key(), or calls in another order"
    if ours.get("tensor") != theirs.get("tensor"):
        return "tensors of different sizes or dtypes"
    if ours.get("codec") != theirs.get("codec"):
        return "a policy, layout or requires_grad that differs between ranks"
    if ours.get("evictions") != theirs.get("evictions"):
        return "calls in another order under state_budget_bytes"
    return "calls that differ between ranks"
