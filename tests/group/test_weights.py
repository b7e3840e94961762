"""Weights and gradients pass through a wrapped group, whoever of torch moves them; activations do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as power_sgd
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import compactdist
from compactdist import Rule
from tests.group.kit import PIPELINES_OPEN_LINKS, Counted, close, data
from tests.launch import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

WIDTH = 32
OPTIONS = {
    "codec": "int2",
    "min_numel": 1,
    "policy": [Rule("int2", op="all_reduce"), Rule("int2", op="reduce_scatter"), Rule("int2")],
}
"""Everything that can be compressed is, and coarsely."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(2))
        self.register_buffer("scale", torch.full((WIDTH,), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x * self.scale


# --- training: every way to spread weights, gradients and optimizer states over a mesh --------------------------------


def fsdp2(mesh: Any, compiled: bool = False) -> Any:
    model = Net()
    for block in model.blocks:
        if compiled:
            block.compile(backend="aot_eager")
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp2_compiled_blocks(mesh: Any) -> Any:
    return fsdp2(mesh, compiled=True)


def fsdp2_own_gather(mesh: Any) -> Any:
    """The all-gather is code of the user's, called by FSDP."""

    class Gather:
        def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
            return torch.empty(*size, dtype=dtype, device=device)

        def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
            return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)

    model = fsdp2(mesh)
    model.set_custom_all_gather(Gather())
    return model


def fsdp1(mesh: Any) -> Any:
    wrap = ModuleWrapPolicy({nn.Sequential})
    return FullyShardedDataParallel(Net(), mesh.get_group(), auto_wrap_policy=wrap, device_id=torch.device("cpu"))


def ddp(mesh: Any) -> Any:
    return DistributedDataParallel(Net(), process_group=mesh.get_group())


def ddp_compiled(mesh: Any) -> Any:
    return torch.compile(ddp(mesh), backend="aot_eager")


def ddp_rounded_gradients(mesh: Any) -> Any:
    model = ddp(mesh)
    model.register_comm_hook(mesh.get_group(), default_hooks.fp16_compress_hook)
    return model


def ddp_power_sgd(mesh: Any) -> Any:
    """Its second and third reductions are made by callbacks of futures, in other threads."""
    model = ddp(mesh)
    model.register_comm_hook(power_sgd.PowerSGDState(mesh.get_group(), start_powerSGD_iter=2), power_sgd.powerSGD_hook)
    return model


def losses(build: Callable[[Any], Any], mesh: Any, rank: int) -> list[Tensor]:
    torch.manual_seed(0)
    group, model = mesh.get_group(), build(mesh)
    if build is ddp:
        optimizer: Any = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, process_group=group, lr=0.01)
    else:
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
    averager = PeriodicModelAverager(period=2, process_group=group)
    found = []
    for step in range(5):
        if isinstance(group, compactdist.CompressedProcessGroup):
            group.step()
        loss = model(data(rank, 4 * WIDTH, step).view(4, WIDTH)).square().mean()
        found.append(loss.detach().clone())
        loss.backward()
        if "fsdp2" in build.__name__:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        if build is ddp_rounded_gradients:
            averager.average_parameters(model.parameters())
    return found


FSDP = {"all_gather", "reduce_scatter"}
DDP = {"all_reduce", "broadcast"}
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("build", "moved"),
    [
        (fsdp2, FSDP | {"all_reduce"}),  # the norm of the gradients
        pytest.param(fsdp2_compiled_blocks, FSDP | {"all_reduce"}, marks=slow),
        (fsdp2_own_gather, FSDP | {"all_reduce"}),
        (fsdp1, FSDP),
        (ddp, DDP),
        pytest.param(ddp_compiled, DDP, marks=slow),
        (ddp_rounded_gradients, DDP),
        (ddp_power_sgd, DDP),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_losses_are_those_of_an_unwrapped_mesh(build, moved):
    def body(rank, size):
        mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("dp",))
        expected = losses(build, mesh, rank)
        group = compactdist.wrap_mesh(mesh, "dp", **OPTIONS)["dp"]
        with Counted(group) as counted:
            found = losses(build, mesh, rank)
        assert len({float(loss) for loss in found}) == 5
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert counted.compressed == 0
        assert group._engine.store.sites() == []
        assert {op for op, reason in counted.passed if reason == "weights"} == moved
        assert {reason for _, reason in counted.passed} <= {"weights", "dtype", "op"}

    run_ranks(body)


