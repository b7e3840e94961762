"""The book of common histories: who makes room for whom."""

from __future__ import annotations

import random

from compactdist.state import Ledger
from compactdist.state.ledger import Verdict


class Call:
    """Two calls of a site in one step are not equal."""

    def __init__(self, site: str, step: int) -> None:
        self.site, self.step = site, step


KEEP = Verdict()
NO_ROOM = Verdict(held=False)


def use(book, key, nbytes, step):
    verdict = book.use(Call(key, step), nbytes)
    held = book.held()
    assert verdict.held == (key in held)
    assert sum(held.values()) <= book._budget
    return verdict


def test_the_least_recently_used_make_room():
    book = Ledger(30)
    for key, step in (("a", 0), ("b", 1), ("c", 2), ("a", 3)):
        assert use(book, key, 10, step) == KEEP
    assert use(book, "d", 20, 4).evicted == ("b", "c")
    assert use(book, "d", 20, 5) == KEEP
    assert (book.evictions("b"), book.evictions("a")) == (1, 0)


def test_sites_of_the_same_step_stay():
    book = Ledger(20)
    for step in range(5):
        assert [use(book, key, 10, step) for key in "abc"] == [KEEP, KEEP, NO_ROOM]
    assert [book.evictions(key) for key in "abc"] == [0] * 3


def test_what_cannot_fit_evicts_nothing():
    book = Ledger(20)
    use(book, "a", 10, 0)
    assert use(book, "large", 21, 1) == NO_ROOM
    assert use(book, "a", 10, 2) == KEEP, "it is still there"
    assert use(book, "b", 10, 3) == KEEP, "and the large one takes no room"
    assert (book.evictions("a"), book.evictions("large")) == (0, 0)


def test_an_evicted_site_returns_once_the_other_stands_idle():
    book = Ledger(10)
    use(book, "a", 10, 0)
    assert use(book, "b", 10, 1).evicted == ("a",)
    assert use(book, "a", 10, 2) == NO_ROOM, "b was used since"
    assert use(book, "a", 10, 3) == Verdict(("b",), anew=True)


def test_sites_used_in_turn_stop_evicting_one_another():
    for run in (1, 2, 3, 8):
        book = Ledger(10)
        names = [key for _ in range(400 // run) for key in ["a"] * run + ["b"] * run]
        evicted = [bool(use(book, key, 10, step).evicted) for step, key in enumerate(names)]
        assert sum(evicted) < 2 * run + 2
        assert not any(evicted[len(evicted) // 2 :]), "one stays, the other passes through"


def test_a_grown_site_makes_room_or_loses_its_own():
    book = Ledger(30)
    use(book, "idle", 10, 0)
    use(book, "a", 10, 1)
    assert use(book, "a", 30, 2).evicted == ("idle",)
    use(book, "a", 10, 3)
    use(book, "b", 20, 3)
    assert use(book, "a", 20, 4) == Verdict(held=False, anew=True), "b was used since, and a has no room now"
    assert use(book, "c", 10, 4) == KEEP, "so there is room for another"
    assert [book.evictions(key) for key in "abc"] == [0] * 3


def test_forget_makes_room_and_forgets_the_order():
    book = Ledger(20)
    use(book, "request/a", 10, 0)
    use(book, "b", 10, 0)
    assert use(book, "c", 10, 0) == NO_ROOM
    book.forget("request")
    assert use(book, "c", 10, 1) == Verdict(anew=True)
    book.forget()
    assert use(book, "b", 20, 0) == KEEP


def test_a_call_that_was_taken_back_counts_once():
    """One book notes calls that fail on its rank alone and are made again; every verdict is that of the other book."""
    draw = random.Random(0)
    plain, erring = Ledger(100), Ledger(100)
    evicted = 0
    for number in range(3000):
        key, nbytes, step = draw.choice("abcdefghijkl"), draw.choice([20, 30, 30, 40, 101]), number // 5
        verdict = use(plain, key, nbytes, step)
        seen = set()
        for _ in range(draw.choice([0, 0, 0, 1, 2, 20])):
            failed = Call(key, step)
            seen.update(erring.use(failed, nbytes).evicted)
            erring.take_back(failed)
        again = use(erring, key, nbytes, step)
        assert (seen | set(again.evicted), again.held) == (set(verdict.evicted), verdict.held)
        assert plain.held() == erring.held()
        evicted += len(verdict.evicted)
    assert evicted > 50


def test_only_the_last_call_of_a_site_is_taken_back():
    book = Ledger(10)
    earlier = Call("a", 0)
    book.use(earlier, 10)
    use(book, "a", 10, 0)
    book.take_back(earlier)
    book.take_back(Call("never noted", 0))
    book.forget()
    assert use(book, "a", 10, 1) == KEEP
