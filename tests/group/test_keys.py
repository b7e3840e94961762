"""Keys: prefixes, ordinals, the step clock."""

from __future__ import annotations

import threading

import pytest

from compactdist.errors import ConfigError
from compactdist.group.keys import Clock, KeyBook


def book() -> KeyBook:
    keys = KeyBook()
    keys.tick()
    return keys


def test_ordinals_count_per_site_and_step():
    keys = book()
    taken = [keys.take(site, "op").site for site in ("a", "a", "b", "a")]
    assert taken == ["a#0", "a#1", "b#0", "a#2"]
    keys.tick()
    assert keys.take("a", "op").site == "a#0"


def test_a_step_inside_the_block_of_another_is_an_error():
    keys = KeyBook()
    with keys.tick():
        for index in (None, 5):
            with pytest.raises(ConfigError, match="inside the with block of step 0: leave that block first"):
                keys.tick(index)
        assert keys.take("a", "op").step == 0  # nothing changed
        other = Clock()
        with keys.within_request("r", other), keys.tick():
            assert keys.step == 0
    with pytest.raises(ZeroDivisionError), keys.tick():
        1 / 0  # noqa: B018
    with keys.tick():
        keys.restart()
        keys.tick()
    assert keys.step == 0


def test_prefixes_nest_in_a_fixed_order():
    keys = book()
    with keys.prefixed("k1"), keys.prefixed("b", branch=True), keys.prefixed("k2"):
        keys.push_module("outer")
        keys.push_module("outer.inner")
        assert keys.take("op", "op").site == "b/k1/k2/outer.inner/op#0"
        keys.pop_module("outer.inner")
        assert keys.take("op", "op").site == "b/k1/k2/outer/op#0"
        keys.pop_module("outer")
    assert keys.take("op", "op").site == "op#0"
    assert keys.current_branch == ""
    keys.pop_module("outer")  # too many are harmless


def test_each_prefix_counts_for_itself():
    keys = book()
    keys.take("op", "op")
    with keys.prefixed("a"):
        assert keys.take("op", "op").site == "a/op#0"
    with keys.prefixed("a"):
        assert keys.take("op", "op").site == "a/op#1"
    assert keys.take("op", "op").site == "op#1"


def test_a_prefix_ends_with_its_block_even_if_it_raises():
    keys = book()
    with pytest.raises(ZeroDivisionError), keys.prefixed("a"), keys.prefixed("b", branch=True):
        1 / 0  # noqa: B018
    assert keys.prefix == ""


@pytest.mark.parametrize("name", ["", "a#1", None, 3])
def test_names_that_cannot_be_keys(name):
    keys = book()
    with pytest.raises(ConfigError), keys.prefixed(name):
        pass
    assert keys.prefix == ""


def test_give_back_undoes_the_last_take_only():
    keys = book()
    first, second = keys.take("a", "op"), keys.take("a", "op")
    keys.give_back(first)
    assert keys.take("a", "op").site == "a#2", "a later call has its ordinal already"
    keys.give_back(second)
    keys.give_back(keys.take("a", "op"))
    assert keys.take("a", "op").site == "a#3"


def test_step_and_epoch_of_a_call():
    keys = book()
    assert (keys.take("a", "op").step, keys.take("a", "op").epoch) == (0, 0)
    keys.tick()
    assert keys.take("a", "op").step == 1
    keys.new_epoch()
    assert (keys.take("a", "op").step, keys.take("a", "op").epoch) == (1, 1)
    keys.restart()
    assert (keys.step, keys.epoch) == (-1, 2)
    keys.tick()
    again = keys.take("a", "op")
    assert (again.site, again.step, again.epoch) == ("a#0", 0, 2)


@pytest.mark.parametrize("engage", ["step", "key", "branch"])
def test_what_engages(engage):
    keys = KeyBook()
    assert not keys.engaged
    if engage == "step":
        keys.tick()
    else:
        with keys.prefixed("a", branch=engage == "branch"):
            pass
    assert keys.engaged


def test_threads_have_their_own_prefixes_and_share_the_counters():
    keys = book()
    seen = []
    with keys.prefixed("main"):
        keys.push_module("m")
        thread = threading.Thread(target=lambda: seen.append(keys.take("a", "op").site))
        thread.start()
        thread.join(10)
        keys.pop_module("m")
    assert seen == ["a#0"]
    assert keys.take("a", "op").site == "a#1"


def test_many_threads_never_share_an_ordinal():
    keys = book()
    seen: list[str] = []

    def work():
        seen.extend([keys.take("a", "op").site for _ in range(500)])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(20)
    assert len(seen) == len(set(seen)) == 2000


def steps(keys, *calls, site="a"):
    """Steps that make so many calls each."""
    for n in calls:
        keys.tick()
        for _ in range(n):
            keys.take(site, "op")


def test_a_step_may_stay_shorter_but_no_later_one_is_longer():
    keys = KeyBook(label="group g, rank 1")
    steps(keys, 2, 3, 1, 1, 1)
    with pytest.raises(ConfigError, match=r"group g, rank 1: step 4 makes call 2 of 'a'"):
        keys.take("a", "op")
    assert keys.take("b", "op").site == "b#0", "other calls go on"
    keys.restart()
    steps(keys, 3, 3)


@pytest.mark.parametrize("what", ["left out altogether", "key", "module", "before the first step", "given back"])
def test_where_calls_can_be_told_apart(what):
    keys = KeyBook()
    if what == "left out altogether":
        steps(keys, 3, 0, 0, 3)
    elif what == "key":
        with keys.prefixed("k"):
            steps(keys, 3, 1, 3)
    elif what == "module":
        keys.push_module("m")
        steps(keys, 3, 1, 3)
    elif what == "before the first step":
        keys.engaged = True
        for _ in range(4):
            keys.take("a", "op")
        steps(keys, 2, 3)
    else:
        steps(keys, 2)
        keys.give_back(keys.take("a", "op"))
        steps(keys, 2, 3)


def test_branches_and_requests_count_for_themselves():
    keys = KeyBook()
    with keys.prefixed("cond", branch=True):
        steps(keys, 2, 1)
        keys.tick()
    steps(keys, 2)
    with keys.within_request("r", Clock()), keys.prefixed("cond", branch=True):
        steps(keys, 2, 2)
    with keys.prefixed("cond", branch=True):
        keys.take("a", "op")
        with pytest.raises(ConfigError, match="call 2 of 'cond/a'"):
            keys.take("a", "op")
