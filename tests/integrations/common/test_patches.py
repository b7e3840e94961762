"""Changes in objects of others, and how they are undone."""

from __future__ import annotations

import copy
import inspect
import pickle
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from compactdist_common import Patches


class Base:
    def draw(self, steps: int, *, seed: int = 0) -> str:
        """Draw."""
        return f"{steps} {seed}"


class Derived(Base):
    pass


class Counter:
    def __init__(self) -> None:
        self.counted = 0

    def count(self, by: int = 1) -> None:
        self.counted += by


class Wrapper:
    """As xfuser wraps a scheduler: attributes set on it land on the object it wraps."""

    def __init__(self, inner: Any) -> None:
        vars(self)["module"] = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["module"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(vars(self)["module"], name, value)


def made_module() -> ModuleType:
    module = ModuleType("made")
    vars(module)["draw"] = Base().draw
    return module


def owner(kind: str) -> Any:
    makers = {"instance": Base, "namespace": lambda: SimpleNamespace(draw=Base().draw), "module": made_module}
    return makers[kind]()


@pytest.mark.parametrize("kind", ["instance", "namespace", "module"])
def test_an_attribute_is_replaced_and_given_back(kind: str) -> None:
    thing = owner(kind)
    own = dict(vars(thing))
    patches = Patches()
    assert not patches
    patches.replace(thing, "draw", None)
    assert patches
    assert thing.draw is None
    patches.undo()
    assert vars(thing) == own
    patches.replace(thing, "colour", "red")
    patches.undo()
    assert not hasattr(thing, "colour")


def test_a_class_gets_its_own_attribute_back_or_loses_it() -> None:
    before = Base.draw
    patches = Patches()
    patches.replace(Base, "draw", lambda self, steps: "base")
    patches.replace(Derived, "draw", lambda self, steps: "derived")
    assert (Base().draw(1), Derived().draw(1)) == ("base", "derived")
    patches.undo()
    assert Base.draw is before
    assert "draw" not in vars(Derived)


def test_a_wrapper_keeps_its_replacement_to_itself() -> None:
    inner = Base()
    wrapper = Wrapper(inner)
    patches = Patches()
    patches.wrap(wrapper, "draw", lambda original: lambda steps: original(steps).upper() + "!")
    assert wrapper.draw(3) == "3 0!"
    assert inner.draw(3) == "3 0"
    patches.undo()
    assert wrapper.draw(3) == "3 0"
    assert vars(wrapper).keys() == {"module"}


def test_changes_are_undone_from_the_last_to_the_first() -> None:
    thing, told = Base(), []
    patches = Patches()
    patches.replace(thing, "draw", 1)
    patches.add(lambda: told.append(thing.draw))
    patches.replace(thing, "draw", 2)
    patches.undo()
    patches.undo()
    assert told == [1]
    assert thing.draw(1) == "1 0"


def test_calls_are_heard_before_and_after_and_signatures_stay() -> None:
    thing, told = Base(), []
    patches = Patches()
    patches.before(thing, "draw", lambda: told.append("before"))
    patches.after(thing, "draw", lambda *args, **kwargs: told.append((args, kwargs)))
    assert thing.draw(4, seed=2) == "4 2"
    assert told == ["before", ((4,), {"seed": 2})]
    assert list(inspect.signature(thing.draw).parameters) == ["steps", "seed"]
    patches.undo()
    thing.draw(4)
    assert len(told) == 2


def test_an_undo_that_fails_keeps_no_other_from_being_undone(caplog: pytest.LogCaptureFixture) -> None:
    thing, patches = Base(), Patches()
    patches.add(lambda: {}["second"])
    patches.replace(thing, "draw", 1)
    patches.add(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        patches.undo()
    assert thing.draw(1) == "1 0"
    assert "second" in caplog.text
    patches.undo()
    assert thing.draw(1) == "1 0"


def test_a_missing_function_is_an_error() -> None:
    patches = Patches()
    with pytest.raises(AttributeError, match="paint"):
        patches.before(Base(), "paint", print)
    assert not patches


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"])
def test_a_copy_has_the_method_itself(copied: Any) -> None:
    """diffusers' pipelines copy schedulers: a copy whose method acts on the original would draw another picture."""
    counter, seen = Counter(), []
    patches = Patches()
    patches.before(counter, "count", lambda: seen.append(1))
    other = copied(counter)
    counter.count()
    assert (counter.counted, other.counted, len(seen)) == (1, 0, 1)
    other.count()
    assert (counter.counted, other.counted, len(seen)) == (1, 1, 1)
    patches.undo()
    other.count(2)
    assert (counter.counted, other.counted) == (1, 3)
    assert "count" not in vars(counter)


def test_a_changed_method_looks_as_it_did() -> None:
    counter, patches = Counter(), Patches()
    patches.after(counter, "count", lambda *_: None)
    assert inspect.signature(counter.count) == inspect.signature(Counter().count)
    assert counter.count.__name__ == "count"
    assert copy.deepcopy({"counting": counter.count})["counting"](1) is None  # by itself, it is the original's
    assert counter.counted == 1
