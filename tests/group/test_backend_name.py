"""The backend name "compactdist": in init_process_group, new_group, init_device_mesh; options, environment."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import init_device_mesh

import compactdist
from compactdist.errors import ConfigError
from compactdist.group.environment import settings_from_environment
from tests.group.kit import NUMEL, Counted, close, data, exchanged, gathered
from tests.launch import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:torch.*")

OPTIONS = compactdist.Options(codec="int8", min_numel=64)


def compresses(g, rank, size, group=None):
    """Four calls on the group, the functional one by name; whether they were right, and compressed."""
    out, exchange, received = torch.empty(size * NUMEL), torch.empty(NUMEL), torch.empty(NUMEL)
    for _ in range(2):
        g.step()
        with Counted(g) as counted:
            dist.all_gather_into_tensor(out, data(rank), group=group)
            dist.all_to_all_single(exchange, data(rank), group=group)
            receive = dist.irecv(received, (rank - 1) % size, group=group)
            dist.isend(data(rank), (rank + 1) % size, group=group).wait()
            receive.wait()
            y = funcol.all_gather_tensor(data(rank), 0, g.group_name) + 0
        assert (counted.compressed, counted.passed) == (4, {})
        assert close(out, gathered(size))
        assert close(y, gathered(size))
        assert close(exchange, exchanged(rank, size))
        assert close(received, data((rank - 1) % size))
    return True


@pytest.mark.parametrize("name", ["compactdist", "cpu:compactdist"])
def test_as_the_default_group(name):
    def body(rank, size):
        os.environ.update(COMPACTDIST_CODEC="int8", COMPACTDIST_MIN_NUMEL="64")
        dist.init_process_group(name)
        g = dist.group.WORLD
        assert isinstance(g, compactdist.CompressedProcessGroup)
        assert g.options.codec == "int8"
        assert "compactdist" in dist.get_backend()
        assert dist.get_process_group_ranks(g) == list(range(size))
        assert c10d._resolve_process_group(g.group_name) is g
        with Counted(g) as counted:
            objects = [None] * size
            dist.all_gather_object(objects, rank)
            dist.barrier()
            dist.all_reduce(total := torch.ones(1))
        assert objects == list(range(size))
        assert total == size
        assert counted.compressed == 0
        assert compresses(g, rank, size)
        mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("cp",))
        g.step()
        with Counted(g) as counted:
            assert close(funcol.all_gather_tensor(data(rank), 0, (mesh, 0)) + 0, gathered(size))
        assert counted.compressed == 1
        sub = dist.new_group(list(range(size)))
        dist.barrier(sub)
        dist.destroy_process_group()
        assert not dist.is_initialized()

    run_ranks(body, 2, init=False, timeout=40)


def test_a_new_group_with_options():
    def body(rank, size):
        sub = dist.new_group([1, 2], backend="compactdist", pg_options=OPTIONS)
        if rank == 0:
            assert sub is dist.GroupMember.NON_GROUP_MEMBER
            return
        assert isinstance(sub, compactdist.CompressedProcessGroup)
        assert sub.options == OPTIONS
        assert dist.get_backend(sub) == "compactdist"
        assert (sub.rank(), sub.size()) == (rank - 1, 2)
        sub.step()
        out, received = torch.empty(2 * NUMEL), torch.empty(NUMEL)
        dist.all_gather_into_tensor(out, data(rank), group=sub)
        assert close(out, torch.cat([data(1), data(2)]))
        receive = dist.irecv(received, 3 - rank, group=sub)
        dist.isend(data(rank), 3 - rank, group=sub).wait()
        receive.wait()
        assert close(received, data(3 - rank))
        assert sub.stats().compressed_calls == 2
        dist.destroy_process_group(sub)

    run_ranks(body, 3, timeout=40)


@pytest.mark.parametrize("given", ["environment", "options"])
def test_a_mesh_dimension_by_backend_override(given):
    def body(rank, size):
        os.environ.update(COMPACTDIST_CODEC="int8", COMPACTDIST_MIN_NUMEL="64")
        chosen = "compactdist" if given == "environment" else ("compactdist", OPTIONS)
        mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("dp", "cp"), backend_override={"cp": chosen})
        g = mesh.get_group("cp")
        assert isinstance(g, compactdist.CompressedProcessGroup)
        assert not isinstance(mesh.get_group("dp"), compactdist.CompressedProcessGroup)
        g.step()
        assert close(funcol.all_gather_tensor(data(rank), 0, (mesh, 1)) + 0, gathered(size))
        assert g.stats().compressed_calls == 1

    run_ranks(body, 2, timeout=40)


def test_wrapping_keeps_the_backends_name():
    def body(rank, size):
        assert dist.get_backend(compactdist.wrap()) == dist.get_backend() == "gloo"
        made = dist.new_group(backend="compactdist", pg_options=OPTIONS)
        with pytest.raises(ConfigError, match="wrapped already"):
            compactdist.wrap(made)

    run_ranks(body, 1)


def test_ranks_with_different_options_are_told():
    def body(rank, size):
        with pytest.raises(compactdist.errors.ConfigMismatchError, match="codec"):
            dist.new_group(backend="compactdist", pg_options=compactdist.Options(codec=("int8", "int4")[rank]))

    run_ranks(body, 2, timeout=40, pg_timeout=10)


def test_wrong_pg_options():
    def body(rank, size):
        with pytest.raises(ConfigError, match="pg_options"):
            dist.new_group(backend="compactdist", pg_options={"codec": "int8"})

    run_ranks(body, 1)


def test_options_from_the_environment():
    env = {
        "COMPACTDIST_CODEC": "int4",
        "COMPACTDIST_WARMUP_STEPS": "3",
        "COMPACTDIST_ORDER": "2",
        "COMPACTDIST_DAMPING": "0.25",
        "COMPACTDIST_LOCAL": "exact",
        "COMPACTDIST_MIN_NUMEL": "7",
        "COMPACTDIST_STATE": "int8",
        "COMPACTDIST_STATE_BUDGET_BYTES": "1000",
        "COMPACTDIST_STATE_OFFLOAD": "cpu",
        "COMPACTDIST_SAMPLE_ERRORS_EVERY": "5",
        "OTHER": "x",
    }
    assert settings_from_environment(env) == {
        "codec": "int4",
        "warmup_steps": 3,
        "order": 2,
        "damping": 0.25,
        "local": "exact",
        "min_numel": 7,
        "state": "int8",
        "state_budget_bytes": 1000,
        "state_offload": "cpu",
        "sample_errors_every": 5,
    }
    assert settings_from_environment({}) == {}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("COMPACTDIST_KODEC", "int4", "COMPACTDIST_KODEC is unknown; did you mean COMPACTDIST_CODEC"),
        ("COMPACTDIST_ORDER", "two", "COMPACTDIST_ORDER='two'"),
        ("COMPACTDIST_WARMUP_STEPS", "-1", "warmup_steps"),
        ("COMPACTDIST_CODEC", "int99", "int99"),
        ("COMPACTDIST_STATE", "int4", "'exact', 'int8', 'fp8'"),
    ],
)
def test_a_wrong_variable_is_an_error(monkeypatch, name, value, said):
    with pytest.raises(ValueError, match=said):
        compactdist.Options(**settings_from_environment({name: value}))
    monkeypatch.setenv(name, value)

    def body(rank, size):
        with pytest.raises(ValueError, match=said):
            dist.init_process_group("compactdist")

    run_ranks(body, 1, init=False)
