"""Models that name their call sites and count their steps."""

from __future__ import annotations

import pytest
import torch

from compactdist.errors import ConfigError
from tests.group.lifecycle import kit
from tests.launch import run_ranks
from tests.lockstep import compare

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


class Layer(torch.nn.Module):
    def __init__(self, dist, number):
        super().__init__()
        self.dist, self.number, self.broken = dist, number, False
        self.norm = torch.nn.Identity()
        self.send = torch.compiler.disable(lambda x: kit.gather(dist, x))  # at a graph break, where it is compiled

    def forward(self, x):
        self.norm(x)
        if self.broken:
            raise ZeroDivisionError
        self.send(x + self.number)
        return x


class Model(torch.nn.Module):
    def __init__(self, dist, layers=2):
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer(dist, i) for i in range(layers))
        self.dist = dist

    def forward(self, x, timestep=None):
        for layer in self.layers:
            try:
                x = layer(x)
            except ZeroDivisionError:
                kit.gather(self.dist, x)
        return x


def test_names_and_steps_come_from_the_model():
    def body(rank, world_size):
        with kit.wrap() as dist:
            model = Model(dist)
            dist.attach(model)
            for t in range(3):
                model(kit.tensor(rank, t))
                assert dist.current_step == t
            assert kit.keyframes(dist) == {f"layers.{i}/all_gather#0": (3, 1) for i in range(2)}
            dist.reset()
            model(kit.tensor(rank))
            assert dist.current_step == 0
            return kit.finish(dist)

    compare.check(run_ranks(body))


@pytest.mark.parametrize("per_step", [1, 2])
def test_forwards_are_counted_per_branch(per_step):
    def body(rank, world_size):
        with kit.wrap() as dist:
            model = Model(dist, layers=1)
            dist.attach(model, forwards_per_step=per_step)
            for t in range(3):
                for branch in ("cond", "uncond"):
                    with dist.branch(branch):
                        for _ in range(per_step):
                            model(kit.tensor(rank, t))
                            assert dist.current_step == t
            assert len(kit.keys_of(dist)) == 2 * per_step
            assert set(kit.keyframes(dist).values()) == {(3, 1)}
            return kit.finish(dist)

    compare.check(run_ranks(body))


def test_a_step_value_decides():
    def body(rank, world_size):
        with kit.wrap() as dist:
            model = Model(dist, layers=1)
            dist.attach(model, step_value=lambda module, args, kwargs: kwargs["timestep"])
            steps = []
            for timestep in (999, 999, 500, 500, 1):
                model(kit.tensor(rank), timestep=timestep)
                steps.append(dist.current_step)
            assert steps == [0, 0, 1, 1, 2]

    run_ranks(body)


def test_a_step_value_may_be_a_tensor_of_several_elements_that_is_written_to():
    """It was compared by truth, which several elements have not, and with itself, which is no change."""

    def body(rank, world_size):
        with kit.wrap() as dist:
            model = Model(dist, layers=1)
            dist.attach(model, step_value=lambda module, args, kwargs: kwargs["timestep"])
            steps, timestep = [], torch.empty(2)
            for value in (999, 999, 500, 500, 1):
                model(kit.tensor(rank), timestep=timestep.fill_(value))
                steps.append(dist.current_step)
            assert steps == [0, 0, 1, 1, 2]

    run_ranks(body)


def test_attach_takes_a_module():
    def body(rank, world_size):
        with kit.wrap() as dist, pytest.raises(ConfigError, match=r"torch.nn.Module, got dict: .* its transformer"):
            dist.attach({})

    run_ranks(body)


def test_steps_of_a_submodule_or_of_ones_own():
    def body(rank, world_size):
        with kit.wrap() as dist:
            model = Model(dist)
            with dist.attach(model, step_module="layers.1"):
                model.layers[0](kit.tensor(rank))
                assert dist.current_step == -1
                model.layers[1](kit.tensor(rank))
                assert dist.current_step == 0
        with kit.wrap() as dist:
            model = Model(dist, layers=1)
            dist.attach(model, step_module=None)
            for t in range(3):
                dist.step()
                model(kit.tensor(rank, t))
            assert dist.current_step == 2
            assert kit.keyframes(dist) == {"layers.0/all_gather#0": (3, 1)}

    run_ranks(body)