def test_uneven_inputs_of_ddp():
    """A rank that has run out of inputs takes part in the others' collectives; the last one hands its model on."""

    def train(group, rank):
        torch.manual_seed(0)
        model = DistributedDataParallel(Net(), process_group=group)
        with model.join():
            for step in range(2 + rank):
                model(data(rank, WIDTH, step).view(1, WIDTH)).square().mean().backward()
        return [p.grad for p in model.parameters()] + list(model.buffers())

    def body(rank, size):
        expected = train(dist.group.WORLD, rank)
        with compactdist.wrap(**OPTIONS) as group:
            group.step()
            assert all(torch.equal(a, b) for a, b in zip(train(group, rank), expected, strict=True))
            assert group.stats().compressed_calls == 0

    run_ranks(body)


# --- weights at rest --------------------------------------------------------------------------------------------------


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {n: v.full_tensor() if isinstance(v, DTensor) else v for n, v in model.state_dict().items()}


def test_checkpoints_and_full_tensors(tmp_path):
    def body(rank, size):
        mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("dp",))
        group = compactdist.wrap_mesh(mesh, "dp", **OPTIONS)["dp"]
        group.step()
        models = []
        for seed in range(3):
            torch.manual_seed(seed)
            models.append(fsdp2(mesh))
        model, loaded, handed_out = models
        weights = whole(model)
        for name, value in model.state_dict().items():
            assert not isinstance(value, DTensor) or torch.equal(weights[name].chunk(size)[rank], value.to_local())

        gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        assert all(torch.equal(gathered[name], weights[name]) for name in weights)
        x = data(0, 4 * WIDTH).view(WIDTH, 4)
        assert torch.equal(distribute_tensor(x, mesh, [Replicate()]).to_local(), x)
        assert torch.equal(distribute_tensor(x, mesh, [Shard(0)]).to_local(), x.chunk(size)[rank])

        dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path, process_group=group)
        dcp.load({"model": (state := loaded.state_dict())}, checkpoint_id=tmp_path, process_group=group)
        loaded.load_state_dict(state)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(handed_out, dict(weights) if rank == 0 else {}, options=options)
        for other in (loaded, handed_out):
            assert all(torch.equal(value, weights[name]) for name, value in whole(other).items())
        assert group.stats().compressed_calls == 0

    run_ranks(body)


# --- activations ------------------------------------------------------------------------------------------------------


