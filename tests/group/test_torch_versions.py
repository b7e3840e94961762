"""Versions of torch: nothing that one of them adds to ProcessGroup goes round the wrapper unnoticed."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from datetime import timedelta
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch.distributed import distributed_c10d as c10d

import compactdist
from compactdist import _torch
from compactdist.errors import ConfigError
from tests.group.kit import GLOO_HAS_ALL_TO_ALL, NUMEL, close, data, exchanged, since, told
from tests.launch import run_ranks

ROOT = Path(__file__).resolve().parents[2]

INHERITED = {
    **dict.fromkeys(("BackendType", "CUSTOM", "GLOO", "MPI", "NCCL", "UCC", "UNDEFINED", "XCCL"), "names of backends"),
    **dict.fromkeys(("_pybind11_conduit_v1_", "boxed", "unbox", "_id", "_backend_id"), "about the C++ object itself"),
    **dict.fromkeys(("rank", "size"), "told to the C++ object when it was made"),
    **dict.fromkeys(("_register_backend", "_set_default_backend"), "how the inner group's backends are adopted"),
    "use_pg_for_symm_mem_rendezvous": "a switch of all groups",
}
"""Methods of ProcessGroup that a wrapped group leaves as they are, in any version of torch, and why."""

NOT_FROM_CPP = {
    **dict.fromkeys(("getRank", "getSize"), "told to the C++ object when it was made"),
    **dict.fromkeys(
        ("splitGroup", "mergeRemoteGroup"), "Python callers reach split_group and merge_remote_group first"
    ),
}
"""Methods that torch's trampoline would call from C++ and a wrapped group need not have, and why."""


def own_names() -> set[str]:
    """What the wrapped group's classes define before ProcessGroup's turn comes."""
    classes = compactdist.CompressedProcessGroup.__mro__
    return {name for cls in classes[: classes.index(dist.ProcessGroup)] for name in vars(cls)}


def test_every_method_of_process_group_is_ours_or_left_for_a_reason():
    of_torch = {name for name in dir(dist.ProcessGroup) if not name.startswith("__")}
    assert of_torch - own_names() == INHERITED.keys() & of_torch


def test_every_method_that_cpp_code_looks_for_is_ours_or_left_for_a_reason():
    """torch's C++ code finds overrides by the names in its trampoline, which its headers show."""
    folder = Path(torch.__file__).parent / "include/torch/csrc/distributed/c10d"
    (header,) = folder.rglob("PyProcessGroup.hpp")
    text = re.sub(r"//.*", "", header.read_text())
    by_macro = re.findall(r"ProcessGroup, /\* Parent class \*/\s*(\w+),? /\* Name", text)
    by_name = re.findall(r'get_override\(\s*static_cast<const ProcessGroup\*>\(this\),\s*"(\w+)"', text)
    looked_for = {*by_macro, *by_name}
    assert {"allgather", "broadcast", "send", "recv"} <= looked_for
    assert looked_for - own_names() == NOT_FROM_CPP.keys()


def test_an_untested_version_is_named_once(monkeypatch):
    def body(rank, size):
        lines = told(logging.WARNING)
        compactdist.wrap().close()
        assert lines == []
        monkeypatch.setattr(_torch, "VERSION", (2, 10))
        _torch.warn_untested.cache_clear()
        for _ in range(2):
            compactdist.wrap().close()
            dist.destroy_process_group(dist.new_group(backend="compactdist"))
        return lines

    ((line,),) = run_ranks(body, 1)
    checked = "2.11, 2.12, 2.13, 2.14"
    assert line == f"torch {torch.__version__} is untested with compactdist, whose tests run on torch {checked}"


def test_names_without_a_call_are_the_inner_groups_or_refused():
    def body(rank, size):
        g = compactdist.wrap(codec="int8", min_numel=64)
        cpu = torch.device("cpu")
        assert g.get_backend(cpu) is g.get_backend(device=cpu) is g.inner._get_backend(cpu)
        assert g.get_backend() == g.get_backend(g.inner) == "gloo"
        other = dist.new_group()
        for group, changed in ((None, g.inner), (other, other)):
            g.set_timeout(timedelta(seconds=77), *([] if group is None else [group]))
            assert changed._get_backend(cpu).options._timeout == timedelta(seconds=77)
        assert g.supports_reconfigure is False
        for name, more in {
            "register_pre_hook": (0, print),
            "register_post_hook": (0, print),
            "get_reconfigure_handle": (),
            "reconfigure": (None,),
        }.items():
            with pytest.raises(ConfigError, match=rf"{name}\(\) of a wrapped group is refused: .*inner"):
                getattr(g, name)(*more)

    run_ranks(body, 1)