def test_a_forward_that_raises_leaves_no_name_behind():
    def body(rank, world_size):
        with kit.wrap() as dist:
            model = Model(dist)
            dist.attach(model)
            model.layers[0].broken = True
            model(kit.tensor(rank))
            assert kit.keys_of(dist) == ["Model/all_gather#0", "layers.1/all_gather#0"]
            assert dist._keys.prefix == ""

    run_ranks(body)


def test_detach():
    def body(rank, world_size):
        with kit.wrap() as dist:
            model = Model(dist, layers=1)
            with dist.attach(model):
                model(kit.tensor(rank))
            model(kit.tensor(rank))
            assert dist.current_step == 0
            assert kit.keys_of(dist) == ["layers.0/all_gather#0", "all_gather#0"]
        model = Model(dist, layers=1)
        assert not model._forward_pre_hooks

    run_ranks(body)


def test_two_models_on_two_groups():
    def body(rank, world_size):
        second = torch.distributed.new_group([0, 1])
        with kit.wrap() as a, kit.wrap(group=second) as b:
            models = Model(a, layers=1), Model(b, layers=1)
            a.attach(models[0])
            b.attach(models[1])
            for t in range(2):
                models[0](kit.tensor(rank, t))
                models[1](kit.tensor(rank + 5, t))
                models[0](kit.tensor(rank, t))
            assert (a.current_step, b.current_step) == (3, 1)
            return kit.finish(a), kit.finish(b)

    for held in zip(*run_ranks(body), strict=True):
        compare.check(list(held))


def test_what_cannot_be_attached():
    def body(rank, world_size):
        with kit.wrap() as dist:
            model = Model(dist)
            with pytest.raises(ConfigError, match="no submodule 'blocks'"):
                dist.attach(model, step_module="blocks")
            with pytest.raises(ConfigError, match="forwards_per_step"):
                dist.attach(model, forwards_per_step=0)
            assert not model._forward_pre_hooks

    run_ranks(body)


def test_each_request_has_steps_of_its_own():
    """Two requests alternate, with equal timesteps: what one showed last says nothing of the other."""

    def body(rank, world_size):
        model = torch.nn.Linear(4, 4)
        with kit.wrap() as dist:
            dist.attach(model, step_value=lambda module, args, kwargs: float(args[0][0]))
            requests = [dist.request(name) for name in ("a", "b")]
            for t in range(3):
                for request in requests:
                    with request.resume():
                        model(torch.full((4,), float(t)))
                        assert dist.current_step == t

    run_ranks(body)


def test_a_compiled_submodule_names_the_calls_of_its_graph():
    def body(rank, world_size):
        torch._dynamo.reset()
        with kit.wrap() as dist:
            model = Model(dist)
            for layer in model.layers:
                layer.compile(backend="eager")
            model.layers[1].norm.compile(backend="eager")
            before = [layer._compiled_call_impl for layer in model.layers]
            attachment = dist.attach(model)
            for t in range(2):
                model(kit.tensor(rank, t))
            expected = {f"layers.{i}/all_gather#0": (2, 1) for i in range(2)}
            assert kit.keyframes(dist) == expected
            assert not model.layers[0].norm._forward_pre_hooks, "a hook inside the graph"

            model.layers[0].broken = True
            model(kit.tensor(rank))
            assert "Model/all_gather#0" in kit.keyframes(dist), "a name outlived the call that raised"

            model.layers[1].compile(backend="eager")
            anew = model.layers[1]._compiled_call_impl
            attachment.detach()
            assert [layer._compiled_call_impl for layer in model.layers] == [before[0], anew]
            return kit.finish(dist)

    compare.check(run_ranks(body))
