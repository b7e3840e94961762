"""Ranks agree on something through the store, one thing after the other, before a byte of it travels.

An agreement has a number ``epoch.n``; ``n`` counts from 0 in each epoch. A rank posts what it is about to do, compares
a digest of that with the one that the first rank wrote (``compare_set``), and counts itself in (``add``). The last rank
to come writes ``done``; a rank that finds another digest writes ``veto`` there. Everyone looks for that one key.
Successful agreements leave a constant number of keys: the first rank to come has to wait anyway, and removes what the
agreements before have left.

Posts are there for error messages, and lie in two slots that are overwritten in turn. What is compared pair by pair has
keys of its own, which are removed once all ranks have come to a later agreement.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from compactdist.errors import PlanMismatchError, PlanTimeoutError

__all__ = ["Agreement", "Subject"]

_log = logging.getLogger("compactdist")
_FIRST_PAUSE, _LONGEST_PAUSE, _SHARE = 0.0001, 0.05, 0.125
"""Seconds between two looks at the store, and which share of the wait so far a pause may be: that is how late a rank
may go on.
"""

_WARN_SECONDS = 20.0
_DONE, _VETO, _GONE = "done", "veto", "gone"
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


class Agreement:
    """One rank's part in the agreements of a group.

    Args:
        store: the group's store; the agreement works on a connection of its own.
        prefix: of all keys; no other group of this store, before or after, has it.
        rank, size: in the group.
        label: names group and rank in error messages.
        timeout: seconds to wait for the other ranks.
    """

    def __init__(self, store: Any, prefix: str, rank: int, size: int, label: str, timeout: float) -> None:
        # calls of other threads on the caller's connection must not wait for ours
        self._store = store.clone()
        self._prefix = prefix
        self._rank = rank
        self._size = size
        self._label = label
        self._timeout = timeout
        self._epoch = 0
        self._number = 0
        self._last = ""
        self._ended = self._ended_before = ""
        self._pairs = ""
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
        try:
            with self._lock:
                self._agree(subject, keep_waiting)
        except (PlanMismatchError, PlanTimeoutError) as error:
            self._broken = subject.epoch, str(error)
            raise

    def _agree(self, subject: Subject, keep_waiting: Any) -> None:
        if subject.epoch != self._epoch:
            self._epoch, self._number = subject.epoch, 0
        name, slot = f"{self._epoch}.{self._number}", self._number % 2
        self._number += 1
        store = self._store
        self._post(slot, name, subject)
        pairs = self._post_pairs(name, subject)
        digest = hashlib.blake2b(repr(sorted(subject.facts.items())).encode(), digest_size=12).hexdigest()
        mine = f"{name}:{digest}"
        found = self._found(mine)
        self._last = found
        done = self._key(f"done/{name}")
        if found != mine:
            if store.check([done]):  # it has failed before: what the others agree on by now is no matter of this rank
                raise PlanMismatchError(self._difference(subject, self._against(store.get(done).decode())))
            other = found.partition(":")[0]
            veto = _VETO + json.dumps([self._rank, dict(subject.facts)])
            # read before the others wake up and post what they do next
            against = {rank: post[1] for rank, post in self._posts().items()}
            for key in {done, self._key(f"done/{other}")}:
                store.compare_set(key, "", veto)
            raise PlanMismatchError(self._difference(subject, against))
        came = store.add(self._key(f"count/{name}"), 1)
        if came == self._size:
            end = store.compare_set(done, "", _DONE).decode()
        else:
            if came == 1 and self._ended:
                # all ranks have been counted in the last agreement, so they have seen the end of the one before
                store.delete_key(self._key(f"count/{self._ended}"))
                if self._ended_before:
                    store.delete_key(self._key(f"done/{self._ended_before}"))
            end = self._wait(done, name, subject, keep_waiting)
        if end != _DONE:
            raise PlanMismatchError(self._difference(subject, self._against(end)))
        self._ended_before, self._ended = self._ended, name
        if self._pairs:  # all ranks have come to this agreement, so they have read what was posted for the one before
            store.delete_key(self._pairs)
        self._pairs = pairs
        if pairs:
            self._compare_pairs(name, subject)

    def close(self) -> None:
        """Take part no more. The last rank to close removes the keys of all: others may still read them before."""
        with contextlib.suppress(RuntimeError):  # the store may be gone already
            if self._store.add(self._key("closed"), 1) == self._size:
                posts = [f"{what}/{rank}" for rank in range(self._size) for what in ("post/0", "post/1")]
                posts += [f"pairs/{self._ended}/{rank}" for rank in range(self._size)]
                ends = [f"done/{self._ended_before}", f"done/{self._ended}", f"count/{self._ended}"]
                for key in ("now", "closed", *ends, *posts):
                    self._store.delete_key(self._key(key))

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def _post(self, slot: int, name: str, subject: Subject) -> None:
        self._store.set(self._key(f"post/{slot}/{self._rank}"), json.dumps([name, dict(subject.facts)]))

    def _post_pairs(self, name: str, subject: Subject) -> str:
        """Post what is compared pair by pair; the key, or nothing if there is nothing to compare."""
        if not subject.pairs:
            return ""
        key = self._key(f"pairs/{name}/{self._rank}")
        self._store.set(key, json.dumps([list(pair) for pair in subject.pairs]))
        return key

    def _posts(self) -> dict[int, list[Any]]:
        """The newest post of each rank that has made one: name and facts."""
        posts: dict[int, list[Any]] = {}
        for rank in range(self._size):
            for slot in range(2):
                key = self._key(f"post/{slot}/{rank}")
                if self._store.check([key]):
                    post = json.loads(self._store.get(key).decode())
                    if rank not in posts or _order(post) > _order(posts[rank]):
                        posts[rank] = post
        return posts

    def _found(self, mine: str) -> str:
        """What the first rank of this agreement wrote: ``mine``, or another rank's."""
        store, now, expected = self._store, self._key("now"), self._last
        while True:
            found: str = store.compare_set(now, expected, mine).decode()
            name = found.partition(":")[0]
            if found == mine or name == mine.partition(":")[0]:
                return found
            if found == expected:  # the answer where there is no such key
                expected = ""
            elif store.check([self._key(f"done/{name}")]):
                expected = found  # left by an agreement that has ended
            else:
                return found

    def _wait(self, done: str, name: str, subject: Subject, keep_waiting: Any) -> str:
        """Wait for the end of an agreement; how it ended."""
        began, pause, warned = time.monotonic(), _FIRST_PAUSE, False
        # asked for again and again: a blocking wait of the store prints a warning whenever its time is up
        end: str
        while (end := self._store.compare_set(done, _OPEN, _OPEN).decode()) == _OPEN:
            time.sleep(pause)
            waited = time.monotonic() - began
            pause = min(max(_SHARE * waited, _FIRST_PAUSE), _LONGEST_PAUSE)
            if waited > _WARN_SECONDS and not warned:
                warned = True
                _log.warning("%s", self._missing(name, subject, waited))
            ended = keep_waiting is not None and not keep_waiting()
            if waited > self._timeout or ended:
                end = self._store.compare_set(done, "", _GONE).decode()
                if end != _GONE:
                    return end  # the others came at the last moment
                raise PlanTimeoutError(self._missing(name, subject, waited))
        return end

    def _missing(self, name: str, subject: Subject, waited: float) -> str:
        posts = self._posts()
        lines = []
        for rank in range(self._size):
            last = posts.get(rank)
            if last is not None and last[0] == name:
                continue
            seen = "nothing yet" if last is None else f"{_shown(last[1])} (agreement {last[0]})"
            lines.append(f"rank {rank}: last agreed on {seen}")
        return (
            f"{self._label}: waiting for {waited:.0f} s to agree on {_shown(subject.facts)} (agreement {name}); "
            "missing: "
            + ("; ".join(lines) or "nobody any more, but not all came in time")
            + ". A rank that is missing has not come to a call that is new to all: it makes other calls, has missed or "
            "added a step() or reset(), or lets this call pass through. Make the same calls on all ranks; after this "
            "error call reset() on all ranks"
        )

    @staticmethod
    def _against(end: str) -> dict[int, dict[str, Any]]:
        """Rank and facts of the one that ended an agreement; by now its own post may be another."""
        return dict([json.loads(end[len(_VETO) :])]) if end.startswith(_VETO) else {}

    def _difference(self, subject: Subject, others: Mapping[int, Mapping[str, Any]]) -> str:
        ours = dict(subject.facts)
        lines = []
        for rank, theirs in sorted(others.items()):
            differing = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
            if rank != self._rank and differing:
                values = ", ".join(
                    f"{key}: {ours.get(key)} here, {theirs.get(key)} on rank {rank}" for key in differing
                )
                lines.append(f"{values} ({_cause(ours, theirs, rank)})")
        return (
            f"{self._label}, {_shown(ours)}: ranks are about to do different things: "
            f"{'; '.join(lines) or 'another rank differs, or has given up'}. Nothing was sent; mend that, and call "
            "reset() on all ranks"
        )

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


def _order(post: list[Any]) -> tuple[int, ...]:
    return tuple(map(int, post[0].split(".")))


def _shown(facts: Mapping[str, Any]) -> str:
    return f"site '{facts.get('site')}', step {facts.get('step')}"


def _cause(ours: Mapping[str, Any], theirs: Mapping[str, Any], rank: int) -> str:
    """What most probably lies behind the first of several differences."""
    if ours.get("epoch") != theirs.get("epoch"):
        return "reset() was not called on all ranks"
    if ours.get("step") != theirs.get("step"):
        late = "this rank" if ours.get("step", 0) < theirs.get("step", 0) else f"rank {rank}"
        return f"{late} missed a step(), or the other made one more"
    if ours.get("site") != theirs.get("site"):
        return "another key(), or calls in another order"
    if ours.get("tensor") != theirs.get("tensor"):
        return "tensors of different sizes or dtypes"
    if ours.get("codec") != theirs.get("codec"):
        return "a policy, layout or requires_grad that differs between ranks"
    return "calls that differ between ranks"