class Gathering(nn.Module):
    """Its forward has weights, and gathers what every rank holds."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.name = group.group_name

    def forward(self, x: Tensor) -> Tensor:
        return funcol.all_gather_tensor(self.linear(x), 0, self.name) + 0


def test_prefetched_weights_do_not_move_the_keys_of_activations():
    def body(rank, size):
        mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("dp",))
        group = compactdist.wrap_mesh(mesh, "dp", codec="int8", min_numel=1)["dp"]
        blocks = [Gathering(group) for _ in range(3)]
        model = nn.Sequential(*blocks)
        plain = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))
        for layer, block in zip(plain, blocks, strict=True):
            layer.load_state_dict(block.linear.state_dict())
            for p in layer.parameters():
                dist.broadcast(p.data, 0)
            block.linear.load_state_dict(layer.state_dict())
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        everyones = [data(r, WIDTH).view(1, WIDTH) for r in range(size)]
        for step in range(4):
            # the weights of later blocks are gathered before the activations of this one, from the second step on
            for i, block in enumerate(blocks[:-1]):
                block.set_modules_to_forward_prefetch(blocks[i + 1 : i + 1 + step])
            with torch.no_grad(), group.step(), Counted(group) as counted:
                out = model(everyones[rank] + 0.01 * step)
                exact = torch.cat([x + 0.01 * step for x in everyones])
                for layer in plain:
                    exact = layer(exact).repeat(1 if layer is plain[0] else size, 1)
            assert close(out, exact)
            assert counted.passed == {("all_gather", "weights"): 3}
            assert counted.compressed == 3
        sites = group.stats().sites
        assert {key: (site.calls, site.keyframes) for key, site in sites.items()} == {
            f"all_gather#{i}": (4, 1) for i in range(3)
        }

    run_ranks(body)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=slow)])
def test_activations_within_a_spread_model_compress(compiled):
    """Frames of FSDP and DDP are on the stack of everything that a model does: those of the model are nearer."""

    def body(rank, size):
        mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("dp",))
        group = compactdist.wrap_mesh(mesh, "dp", codec="int8", min_numel=1)["dp"]
        group.step()

        class Encoder(Gathering):
            def encode(self, x: Tensor) -> Tensor:
                everyones = torch.empty(size * x.shape[0], WIDTH)
                dist.all_gather_into_tensor(everyones, x, group=group)
                return everyones

        methods = fully_shard(Encoder(group), mesh=mesh)
        register_fsdp_forward_method(methods, "encode")
        cpu, x = torch.device("cpu"), data(rank, WIDTH).view(1, WIDTH)
        two = nn.Sequential(Gathering(group), Gathering(group))
        calls = {
            "fsdp1": FullyShardedDataParallel(Gathering(group), group, device_id=cpu),
            "fsdp1 of torch's modules": FullyShardedDataParallel(two, group, device_id=cpu),
            "fsdp2": methods,
            "method of fsdp2": methods.encode,
            "ddp": DistributedDataParallel(Gathering(group), process_group=group),
        }
        if compiled:
            calls = {"compiled ddp": torch.compile(calls["ddp"], backend="aot_eager")}
        for name, call in calls.items():
            with torch.no_grad(), Counted(group) as counted:
                call(x)
            assert counted.compressed == (2 if "modules" in name else 1), (name, counted.passed)

    run_ranks(body)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=slow)])
def test_tensor_parallel_layers_compress(compiled):
    def body(rank, size):
        mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))
        policy = [Rule("int8", op="all_reduce"), Rule("int8", op="reduce_scatter"), Rule("int8")]
        group = compactdist.wrap_mesh(mesh, "tp", codec="int8", min_numel=1, policy=policy)["tp"]
        x = [data(step, 4 * WIDTH).view(4, WIDTH) for step in range(3)]
        for last, op in ((Shard(0), "reduce_scatter"), (Replicate(), "all_reduce")):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
            expected = [model(one).detach() for one in x]
            group.reset()
            styles = {"0": ColwiseParallel(input_layouts=Shard(0)), "2": RowwiseParallel(output_layouts=last)}
            with Counted(group) as counted:
                parallelize_module(model, mesh, styles)
            assert counted.compressed == 0
            if compiled:
                model.compile(backend="aot_eager")
            for one, right in zip(x, expected, strict=True):
                with torch.no_grad(), group.step(), Counted(group) as counted:
                    y = model(one.chunk(size)[rank])
                    assert close(y + 0, right.chunk(size)[rank] if op == "reduce_scatter" else right)
                assert counted.compressed >= 2
                assert not counted.passed
            assert {key.partition("#")[0] for key in group.stats().sites} >= {"all_gather", op}

    run_ranks(body)


def test_pipeline_stages_compress():
    def body(rank, size):
        group = compactdist.wrap(codec="int8", min_numel=256)
        torch.manual_seed(0)
        layers = [nn.Linear(WIDTH, WIDTH) for _ in range(size)]
        stage = PipelineStage(layers[rank], rank, size, torch.device("cpu"), group=group)
        schedule = ScheduleGPipe(stage, n_microbatches=2)
        x = data(0, 16 * WIDTH).view(16, WIDTH)
        if PIPELINES_OPEN_LINKS:  # before the first step(), or that has one more message than others
            with torch.no_grad():
                schedule.step(*([x] if rank == 0 else []))
        for step in range(3):
            x = data(0, 16 * WIDTH).view(16, WIDTH) + 0.01 * step
            with torch.no_grad(), group.step(), Counted(group) as counted:
                out = schedule.step(*([x] if rank == 0 else []))
                assert rank == 0 or close(out, layers[1](layers[0](x)))
            assert counted.compressed == (2 if rank == 0 else 0)
            received = [site.received for site in group.stats().sites.values()]
            assert received == ([0, 0] if rank == 0 else [step + 1, step + 1])

    run_ranks(body)
