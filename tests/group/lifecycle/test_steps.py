"""Steps, warm-up, reset, and what happens without any step."""

from __future__ import annotations

import pytest
import torch

from tests.group.lifecycle import kit
from tests.launch import run_ranks
from tests.lockstep import compare

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


def test_without_a_step_calls_pass_through_with_one_warning():
    def body(rank, world_size):
        warnings = kit.warnings_from_now_on()
        with kit.wrap() as dist:
            for t in range(3):
                x = kit.tensor(rank, t)
                assert torch.equal(kit.gather(dist, x), kit.gather_exact(x))
            assert dist.stats().passed_reasons == {"no-step": 3}
            assert dist.stats().state_bytes == 0
            assert kit.keys_of(dist) == []
            assert dist.current_step == -1
        assert len(warnings) == 1
        assert "step()" in warnings[0]
        assert "attach" in warnings[0]

    run_ranks(body)


@pytest.mark.parametrize("as_context", [True, False])
def test_step_as_context_manager_and_alone(as_context):
    def body(rank, world_size):
        with kit.wrap() as dist:
            for t in range(4):
                if as_context:
                    with dist.step():
                        assert dist.current_step == t
                        kit.gather(dist, kit.tensor(rank, t))
                else:
                    dist.step()
                    kit.gather(dist, kit.tensor(rank, t))
            assert kit.keyframes(dist) == {"all_gather#0": (4, 1)}
            return kit.finish(dist)

    compare.check(run_ranks(body))


@pytest.mark.parametrize("keyframe", ["raw", "int8"])
@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_warmup_steps_are_keyframes(warmup, keyframe):
    def body(rank, world_size):
        with kit.wrap(warmup_steps=warmup, keyframe=keyframe) as dist:
            for request in range(2):
                for t in range(5):
                    dist.step()
                    x = kit.tensor(rank, t)
                    exact = torch.equal(kit.gather(dist, x), kit.gather_exact(x))
                    assert exact == (keyframe == "raw" and t < max(1, warmup)), (request, t)
                dist.reset()
            assert kit.keyframes(dist) == {"all_gather#0": (10, 2 * max(1, warmup))}

    run_ranks(body)


def test_reset_begins_an_epoch_with_keyframes():
    def body(rank, world_size):
        with kit.wrap() as dist:
            for epoch in range(3):
                assert dist._keys.epoch == epoch
                for t in range(2):
                    dist.step()
                    kit.gather(dist, kit.tensor(rank, t))
                assert dist.stats().state_bytes == 4 * kit.N * world_size
                dist.reset()
                assert dist.current_step == -1
                assert dist.stats().state_bytes == 0
            assert kit.keyframes(dist) == {"all_gather#0": (6, 3)}

    run_ranks(body)


def test_a_change_of_size_or_dtype_is_a_keyframe():
    def body(rank, world_size):
        with kit.wrap() as dist:
            plan = [
                (2048, torch.float32),
                (2048, torch.float32),
                (4096, torch.float32),
                (4096, torch.bfloat16),
            ]
            plan += [(4096, torch.bfloat16), (2048, torch.float32)]
            seen = []
            for t, (n, dtype) in enumerate(plan):
                dist.step()
                x = kit.tensor(rank, t, n, dtype)
                before = dist.stats().sites
                old = before["all_gather#0"].keyframes if before else 0
                out = kit.gather(dist, x)
                assert kit.nmse(out, kit.gather_exact(x)) < 0.1
                seen.append(dist.stats().sites["all_gather#0"].keyframes - old)
            assert seen == [1, 0, 1, 1, 0, 1]
            return kit.finish(dist)

    compare.check(run_ranks(body))


def test_only_one_ranks_stream_changes_size():
    """All-to-all: a pair's streams are its own."""

    def body(rank, world_size):
        with kit.wrap() as dist:
            for t in range(4):
                sizes = [2048, 2048, 2048] if t < 2 else [2048, 4096, 2048]
                into = [2048, sizes[1] if rank == 0 else 2048, 2048]
                out_of = [sizes[1] if rank == 1 else 2048, 2048, 2048]
                dist.step()
                out = torch.empty(sum(out_of))
                dist.all_to_all_single(out, kit.tensor(rank, t, sum(into)), out_of, into)
            frames = {peer: e.sequence for peer, e in dist._engine.store.site("all_to_all#0").encoders.items()}
            assert set(frames.values()) == {4}
            return kit.finish(dist)

    assert compare.check(run_ranks(body, world_size=3)) == 6


def test_world_of_one_passes_through():
    def body(rank, world_size):
        with kit.wrap() as dist:
            dist.step()
            x = kit.tensor(0)
            assert torch.equal(kit.gather(dist, x), x)
            dist.broadcast(x, src=0)
            out = torch.empty_like(x)
            dist.all_to_all_single(out, x)
            assert torch.equal(out, x)
            stats = dist.stats()
            assert stats.passed_reasons == {"world-size-1": 3}
            assert (stats.compressed_calls, stats.wire_bytes, stats.state_bytes) == (0, 0, 0)

    run_ranks(body, world_size=1)


def test_policy_by_layer_and_step():
    """A user's function, as CompactFusion's compress_func: other codecs per layer and step."""

    def policy(call):
        if call.key.startswith("l0/"):
            return "pass"
        return "int8" if call.step < 3 else {"id": "binary"}

    def body(rank, world_size):
        with kit.wrap(policy=policy) as dist:
            shown = []
            for t in range(5):
                dist.step()
                for layer in ("l0", "l1"):
                    with dist.key(layer):
                        kit.gather(dist, kit.tensor(rank, t))
                shown.append(dist.stats().sites["l1/all_gather#0"].codec)
            assert shown == ["int8", "int8", "int8", "binary", "binary"]
            assert dist.stats().sites["l0/all_gather#0"].passed == {"policy": 5}
            return kit.finish(dist)

    compare.check(run_ranks(body))
