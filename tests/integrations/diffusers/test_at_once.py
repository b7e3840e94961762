"""Ulysses attention: Q, K and V are under way at once, with the bytes and values of one exchange after the other."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

import compactdist_diffusers
from compactdist._torch import swap_mesh_dim
from compactdist.errors import FrameError
from compactdist.testing import act_like_nccl
from compactdist_diffusers.sites import Sites
from tests.integrations.diffusers.kit import parallel
from tests.launch import run_ranks
from tests.quick import quick_for

pytestmark = [pytest.mark.xdit, pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore")]

LAYERS, STEPS = 4, 6


def in_turn() -> None:
    """Let this rank's process wait for every exchange before the next, as diffusers does."""
    attention: Any = Sites.attention

    def waits(self: Any, call: Any, key: Any, config: Any, at_once: bool = False) -> Any:
        return attention(self, call, key, config, False)

    Sites.attention = waits  # type: ignore[method-assign]


def events_of(group: Any) -> list[str]:
    """Becomes a list of what this group does: ``"sent"`` and ``"decoded"``, with the role of the site."""
    events: list[str] = []
    engine = group._engine
    launch, finish = engine._launch, engine.finish

    def role(flight: Any) -> str:
        return str(flight.call.site.split("/")[-3])

    def launched(self: Any, flight: Any, job: Any) -> Any:
        events.append(f"{role(flight)} sent")
        return launch(flight, job)

    def finished(self: Any, flight: Any, may_write: bool) -> None:
        events.append(f"{role(flight)} decoded")
        finish(flight, may_write)

    engine._launch, engine.finish = MethodType(launched, engine), MethodType(finished, engine)
    return events


AT_ONCE = [*(f"{x} sent" for x in "qkv"), *(f"{x} decoded" for x in "qkv"), "out sent", "out decoded"]
IN_TURN = [f"{x} {what}" for x in ("q", "k", "v", "out") for what in ("sent", "decoded")]


def must_be_at_once(events: list[str], attentions_per_step: int) -> None:
    """Ranks agree on the first two steps' calls, and those may leave from another thread: nothing orders its events."""
    a_step = AT_ONCE * attentions_per_step
    agreed = 2 * len(a_step)
    assert sorted(events[:agreed]) == sorted(a_step * 2)
    assert events[agreed:] == a_step


@pytest.mark.parametrize("model", quick_for(["flux"], ["flux", "wan"]))
def test_three_are_sent_before_one_is_waited_for(model: str) -> None:
    def body(rank: int, size: int) -> None:
        pipe, call_kwargs = parallel(model, "ulysses", size, steps=3)
        with compactdist_diffusers.enable(pipe, codec="int8") as handle:
            events = events_of(handle.groups["ulysses"])
            pipe(**call_kwargs)
            attentions = LAYERS if model == "flux" else 3 * 2
            must_be_at_once(events, attentions)
        in_turn()
        with compactdist_diffusers.enable(pipe, codec="int8") as handle:
            events = events_of(handle.groups["ulysses"])
            pipe(**call_kwargs)
            assert events == IN_TURN * (attentions * 3)

    run_ranks(body, timeout=60)


@pytest.mark.parametrize(
    "codec",
    quick_for(["int2"], ["int2", "lowrank", "raw", "transform"]),
)
def test_values_and_bytes_are_those_of_one_after_the_other(codec: str) -> None:
    def body(rank: int, size: int) -> None:
        pipe, call_kwargs = parallel("flux", "ulysses", size, steps=STEPS)

        def drawn() -> tuple[Any, ...]:
            with compactdist_diffusers.enable(pipe, codec=codec) as handle:
                first, second = pipe(**call_kwargs)[0], pipe(**call_kwargs)[0]
                stats = handle.stats()["ulysses"]
                return first, second, stats.compressed_calls, stats.wire_bytes

        at_once = drawn()
        in_turn()
        waited = drawn()
        assert at_once[2:] == waited[2:]
        assert at_once[2] == 2 * 4 * LAYERS * STEPS
        for a, b in zip(at_once[:2], waited[:2], strict=True):
            assert torch.equal(a, b)

    run_ranks(body, timeout=100)


def test_a_group_with_nccls_manners() -> None:
    def body(rank: int, size: int) -> None:
        pipe, call_kwargs = parallel("flux", "ulysses", size, steps=3)
        mesh = pipe.transformer._parallel_config.context_parallel_config._ulysses_mesh
        with compactdist_diffusers.enable(pipe, codec="int4"):
            over_gloo = pipe(**call_kwargs)[0]
        swap_mesh_dim(mesh, 0, act_like_nccl(mesh.get_group()))
        with compactdist_diffusers.enable(pipe, codec="int4") as handle:
            events = events_of(handle.groups["ulysses"])
            assert torch.equal(pipe(**call_kwargs)[0], over_gloo)
            must_be_at_once(events, LAYERS)

    run_ranks(body, timeout=60)


def test_kernels_get_plain_tensors() -> None:
    def body(rank: int, size: int) -> None:
        from diffusers.models import attention_dispatch

        seen: set[type] = set()
        attend = attention_dispatch._native_attention_forward_op

        def spy(ctx: Any, *args: Any, **kwargs: Any) -> Any:
            seen.update(type(x) for x in args[:3])
            return attend(ctx, *args, **kwargs)

        attention_dispatch._native_attention_forward_op = spy
        pipe, call_kwargs = parallel("flux", "ulysses", size, steps=2)
        with compactdist_diffusers.enable(pipe, codec="int8"):
            pipe(**call_kwargs)
        assert seen == {torch.Tensor}

    run_ranks(body, timeout=60)


@pytest.mark.parametrize(("role", "number"), [("q", 1), ("v", 3)])
def test_a_damaged_frame_raises_and_a_new_request_is_right(role: str, number: int) -> None:
    def body(rank: int, size: int) -> None:
        pipe, call_kwargs = parallel("flux", "ulysses", size, steps=4)
        with compactdist_diffusers.enable(pipe, codec="int4") as handle:
            right = pipe(**call_kwargs)[0]
            handle.new_request()
            group = handle.groups["ulysses"]
            link, calls = group._engine.link, 0
            plain = link.all_to_all

            def damaged(self: Any, arrived: Any, *args: Any) -> Any:
                nonlocal calls
                calls += 1
                work = plain(arrived, *args)
                if calls == number + 2 * 4 * LAYERS:  # in the first attention of the third step
                    work.wait()
                    with torch.inference_mode():
                        arrived[200] ^= 1
                return work

            link.all_to_all = MethodType(damaged, link)
            with pytest.raises(FrameError, match=f"{role}/"):
                pipe(**call_kwargs)
            handle.new_request()
            assert torch.equal(pipe(**call_kwargs)[0], right)

    run_ranks(body, timeout=60)
