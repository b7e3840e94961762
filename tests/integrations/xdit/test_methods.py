"""The bookkeeping of the parallel methods, on gloo ranks without xfuser: which steps' chunks attention sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import compactdist
from compactdist_xdit import methods
from tests.launch import run_ranks

B, H, S, D = 2, 3, 4, 8


def chunk(rank: int, step: int, forward: int = 0, layer: int = 0, *, s: int = S) -> tuple[Tensor, Tensor]:
    """Keys and values of one rank at one call, as xfuser hands them over: transposed, not contiguous."""
    seed = ((rank * 100 + step) * 100 + forward) * 100 + layer
    both = torch.randn(2, B, s, H, D, generator=torch.Generator().manual_seed(seed)).transpose(2, 3)
    return both[0], both[1]


def seen(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> tuple[Tensor, None]:
    """In place of attention: what it was given, `(2, B, H, P * S, D)`."""
    return torch.stack([key, value]), None


def whole(chunks: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.stack([torch.cat([c[i] for c in chunks], dim=2) for i in (0, 1)])


def attend(method: methods.GatheringMethod, group: Any, kv: tuple[Tensor, Tensor]) -> Tensor:
    return method.attend(group, seen, kv[0], *kv)


def begin(method: methods.GatheringMethod) -> None:
    method.begin_step()
    method.before_forward()


def run_steps(
    method: methods.GatheringMethod, group: Any, rank: int, steps: int, layers: int = 2
) -> list[list[Tensor]]:
    """A request of one forward a step: what every layer saw at every step."""
    method.new_request()
    result = []
    for step in range(steps):
        begin(method)
        result.append([attend(method, group, chunk(rank, step, 0, layer)) for layer in range(layers)])
    return result


def expected(rank: int, world: int, step: int, layer: int, age: int, own_age: int = 0) -> Tensor:
    ages = [own_age if r == rank else age for r in range(world)]
    return whole([chunk(r, step - ages[r], 0, layer) for r in range(world)])


def test_patch_sees_this_steps_chunks_in_the_order_of_ranks() -> None:
    def body(rank: int, world: int) -> None:
        method = methods.PatchParallel()
        for step, layers in enumerate(run_steps(method, dist.group.WORLD, rank, 3)):
            for layer, got in enumerate(layers):
                assert torch.equal(got, expected(rank, world, step, layer, age=0))
        assert method.counts == {"synchronous": 6}

    run_ranks(body, 3)


@pytest.mark.parametrize(("warmup", "sync_from"), [(1, None), (2, None), (1, 4)])
def test_distrifusion_is_one_step_stale_between_warmup_and_the_last_steps(warmup: int, sync_from: int | None) -> None:
    def body(rank: int, world: int) -> None:
        method = methods.DistriFusion(warmup_steps=warmup, sync_from_step=sync_from)
        stale = 0
        for step, layers in enumerate(run_steps(method, dist.group.WORLD, rank, 6)):
            age = int(step >= warmup and (sync_from is None or step < sync_from))
            stale += age
            for layer, got in enumerate(layers):
                assert torch.equal(got, expected(rank, world, step, layer, age)), step
        assert method.counts["one step stale"] == 2 * stale
        assert method.counts["synchronous (warm-up)"] == 2 * warmup
        assert method.counts["synchronous (last steps)"] == 2 * (6 - warmup - stale)

    run_ranks(body, 2)


def test_own_chunk_is_as_stale_as_the_others_where_all_ranks_must_see_the_same() -> None:
    def body(rank: int, world: int) -> list[Tensor]:
        method = methods.DistriFusion(exact_own=False)
        last = run_steps(method, dist.group.WORLD, rank, 3)[-1]
        assert torch.equal(last[0], expected(rank, world, 2, 0, age=1, own_age=1))
        return last

    first, second = run_ranks(body, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_next_request_sees_nothing_of_the_last_one() -> None:
    """Step 0 of the second request is fresh, its step 1 is stale by the second's step 0, and nothing is in flight."""

    def body(rank: int, world: int) -> None:
        method = methods.DistriFusion()
        first = run_steps(method, dist.group.WORLD, rank, 4)
        assert method.counts["drained"] == 0
        assert method.state_bytes == 2 * 4 * (2 * B * H * S * D) * (world + 1)
        second = run_steps(method, dist.group.WORLD, rank, 4)
        assert method.counts["drained"] == 2
        for a, b in zip(first, second, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        method.remove()
        assert method.counts["drained"] == 4
        assert method.state_bytes == 0

    run_ranks(body, 2)


def test_the_last_step_gathers_nothing_and_steps_after_it_are_synchronous() -> None:
    steps, layers = 5, 2

    def body(rank: int, world: int) -> None:
        method = methods.create("distrifusion")
        method.timesteps = lambda: steps - 1
        results = run_steps(method, dist.group.WORLD, rank, steps, layers)
        for step, of_layers in enumerate(results):
            for layer, result in enumerate(of_layers):
                age = 0 if step in (0, steps - 1) else 1
                assert torch.equal(result, expected(rank, world, step, layer, age))
        assert method.counts == {
            "synchronous (warm-up)": layers,
            "one step stale": layers * (steps - 2),
            "not gathered (last step)": layers,
            "synchronous (past the last step)": layers,
        }
        # the last step alone waits for its own gathers: then they are used
        waiting = methods.create("distrifusion", sync_from_step=steps - 2)
        waiting.timesteps = lambda: steps - 1
        run_steps(waiting, dist.group.WORLD, rank, steps - 1, layers)
        assert waiting.counts["not gathered (last step)"] == 0
        assert waiting.counts["synchronous (last steps)"] == layers

    run_ranks(body, 2)


def test_what_attention_was_given_is_never_written_again() -> None:
    """One batch and one head, where a view of the gathered buffer would be nearly possible."""

    def body(rank: int, world: int) -> None:
        method = methods.DistriFusion()
        kept = []
        for step in range(5):
            begin(method)
            key, value = (x[:1, :1] for x in chunk(rank, step))
            method.attend(
                dist.group.WORLD, lambda q, k, v, **_: (kept.append((k, v, k.clone(), v.clone())),), key, key, value
            )
        method.forget()
        assert len(kept) == 5
        for key, value, key_then, value_then in kept:
            assert torch.equal(key, key_then)
            assert torch.equal(value, value_then)

    run_ranks(body, 2)


def test_caller_may_overwrite_keys_and_values_at_once() -> None:
    def body(rank: int, world: int) -> None:
        method = methods.DistriFusion()
        for step in range(4):
            begin(method)
            key, value = (x.clone() for x in chunk(rank, step))
            got = attend(method, dist.group.WORLD, (key, value))
            assert torch.equal(got, expected(rank, world, step, 0, age=min(step, 1)))
            key.fill_(torch.nan)
            value.fill_(torch.nan)
        method.forget()

    run_ranks(body, 2)


def test_changed_shape_is_synchronous_once_and_counted() -> None:
    def body(rank: int, world: int) -> None:
        method = methods.DistriFusion()
        for step, s in enumerate([4, 4, 6, 6]):
            begin(method)
            got = attend(method, dist.group.WORLD, chunk(rank, step, s=s))
            age = 1 if step in (1, 3) else 0
            want = [chunk(r, step - (age if r != rank else 0), s=s) for r in range(world)]
            assert torch.equal(got, whole(want)), step
        assert method.counts["synchronous (changed shape)"] == 1
        assert method.counts["drained"] == 1
        method.forget()

    run_ranks(body, 2)


def test_guidance_branches_and_transformers_do_not_mix() -> None:
    """Two forwards a step; the second transformer takes over at step 2, and has nothing to be stale with."""

    def body(rank: int, world: int) -> None:
        method, models = methods.DistriFusion(), [object(), object()]
        for step in range(4):
            method.begin_step()
            for forward in range(2):
                method.before_forward(models[step // 2])
                got = attend(method, dist.group.WORLD, chunk(rank, step, forward))
                age = step % 2
                want = [chunk(r, step - (age if r != rank else 0), forward) for r in range(world)]
                assert torch.equal(got, whole(want)), (step, forward)
        assert method.counts["synchronous (new place)"] == 2
        method.forget()

    run_ranks(body, 2)


def test_a_step_without_attention_makes_the_next_one_staler_and_is_counted() -> None:
    def body(rank: int, world: int) -> None:
        method = methods.DistriFusion()
        for step in range(4):
            begin(method)
            if step != 2:
                got = attend(method, dist.group.WORLD, chunk(rank, step))
        assert torch.equal(got, expected(rank, world, 3, 0, age=2))
        assert method.counts["more than one step stale"] == 1
        method.forget()

    run_ranks(body, 2)


@pytest.mark.parametrize("name", methods.METHODS)
def test_wrapped_group_compresses_the_gathers_even_across_steps(name: str) -> None:
    """Raw frames change nothing; int8 is close to what a plain group gives, and every gather but keyframes is int8."""

    def body(rank: int, world: int) -> None:
        plain = run_steps(methods.create(name), dist.group.WORLD, rank, 6)
        for codec in ("raw", "int8"):
            group = compactdist.wrap(codec=codec, keyframe="raw", min_numel=1, local="exact")
            method = methods.create(name)
            for _ in range(2):
                method.new_request()
                group.reset()
                for step in range(6):
                    group.step()
                    begin(method)
                    for layer in range(2):
                        got = attend(method, group, chunk(rank, step, 0, layer))
                        if codec == "raw":
                            assert torch.equal(got, plain[step][layer])
                        else:
                            error = float((got - plain[step][layer]).norm() / got.norm())
                            assert error < 0.02, error
                            assert (error > 0) == (step > method_delay), step
                            own = got[:, :, :, rank * S : (rank + 1) * S]
                            assert torch.equal(own, torch.stack(chunk(rank, step, 0, layer)))
            method.remove()
            stats = group.stats()
            assert stats.compressed_calls == 24
            assert stats.passed_through == 0
            if codec == "int8":
                assert sum(site.keyframes for site in stats.sites.values()) == 4
            group.close()

    method_delay = {"patch": 0, "distrifusion": 1}[name]  # the first step's keyframe is seen for so many steps more
    run_ranks(body, 2)


def test_joint_tensors_are_asked_for_once_and_the_callers_dictionary_is_left_alone() -> None:
    def body(rank: int, world: int) -> None:
        given = {"joint_strategy": "rear", "step": 0, "total_steps": world}
        asked: list[dict[str, Any]] = []

        def attention(*args: Any, joint_attn_kwargs: dict[str, Any], **kwargs: Any) -> tuple[Tensor, None]:
            asked.append(dict(joint_attn_kwargs))
            joint_attn_kwargs["step"] += 1  # as xfuser does
            return args[0], None

        method = methods.PatchParallel()
        begin(method)
        key, value = chunk(rank, 0)
        method.attend(dist.group.WORLD, attention, key, key, value, joint_attn_kwargs=given)
        assert asked == [{"joint_strategy": "rear", "step": 0, "total_steps": 1}]
        assert given["step"] == 0

    run_ranks(body, 2)