@since(2, 14, "hooks and windows of groups")
def test_hooks_and_windows_of_torch_2_14_are_the_inner_groups():
    def body(rank, size):
        g = compactdist.wrap(codec="int8", min_numel=64)
        assert g.supports_window == g.inner.supports_window
        for name, more in (("register_abort_hook", (1, print)), ("unregister_abort_hook", (1,)), ("new_window", ())):
            told = []
            for group in (g.inner, g):  # gloo has neither
                with pytest.raises(RuntimeError, match="gloo") as info:
                    getattr(group, name)(*more)
                told.append(str(info.value))
            assert told[0] == told[1]
        assert g._engine.stats.passed_table()["new_window", "op"][0] == 1
        c10d._add_ephemeral_timeout_for_all_pgs(timedelta(seconds=5))

    run_ranks(body, 1)


@pytest.mark.skipif(_torch.VERSION >= (2, 14), reason="this torch has gather_single")
def test_a_function_that_this_torch_lacks_is_named():
    def body(rank, size):
        g = compactdist.wrap()
        with pytest.raises(AttributeError, match=r"torch\.distributed has no gather_single in torch 2\."):
            g.gather_single(torch.ones(4), torch.empty(4), dst=0)

    run_ranks(body, 1)


@pytest.mark.skipif(GLOO_HAS_ALL_TO_ALL, reason="gloo of this torch has all_to_all of lists")
def test_what_gloo_lacks_a_wrapped_group_compresses_or_refuses_alike():
    def body(rank, size):
        g = compactdist.wrap(codec="int8", min_numel=64)
        outs = [torch.full((NUMEL // size,), torch.nan) for _ in range(size)]
        for group in (g.inner, g):  # without a step it passes through
            with pytest.raises(RuntimeError, match="Backend gloo does not support alltoall"):
                dist.all_to_all(outs, list(data(rank).chunk(size)), group=group)
        for _ in range(2):
            g.step()
            dist.all_to_all(outs, list(data(rank).chunk(size)), group=g)
            assert close(torch.cat(outs), exchanged(rank, size))
        assert g.stats().compressed_calls == 2

    run_ranks(body, 2, pg_timeout=20)


@since(2, 14, "group ranks in functional collectives")
def test_functional_point_to_point_names_ranks_of_the_group():
    """Before, torch handed the global rank to the group."""

    def body(rank, size):
        sub = dist.new_group([1, 2])
        if rank == 0:
            return None
        g = compactdist.wrap(sub, "int8", min_numel=64)
        out = torch.full((NUMEL,), torch.nan)
        g.step()
        if rank == 1:
            funcol.wait_tensor(funcol.isend_inplace(data(rank), 2, group=g))
        else:
            funcol.wait_tensor(funcol.irecv_inplace(out, 1, group=g))
            assert close(out, data(1))
        return g.stats().compressed_calls

    assert run_ranks(body, 3, pg_timeout=20) == [None, 1, 0]  # a send counts once, at its sender


def entry_point() -> EntryPoint:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    ((name, value),) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][
        "torch.distributed.backends"
    ].items()
    return EntryPoint(name, value, "torch.distributed.backends")


def test_the_entry_point_registers_the_backend():
    point = entry_point()
    assert point.name == "compactdist"
    point.load()()
    assert point.name in dist.Backend.backend_list


@since(2, 14, "backends by entry point")
def test_the_backend_name_needs_no_import(tmp_path):
    point = entry_point()
    installed = tmp_path / "compactdist-0.dist-info"  # as an installation leaves it
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: compactdist\nVersion: 0\n")
    (installed / "entry_points.txt").write_text(f"[{point.group}]\n{point.name} = {point.value}\n")
    program = f"""
import sys, torch.distributed as dist
dist.init_process_group("compactdist", init_method="file://{tmp_path}/store", rank=0, world_size=1)
print(type(dist.group.WORLD).__name__, dist.get_backend())
dist.destroy_process_group()
"""
    paths = [str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["CompressedProcessGroup", "compactdist"]
