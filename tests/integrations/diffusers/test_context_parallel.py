"""Whole requests of tiny pipelines on two ranks: what comes out, what was counted, what is left behind."""

from __future__ import annotations

import inspect
import logging
import os
from itertools import product

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("diffusers")

import compactdist
import compactdist_diffusers
from compactdist._torch import swap_mesh_dim
from compactdist.testing import act_like_nccl
from tests.group.kit import told
from tests.integrations.diffusers.kit import STEPS, functions, hooks, parallel, relative_error
from tests.launch import run_ranks
from tests.quick import quick_rows

pytestmark = [pytest.mark.xdit, pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore")]

# collectives of one request: layers x forwards per step x steps, and four exchanges where the ring has one gather
CALLS = {"flux": 4 * 1 * STEPS, "wan": 3 * 2 * STEPS, "qwenimage": 3 * 2 * STEPS}


@pytest.mark.parametrize(
    ("model", "route"),
    quick_rows([("wan", "ring")], [*product(["flux"], ["ring", "ulysses"]), ("wan", "ring"), ("qwenimage", "ulysses")]),
)
def test_requests(model: str, route: str) -> None:
    def body(rank: int, size: int) -> None:
        pipe, call_kwargs = parallel(model, route, size)
        mesh = getattr(pipe.transformer._parallel_config.context_parallel_config, f"_{route}_mesh")
        before = (mesh.get_group(), functions(), hooks(pipe.transformer))
        plain = pipe(**call_kwargs)[0]
        calls = CALLS[model] * (1 if route == "ring" else 4)

        with compactdist_diffusers.enable(pipe, codec="raw") as handle:
            assert list(handle.groups) == [route]
            assert mesh.get_group() is handle.groups[route]
            assert "sigmas" in inspect.signature(pipe.scheduler.set_timesteps).parameters
            assert relative_error(pipe(**call_kwargs)[0], plain) <= 1e-6

        with compactdist_diffusers.enable(pipe, codec="int4") as handle:
            first = pipe(**call_kwargs)[0]
            stats = handle.stats()[route]
            assert stats.compressed_calls == calls
            assert stats.wire_bytes < 0.3 * stats.raw_bytes
            assert handle.explain().startswith(f"steps: {STEPS}; requests begun: set_timesteps 1\n")
            other_kwargs = {**call_kwargs, "latents": call_kwargs["latents"].flip(-1)}
            second = pipe(**other_kwargs)[0]
            assert f"steps: {2 * STEPS}; requests begun: set_timesteps 2" in handle.explain()
        assert 1e-6 < relative_error(first, plain) < 2e-2

        # a request leaves nothing behind that the next one could feel
        with compactdist_diffusers.enable(pipe, codec="int4"):
            assert torch.equal(pipe(**other_kwargs)[0], second)
        with compactdist_diffusers.enable(pipe, codec="int4"):
            assert torch.equal(pipe(**call_kwargs)[0], first)

        handle.disable()  # a second time: nothing
        assert (mesh.get_group(), functions(), hooks(pipe.transformer)) == before
        assert "set_timesteps" not in vars(pipe.scheduler)
        assert "cache_context" not in vars(pipe.transformer)
        assert torch.equal(pipe(**call_kwargs)[0], plain)

    run_ranks(body, timeout=100)


@pytest.mark.parametrize("route", ["ring", "ulysses"])
def test_a_request_over_a_group_with_nccls_manners_is_that_over_gloo(route: str) -> None:
    def body(rank: int, size: int) -> None:
        pipe, call_kwargs = parallel("flux", route, size)
        mesh = getattr(pipe.transformer._parallel_config.context_parallel_config, f"_{route}_mesh")
        with compactdist_diffusers.enable(pipe, codec="int4"):
            over_gloo = pipe(**call_kwargs)[0]
        inner = act_like_nccl(mesh.get_group())
        swap_mesh_dim(mesh, 0, inner)
        with compactdist_diffusers.enable(pipe, codec="int4") as handle:
            assert handle.groups[route].inner is inner
            assert torch.equal(pipe(**call_kwargs)[0], over_gloo)
            assert handle.stats()[route].compressed_calls == CALLS["flux"] * (1 if route == "ring" else 4)

    run_ranks(body, timeout=100)


def test_predictions_in_place_of_the_rings_gathers() -> None:
    def body(rank: int, size: int) -> None:
        pipe, call_kwargs = parallel("flux", "ring", size)
        plain = pipe(**call_kwargs)[0]
        with compactdist_diffusers.enable(pipe, codec="int4", order="auto"):
            waited = pipe(**call_kwargs)[0]
        with compactdist_diffusers.enable(pipe, codec="int4", order="auto", mode="predict-now") as handle:
            predicted = pipe(**call_kwargs)[0]
            assert torch.equal(pipe(**call_kwargs)[0], predicted)  # whatever arrived when
            assert handle.stats()["ring"].predicted == 2 * (CALLS["flux"] - CALLS["flux"] // STEPS)
        assert relative_error(waited, plain) < relative_error(predicted, plain) < 0.1

    run_ranks(body, timeout=100)


def test_attention_masks_are_not_compressed() -> None:
    def body(rank: int, size: int) -> None:
        pipe, call_kwargs = parallel("qwenimage", "ulysses", size, steps=2)
        call_kwargs["prompt_embeds_mask"][:, -3:] = 0
        plain = pipe(**call_kwargs)[0]
        with compactdist_diffusers.enable(pipe, codec="int8", min_numel=1) as handle:
            assert 0 < relative_error(pipe(**call_kwargs)[0], plain) < 2e-2
            stats = handle.stats()["ulysses"]
            assert stats.compressed_calls == 3 * 2 * 2 * 4
            assert stats.passed_through > 0
            assert "all_gather#" not in handle.explain()

    run_ranks(body, timeout=60)


def test_sites_carry_branch_role_and_layer() -> None:
    def body(rank: int, size: int) -> None:
        pipe, call_kwargs = parallel("wan", "ulysses", size, steps=2)
        with compactdist_diffusers.enable(pipe, codec="int8") as handle:
            pipe(**call_kwargs)
            expected = {
                f"{branch}/{role}/blocks.{layer}.attn1/all_to_all#0"
                for branch in ("cond", "uncond")
                for role in ("q", "k", "v", "out")
                for layer in range(3)
            }
            assert set(handle.stats()["ulysses"].sites) == expected

    run_ranks(body, timeout=60)


def test_one_route_of_two_on_four_ranks() -> None:
    def body(rank: int, size: int) -> None:
        pipe, call_kwargs = parallel("flux", "both", size, steps=4)
        plain = pipe(**call_kwargs)[0]
        with compactdist_diffusers.enable(pipe, codec="int4") as handle:
            assert relative_error(pipe(**call_kwargs)[0], plain) < 2e-2
            counts = {route: stats.compressed_calls for route, stats in handle.stats().items()}
            assert counts == {"ring": 4 * 4, "ulysses": 4 * 4 * 4}
        with compactdist_diffusers.enable(pipe, codec="int4", routes="ring") as handle:
            assert relative_error(pipe(**call_kwargs)[0], plain) < 2e-2
            assert {route: stats.compressed_calls for route, stats in handle.stats().items()} == {"ring": 4 * 4}

    run_ranks(body, 4, timeout=100)


@pytest.mark.parametrize("route", ["ring", "ulysses"])
def test_any_sequence_length(route: str) -> None:
    """`ring_anything` and `ulysses_anything` agree about sizes first; those numbers go around as they are."""

    def body(rank: int, size: int) -> None:
        pipe, call_kwargs = parallel("flux", route, size, steps=4, **{f"{route}_anything": True})
        call_kwargs["prompt_embeds"] = call_kwargs["prompt_embeds"][:, :15]  # 8 tokens of text here, 7 there
        plain = pipe(**call_kwargs)[0]
        with compactdist_diffusers.enable(pipe, codec="int8") as handle:
            assert 0 < relative_error(pipe(**call_kwargs)[0], plain) < 2e-2
            stats = handle.stats()[route]
            assert stats.compressed_calls == 4 * 4 * (1 if route == "ring" else 4)
            assert "all_gather: dtype (not float32, float16 or bfloat16)" in handle.explain()

    run_ranks(body, timeout=60)


def test_a_model_alone() -> None:
    """Without a pipeline, timesteps that turn back begin a request, and so does `new_request`."""

    def body(rank: int, size: int) -> None:
        pipe, call_kwargs = parallel("flux", "ring", size, steps=4)
        with compactdist_diffusers.enable(pipe, codec="int4"):
            first = pipe(**call_kwargs)[0]
        with compactdist_diffusers.enable(pipe.transformer, codec="int4") as handle:
            assert torch.equal(pipe(**call_kwargs)[0], first)
            assert torch.equal(pipe(**call_kwargs)[0], first)
            assert "steps: 8; requests begun: timesteps turned back 1\n" in handle.explain()
            handle.new_request()
            assert torch.equal(pipe(**call_kwargs)[0], first)
            assert "steps: 12; requests begun: timesteps turned back 1, new_request() 1\n" in handle.explain()

    run_ranks(body, timeout=60)


def test_two_pipelines_at_once() -> None:
    def body(rank: int, size: int) -> None:
        flux, flux_kwargs = parallel("flux", "ring", size, steps=3)
        wan, wan_kwargs = parallel("wan", "ulysses", size, steps=3)
        before = functions()
        first = compactdist_diffusers.enable(flux, codec="int4")
        alone = flux(**flux_kwargs)[0]
        second = compactdist_diffusers.enable(wan, codec="int4")
        wan(**wan_kwargs)
        assert torch.equal(flux(**flux_kwargs)[0], alone)
        assert first.stats()["ring"].compressed_calls == 2 * 4 * 3
        first.disable()  # not in the order in which they were enabled
        wan(**wan_kwargs)
        assert second.stats()["ulysses"].compressed_calls == 2 * 3 * 2 * 4 * 3
        assert all("#0" in site for site in second.stats()["ulysses"].sites)
        second.disable()
        assert functions() == before

    run_ranks(body, timeout=60)


def test_refusals() -> None:
    def body(rank: int, size: int) -> None:
        from compactdist_harness import tiny

        plain, _ = tiny.build("flux")
        with pytest.raises(ValueError, match=r"no context parallelism: first call transformer\.enable_parallelism"):
            compactdist_diffusers.enable(plain)
        with pytest.raises(TypeError, match="takes a diffusers model or pipeline, not list"):
            compactdist_diffusers.enable([])
        pipe, _ = parallel("flux", "ring", size)
        group = pipe.transformer._parallel_config.context_parallel_config._ring_mesh.get_group()
        for routes in ("rings", ["ring", "tensor"], ()):
            with pytest.raises(ValueError, match="routes are ring and ulysses"):
                compactdist_diffusers.enable(pipe, routes=routes)
        with pytest.raises(ValueError, match="transformer has ulysses_degree 1: route 'ulysses' sends nothing"):
            compactdist_diffusers.enable(pipe, routes=["ring", "ulysses"])
        with pytest.raises(ValueError, match="forwards_per_step must be at least 1"):
            compactdist_diffusers.enable(pipe, forwards_per_step=0)
        with pytest.raises(compactdist.CompactDistError, match="no option colour"):
            compactdist_diffusers.enable(pipe, colour="red")
        with (
            compactdist_diffusers.enable(pipe),
            pytest.raises(ValueError, match=r"already enabled; call disable\(\) on its handle first"),
        ):
            compactdist_diffusers.enable(pipe.transformer)
        assert pipe.transformer._parallel_config.context_parallel_config._ring_mesh.get_group() is group
        dist.barrier()

    run_ranks(body, timeout=60)


def test_enable_without_a_codec_takes_the_environments() -> None:
    def body(rank: int, size: int) -> None:
        pipe, _ = parallel("flux", "ring", size)
        os.environ["COMPACTDIST_CODEC"] = "int8"
        lines = told(logging.WARNING)
        with compactdist_diffusers.enable(pipe) as handle:
            assert handle.groups["ring"].options.default_codec == compactdist.codecs.get("int8")
        assert lines == []
        with compactdist_diffusers.enable(pipe, "int4") as handle:
            assert handle.groups["ring"].options.default_codec == compactdist.codecs.get("int4")
        (line,) = lines
        assert line.startswith("COMPACTDIST_CODEC='int8' has no effect")
        del os.environ["COMPACTDIST_CODEC"]
        with compactdist_diffusers.enable(pipe) as handle:
            assert handle.groups["ring"].options.default_codec == compactdist.codecs.get("int2")

    run_ranks(body, timeout=60)


@pytest.mark.parametrize("route", ["ring", "ulysses"])
def test_a_forward_that_trains_is_not_compressed(route: str) -> None:
    """diffusers sends tensors made inside an autograd Function, which do not require grad themselves."""

    def body(rank: int, size: int) -> None:
        pipe, call_kwargs = parallel("flux", route, size, steps=2)
        transformer, calls = pipe.transformer, []
        watch = transformer.register_forward_pre_hook(lambda _, args, kw: calls.append((args, kw)), with_kwargs=True)
        pipe(**call_kwargs)
        watch.remove()
        args, kwargs = calls[0]
        transformer.requires_grad_(True)
        plain = transformer(*args, **kwargs)[0]
        with compactdist_diffusers.enable(transformer, codec="int2", keyframe="int2") as handle:
            assert torch.equal(transformer(*args, **kwargs)[0], plain)
            stats = handle.stats()[route]
            assert stats.compressed_calls == 0
            assert set(stats.passed_reasons) == {"autograd"}
            with torch.no_grad():
                assert relative_error(transformer(*args, **kwargs)[0], plain) > 1e-4
            assert handle.stats()[route].compressed_calls > 0

    run_ranks(body, timeout=100)
