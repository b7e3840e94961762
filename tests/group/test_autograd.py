"""What gradients flow through goes uncompressed: also tensors made in the forward of an autograd Function."""

from __future__ import annotations

import contextlib
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


class OfWeight(torch.autograd.Function):
    """Of a tensor and a weight, for which alone there is a gradient."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def with_node(call: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    class Function(OfWeight):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            return call(x * weight)

    return Function.apply


def with_node_named_self(call: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    class Function(OfWeight):
        @staticmethod
        def forward(self: Any, x: Tensor, weight: Tensor) -> Tensor:
            return call(x * weight)

    return Function.apply


def with_another_name(call: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    class Function(OfWeight):
        forward = staticmethod(lambda ctx, x, weight: call(x * weight))

    return Function.apply


def with_setup(call: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    class Function(OfWeight):
        @staticmethod
        def forward(x: Tensor, weight: Tensor) -> Tensor:
            return call(x * weight)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

    return Function.apply


def with_any_arguments(call: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    class Function(OfWeight):
        @staticmethod
        def forward(*given: Any) -> Tensor:
            _, x, weight = given
            return call(x * weight)

    return Function.apply


def nested(call: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    inner = with_node(call)
    return with_node(lambda product: inner(product, torch.ones(())))


def passed_and_compressed(g: Any, run: Callable[..., Tensor], *given: Any) -> tuple[int, int]:
    with Counted(g) as counted:
        run(*given)
    assert {reason for _, reason in counted.passed} <= {"autograd"}, counted.passed
    return sum(counted.passed.values()), counted.compressed


def each_call_in_three_steps(make: Callable[..., Any], mode: Callable[[], Any] = contextlib.nullcontext) -> Any:
    """For each of ``CALLS``: its name, and how many calls in a Function passed and were compressed."""
    g = compactdist.wrap(codec="int8", keyframe="raw", policy=BOTH, min_numel=64)
    weight = torch.ones((), requires_grad=True)  # a parameter given to the Function itself
    for call in CALLS:
        g.reset()
        function = make(lambda x, call=call: call(x, g))
        for step in range(3):
            g.step()
            with mode():
                yield call.__name__, *passed_and_compressed(g, function, data(g.rank(), seed=step), weight)


MAKERS = [with_node, with_node_named_self, with_another_name, with_setup, with_any_arguments, nested]


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_in_the_forward_of_a_function(make):
    def body(rank, size):
        for name, passed, compressed in each_call_in_three_steps(make):
            assert passed > 0, name
            assert compressed == 0, name

    run_ranks(body)


@pytest.mark.parametrize("make", [with_node, with_node_named_self, with_another_name], ids=lambda make: make.__name__)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_a_function_is_compressed(mode, make):
    def body(rank, size):
        for name, passed, compressed in each_call_in_three_steps(make, mode):
            assert passed == 0, name
            assert compressed > 0, name

    run_ranks(body)


def test_under_no_grad_a_function_with_setup_context_is_compressed_unless_an_input_requires_grad():
    """It has no node when its forward runs, so nothing tells whether it was called under no_grad."""

    def body(rank, size):
        g = compactdist.wrap(codec="int8", min_numel=64)
        function = with_setup(lambda x: all_gather(x, g))
        for weight, expected in ((torch.ones(()), (0, 1)), (torch.ones((), requires_grad=True), (1, 0))):
            g.step()
            with torch.no_grad():
                assert passed_and_compressed(g, function, data(rank), weight) == expected

    run_ranks(body)


def test_modules_around_a_call_are_no_functions():
    """Their forwards take tensors that require grad, also under no_grad."""

    class Around(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return function(x.detach(), weight.detach())

    def body(rank, size):
        nonlocal function
        g = compactdist.wrap(codec="int8", min_numel=64)
        function = with_node(lambda x: all_gather(x, g))
        weight = torch.ones((), requires_grad=True)
        for step in range(3):
            g.step()
            x = data(rank, seed=step).requires_grad_()
            with torch.no_grad():
                assert passed_and_compressed(g, Around(), x, weight) == (0, 1)

    function: Any = None
    run_ranks(body)


def test_a_function_of_tensors_without_gradients_is_compressed_under_grad_mode():
    def body(rank, size):
        g = compactdist.wrap(codec="int8", min_numel=64)
        function = with_setup(lambda x: all_gather(x, g))
        for step in range(3):
            g.step()
            assert passed_and_compressed(g, function, data(rank, seed=step), torch.ones(())) == (0, 1)

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
            assert passed_and_compressed(g, run, data(rank)) == (0, 1)

    run_ranks(body, timeout=100, pg_timeout=60)
