"""What gradients flow through goes uncompressed: also tensors made in the forward of an autograd Function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor

import compactdist
from tests.group.kit import NUMEL, Counted, data
from tests.launch import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore")  # of old names of functional collectives, and of Dynamo's own

BOTH = [compactdist.Rule("int8", op="all_reduce"), compactdist.Rule("int8")]


def all_gather(x: Tensor, g: Any) -> Tensor:
    return funcol.all_gather_tensor(x, 0, g)[:NUMEL] + 0


def all_gather_list(x: Tensor, g: Any) -> Tensor:
    outs = [torch.empty_like(x) for _ in range(g.size())]
    dist.all_gather(outs, x, group=g)
    return outs[0]


def all_to_all(x: Tensor, g: Any) -> Tensor:
    return funcol.all_to_all_single(x, None, None, g) + 0


def all_reduce(x: Tensor, g: Any) -> Tensor:
    return funcol.all_reduce(x, "sum", g) + 0


def ring(x: Tensor, g: Any) -> Tensor:
    got, peer = torch.empty_like(x), 1 - g.rank()
    ops = [dist.P2POp(dist.isend, x, peer, group=g), dist.P2POp(dist.irecv, got, peer, group=g)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    return got


CALLS = [all_gather, all_gather_list, all_to_all, all_reduce, ring]


def with_node(call: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            return call(x * weight)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
            return None, grad

    return Function.apply


def with_setup(call: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor, weight: Tensor) -> Tensor:
            return call(x * weight)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
            return None, grad

    return Function.apply


def with_any_arguments(call: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*given: Any) -> Tensor:
            _, x, weight = given
            return call(x * weight)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
            return None, grad

    return Function.apply


def nested(call: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    inner = with_node(call)
    return with_node(lambda product: inner(product, torch.ones(())))


def passed_and_compressed(run: Callable[[], Tensor], g: Any) -> tuple[int, int]:
    with Counted(g) as counted:
        run()
    assert {reason for _, reason in counted.passed} <= {"autograd"}, counted.passed
    return sum(counted.passed.values()), counted.compressed


@pytest.mark.parametrize("make", [with_node, with_setup, with_any_arguments, nested], ids=lambda make: make.__name__)
def test_in_the_forward_of_a_function(make):
    def body(rank, size):
        g = compactdist.wrap(codec="int8", keyframe="raw", policy=BOTH, min_numel=64)
        weight = torch.ones((), requires_grad=True)
        for call in CALLS:
            g.reset()
            function = make(lambda x, call=call: call(x, g))
            for step in range(3):
                g.step()
                x = data(rank, seed=step)
                passed, compressed = passed_and_compressed(lambda x=x, function=function: function(x, weight), g)
                assert passed > 0, call.__name__
                assert compressed == 0, call.__name__

    run_ranks(body)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_a_function_is_compressed(mode):
    def body(rank, size):
        g = compactdist.wrap(codec="int8", policy=BOTH, min_numel=64)
        weight = torch.ones((), requires_grad=True)  # a parameter given to the Function itself
        for call in CALLS:
            g.reset()
            function = with_node(lambda x, call=call: call(x, g))
            for step in range(3):
                g.step()
                x = data(rank, seed=step)
                with mode():
                    passed, compressed = passed_and_compressed(lambda x=x, function=function: function(x, weight), g)
                assert passed == 0, call.__name__
                assert compressed > 0, call.__name__

    run_ranks(body)


def test_a_function_of_tensors_without_gradients_is_compressed_under_grad_mode():
    def body(rank, size):
        g = compactdist.wrap(codec="int8", min_numel=64)
        function = with_setup(lambda x: all_gather(x, g))
        for step in range(3):
            g.step()
            assert passed_and_compressed(lambda step=step: function(data(rank, seed=step), torch.ones(())), g) == (0, 1)

    run_ranks(body)


def test_compiled_code_that_trains():
    def body(rank, size):
        g = compactdist.wrap(codec="int8", min_numel=64)
        weight = torch.ones(NUMEL, requires_grad=True)

        def model(x: Tensor) -> Tensor:
            return funcol.all_gather_tensor_autograd(x * weight, 0, g).sin()

        run = torch.compile(model, backend="aot_eager", fullgraph=True)
        for step in range(3):
            g.step()
            with Counted(g) as counted:
                y = run(data(rank, seed=step))
                y.sum().backward()
            assert counted.compressed == 0
            assert counted.passed[("all_gather", "autograd")] == 1
        with torch.no_grad():
            g.step()
            assert passed_and_compressed(lambda: run(data(rank)), g) == (0, 1)

    run_ranks(body, timeout=100, pg_timeout=60)
