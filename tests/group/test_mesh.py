"""wrap_mesh: dimensions of a DeviceMesh swapped in place and put back."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import compactdist
from compactdist import _torch
from compactdist.errors import ClosedGroupError, ConfigError
from tests.group.kit import Counted, close, data
from tests.launch import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:torch.*")

OPTIONS = {"codec": "int8", "min_numel": 16}


def gather(mesh, dim, rank):
    """All-gather along a mesh dimension; whether it gave what the ranks of that dimension sent."""
    out = funcol.all_gather_tensor(data(rank), 0, (mesh, dim)) + 0
    ranks = dist.get_process_group_ranks(mesh.get_group(dim))
    return close(out, torch.cat([data(r) for r in ranks]))


def test_one_dimension_of_two_is_swapped_and_put_back():
    def body(rank, size):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
        plain = mesh.get_group("cp")
        groups = compactdist.wrap_mesh(mesh, "cp", **OPTIONS)
        assert list(groups) == ["cp"]
        g = groups["cp"]
        assert mesh.get_group("cp") is g
        assert mesh.get_group(1) is g
        assert g.inner is plain
        assert not isinstance(mesh.get_group("dp"), compactdist.CompressedProcessGroup)
        for _ in range(2):
            g.step()
            with Counted(g) as counted:
                assert gather(mesh, 1, rank)
                assert gather(mesh, 0, rank)  # the other dimension: not ours
                assert gather(mesh["cp"], 0, rank)  # sliced after the swap: ours
            assert (counted.compressed, counted.passed) == (2, {})
        whole = data(0, 64 * 32).view(64, 32)
        g.step()
        with Counted(g) as counted:
            x = distribute_tensor(whole, mesh, [Replicate(), Shard(0)])
            assert close(x.redistribute(placements=[Replicate(), Replicate()]).to_local(), whole)
        assert counted.compressed >= 1
        g.close()
        assert mesh.get_group("cp") is plain
        assert gather(mesh, 1, rank)
        assert g.stats().compressed_calls >= 5
        return g.group_name

    names = run_ranks(body, 4, pg_timeout=15)
    assert names[0] == names[1] != names[2] == names[3]


def test_several_dimensions_and_unwrap_mesh():
    def body(rank, size):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        plain = [mesh.get_group(0), mesh.get_group(1)]
        groups = compactdist.wrap_mesh(mesh, ["b", 0], **OPTIONS)
        assert list(groups) == ["b", "a"]
        assert [mesh.get_group(0), mesh.get_group(1)] == [groups["a"], groups["b"]]
        for dim, name in enumerate("ab"):
            groups[name].step()
            with Counted(groups[name]) as counted:
                assert gather(mesh, dim, rank)
            assert counted.compressed == 1
        compactdist.unwrap_mesh(mesh)
        assert [mesh.get_group(0), mesh.get_group(1)] == plain
        compactdist.unwrap_mesh(mesh)  # nothing to do
        assert gather(mesh, 0, rank)
        again = compactdist.wrap_mesh(mesh, -1, **OPTIONS)
        assert mesh.get_group("b") is again["b"]

    run_ranks(body, 4, pg_timeout=15)


def test_a_mesh_without_names():
    def body(rank, size):
        mesh = init_device_mesh("cpu", (size,))
        groups = compactdist.wrap_mesh(mesh, 0, **OPTIONS)
        assert list(groups) == [0]
        groups[0].step()
        assert gather(mesh, 0, rank)
        assert groups[0].stats().compressed_calls == 1

    run_ranks(body, pg_timeout=15)


def test_wrong_dimensions_change_nothing():
    def body(rank, size):
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("a", "b"))
        plain = [mesh.get_group(0), mesh.get_group(1)]
        for wrong in ("c", 2, -3, ["a", "c"], [0.5]):
            with pytest.raises(ConfigError, match="no dimension"):
                compactdist.wrap_mesh(mesh, wrong)
        with pytest.raises(ConfigError, match="wrapped already"):
            compactdist.wrap_mesh(mesh, ["a", "b", "a"])
        assert [mesh.get_group(0), mesh.get_group(1)] == plain
        compactdist.wrap_mesh(mesh, "a")
        with pytest.raises(ConfigError, match="wrapped already"):
            compactdist.wrap_mesh(mesh, "a")

    run_ranks(body, 1)


def test_compiled_code_finds_the_group_of_a_sliced_mesh():
    """Compiled code looks groups up in the mesh that a slice was cut from."""

    def body(rank, size):
        mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("dp", "cp"))["cp"]
        (group,) = compactdist.wrap_mesh(mesh, 0, **OPTIONS).values()

        @torch.compile(backend="eager", fullgraph=True)
        def gathered(x):
            return funcol.all_gather_tensor(x * 2, 0, mesh.get_group()) + 1

        for _ in range(2):
            group.step()
            with Counted(group) as counted:
                assert close(gathered(data(rank)), torch.cat([2 * data(r) + 1 for r in range(size)]))
            assert counted.compressed == 1
        group.close()
        if _torch.VERSION < (2, 12):  # it compiles the name in and does not see that the mesh has another group
            with pytest.raises(ClosedGroupError):
                gathered(data(rank))
            torch._dynamo.reset()
        assert torch.equal(gathered(data(rank)), torch.cat([2 * data(r) + 1 for r in range(size)]))

    run_ranks(body, timeout=60, pg_timeout=30)
