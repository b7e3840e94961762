"""What the parallel methods refuse and report, how they are installed, and what the page about them says."""

from __future__ import annotations

import functools
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from compactdist_xdit import adapter, methods, routes
from compactdist_xdit.session import Session

SHAPE = (2, 3, 4, 8)


def attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> tuple[Tensor, None]:
    raise AssertionError("refused before attention")


def begin(method: methods.GatheringMethod) -> None:
    method.begin_step()
    method.before_forward()


class Failing:
    def wait(self) -> None:
        raise RuntimeError("peer is gone")


def test_failure_of_a_gather_nobody_needs_is_reported_not_raised(caplog: pytest.LogCaptureFixture) -> None:
    method = methods.DistriFusion()
    method._sites[methods.base.Place(0, 0, 5)] = methods.distrifusion._Site(
        torch.empty(1), 0, Failing(), torch.empty(1)
    )
    with caplog.at_level(logging.WARNING, "compactdist"):
        method.new_request()
    assert "attention 5 of forward 0 (transformer 0)" in caplog.text
    assert "peer is gone" in caplog.text
    assert method.counts == {"drained": 1, "failed while drained": 1}
    assert "1 failed while drained" in method.describe()


@pytest.mark.parametrize("method", [None, "patch"])
def test_steps_of_distrifusion_are_refused_without_it(method: str | None) -> None:
    pipe = SimpleNamespace()
    with pytest.raises(ValueError, match=rf"method_warmup_steps=2, .*distrifusion.*, got {method!r}"):
        adapter.enable(pipe, "int2", parallel_method=method, method_warmup_steps=2, method_sync_from_step=3)


class Alone:
    """A ring of one rank that must not be asked to send anything."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"is_causal": True}, r"patch, step 0, attention 0 of forward 0 .*rank 0 of the ring: causal"),
        ({"attention_kwargs": {"attn_mask": torch.ones(1), "indices_k": None}}, r"attention_kwargs \(attn_mask\)"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    method = methods.PatchParallel()
    begin(method)
    key, value = torch.ones(SHAPE), torch.ones(SHAPE)
    with pytest.raises(ValueError, match=message):
        method.attend(Alone(), attention, key, key, value, **options)


def test_refuses_values_of_another_shape_gradients_and_calls_outside_steps() -> None:
    method = methods.PatchParallel()
    key, value = torch.ones(SHAPE), torch.ones(SHAPE)
    with pytest.raises(RuntimeError, match="before a step began"):
        method.attend(Alone(), attention, key, key, value)
    begin(method)
    with pytest.raises(ValueError, match=r"differ in shape .*use the ring"):
        method.attend(Alone(), attention, key, key, value[..., :4])
    with pytest.raises(RuntimeError, match="no gradient"):
        method.attend(Alone(), attention, key, key.clone().requires_grad_(), value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (functools.partial(methods.create, "ring"), "one of patch, distrifusion, not 'ring'"),
        (functools.partial(methods.create, "distrifusion", warmup_steps=0), "at least 1, got 0"),
        (functools.partial(methods.create, "distrifusion", sync_from_step=-1), "must not be negative"),
    ],
)
def test_options_out_of_range(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def fake_xfuser(monkeypatch: pytest.MonkeyPatch, ring: Any, stages: int) -> SimpleNamespace:
    """The three names of xfuser that `install` touches."""
    usp = SimpleNamespace(ring_attn=lambda *args: "ring", PROCESS_GROUP=SimpleNamespace(RING_PG=ring))
    made = {
        "core.distributed": {"get_pipeline_parallel_world_size": lambda: stages},
        "model_executor.layers": {"usp": usp},
    }
    for name in ("xfuser", "xfuser.core", "xfuser.model_executor", *(f"xfuser.{n}" for n in made)):
        module = ModuleType(name)
        vars(module).update(made.get(name.removeprefix("xfuser."), {}))
        monkeypatch.setitem(sys.modules, name, module)
    return usp


class Two(Alone):
    def size(self) -> int:
        return 2


def test_install_and_remove(monkeypatch: pytest.MonkeyPatch) -> None:
    usp = fake_xfuser(monkeypatch, Two(), 1)
    before = usp.ring_attn
    method = methods.PatchParallel()
    method.install()
    with pytest.raises(RuntimeError, match="before a step began"):
        usp.ring_attn(attention, *torch.ones(3, *SHAPE))
    # as Sites does it
    usp.ring_attn = functools.wraps(usp.ring_attn)(lambda *args: None)
    with pytest.raises(ValueError, match="installed already"):
        methods.DistriFusion().install()
    method.remove()
    method.remove()
    assert usp.ring_attn is before


@pytest.mark.parametrize(
    ("ring", "stages", "message"),
    [
        (None, 1, "set ring_degree to 2 or more"),
        (Alone(), 1, "set ring_degree to 2 or more"),
        (Two(), 2, "pipefusion_parallel_degree is 2"),
    ],
)
def test_install_refuses(monkeypatch: pytest.MonkeyPatch, ring: Any, stages: int, message: str) -> None:
    usp = fake_xfuser(monkeypatch, ring, stages)
    before = usp.ring_attn
    with pytest.raises(ValueError, match=message):
        methods.DistriFusion().install()
    assert usp.ring_attn is before


def test_the_session_tells_the_method_of_steps_forwards_and_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request ends for the method before the groups forget: its gathers are under way in them."""
    told: list[str] = []
    group = SimpleNamespace(step=lambda: told.append("group.step"), reset=lambda: told.append("group.reset"))
    method: Any = SimpleNamespace(
        new_request=lambda: told.append("new_request"),
        begin_step=lambda: told.append("begin_step"),
        before_forward=lambda module: told.append(type(module).__name__),
    )
    session = Session(SimpleNamespace(), "int4", ("ring",), method, True, {})
    monkeypatch.setattr(session, "activate", lambda: None)
    monkeypatch.setattr(session, "bind", lambda: None)
    monkeypatch.setattr(session, "follow", lambda: None)
    monkeypatch.setattr(session, "_missed_a_beginning", lambda: False)
    monkeypatch.setattr("compactdist_xdit.session._has_stages", lambda: False)
    session.groups, session._slots = {"ring": group}, [(routes.Slot("ring", None, ""), None, group)]
    session._begin_request()
    for t in (9.0, 9.0, 8.0):
        session._before_forward(torch.nn.Identity(), (), {"timestep": torch.tensor(t)})
    assert told[:2] == ["new_request", "group.reset"]
    assert told[2:] == ["group.step", "begin_step", "Identity", "Identity", "group.step", "begin_step", "Identity"]


@pytest.mark.parametrize("name", [None, "distrifusion"])
def test_a_prediction_in_place_of_what_is_no_all_gather_or_late_already(
    name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = None if name is None else methods.create(name)
    said = f"use parallel_method='patch', got {name!r}"
    with pytest.raises(ValueError, match=said):
        adapter._refuse("int4", method, {"mode": "predict-now"})
    adapter._refuse("int4", methods.create("patch"), {"mode": "predict-now"})
    adapter._refuse("int4", method, {})
    monkeypatch.setenv("COMPACTDIST_MODE", "predict-now")
    with pytest.raises(ValueError, match=said):
        adapter._refuse("int4", method, {})


def test_figures_of_the_quality_page() -> None:
    from benchmarks.quality.methods_quality import PAIRS, VARIANTS, paired, table

    root = Path(__file__).parents[3]
    rows = json.loads((root / "benchmarks" / "results" / "methods_quality.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == list(VARIANTS)
    page = (root / "docs" / "quality.md").read_text()
    assert table(rows) in page
    assert paired(rows) in page
    assert len(paired(rows).splitlines()) == len(PAIRS) + 2


def test_figures_of_predictions_on_the_quality_page() -> None:
    from benchmarks.quality.predict_now import VARIANTS, show

    root = Path(__file__).parents[3]
    rows = json.loads((root / "benchmarks" / "results" / "predict_now.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == list(VARIANTS)
    tables = show(rows).split("\n\n")
    page = (root / "docs" / "quality.md").read_text()
    assert all(table in page for table in tables)
