"""torch's default dtype and device, and autocast, are the user's: what this package computes depends on none."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import compactdist
from compactdist import codecs
from compactdist.state import ResidualDecoder, ResidualEncoder
from tests.launch import run_ranks
from tests.quick import quick_for

PACKAGE = Path(compactdist.__file__).parent
ROOT = PACKAGE.parent
FACTORIES = {"empty", "eye", "full", "linspace", "ones", "rand", "randn", "scalar_tensor", "tensor", "zeros"}
WHOLE = {"arange", "randint"}
SPECS = (*codecs.list(), "transform:bits=3,block=32", "int4:scales=block", "int4:scales=token_history")
STREAMS = ("raw", "exact"), ("int8", "int8"), ("transform", "exact")
"""Codecs of keyframes, and forms of the history."""


def _nameless(path: Path) -> list[str]:
    """Calls that make a tensor in the default dtype or on the default device."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if ast.unparse(node.func.value) != "torch" or node.func.attr not in FACTORIES | WHOLE:
            continue
        named = {argument.arg for argument in node.keywords}
        whole = node.func.attr in WHOLE or ast.unparse(node).startswith("torch.tensor([")
        if "device" not in named or ("dtype" not in named and not whole):
            found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    return found


def test_every_tensor_is_made_in_a_dtype_and_on_a_device_of_our_own():
    found = [one for path in sorted(PACKAGE.rglob("*.py")) for one in _nameless(path)]
    assert not found, "\n".join(["name dtype and device:", *found])


def _digests() -> dict[str, str]:
    """Of all frames and values of short streams."""
    made = {}
    for spec in SPECS:
        for keyframe, state in STREAMS:
            encoder = ResidualEncoder(spec, keyframe=keyframe, state=state)
            decoder = ResidualDecoder(spec, keyframe=keyframe, state=state)
            g, seen = torch.Generator().manual_seed(1), hashlib.sha256()
            x = torch.randn(66, 130, generator=g, dtype=torch.float32, device="cpu")
            for _ in range(3):
                change = torch.randn(x.shape, generator=g, dtype=torch.float32, device="cpu")
                x = x + 0.1 * change
                frame = encoder.encode(x.bfloat16())
                value = decoder.decode(frame)
                seen.update(frame.numpy().tobytes() + value.view(torch.int16).numpy().tobytes())
            made[f"{spec}, {keyframe}, {state}"] = seen.hexdigest()
    return made


@functools.cache
def _undisturbed() -> dict[str, str]:
    return _digests()


@pytest.mark.parametrize("dtype", quick_for(["bfloat16"], ["bfloat16", "float64"]))
def test_frames_and_values_are_the_same_bits_under_other_defaults(dtype):
    """In a process of its own: tables are made once, and must be right even if that happens under other defaults."""
    text = f"import torch; torch.set_default_dtype(torch.{dtype}); torch.set_default_device('meta'); " + (
        "torch.set_num_threads(1); import json; from tests.codecs.test_defaults import _digests; "
        "print(json.dumps(_digests()))"
    )
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == _undisturbed()


def test_frames_and_values_are_the_same_bits_under_autocast():
    """A model's forward, and so its collectives, often run under it; a rank may wait elsewhere."""
    alone = _undisturbed()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _digests() == alone


@pytest.mark.parametrize("spec", SPECS)
def test_a_tensor_alone_is_coded_the_same_under_autocast(spec):
    codec, x = codecs.get(spec), torch.randn(66, 130, generator=torch.Generator().manual_seed(2))
    payload = codec.encode(x)
    value = codec.decode(payload, x.shape, x.dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(codec.encode(x), payload)
        assert torch.equal(codec.decode(payload, x.shape, x.dtype), value)


def _rank(rank: int, world_size: int) -> float:
    numel = 4096
    x = [torch.randn(numel, generator=torch.Generator().manual_seed(peer)) for peer in range(world_size)]
    out, both, got = torch.empty(world_size * numel), torch.empty(numel), torch.empty(numel)
    plain, small = torch.empty(numel), torch.arange(4.0)
    if rank:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
    with compactdist.wrap(codec="transform:bits=4", min_numel=64, state_budget_bytes=1, state_offload="cpu") as dist:
        for _ in range(3):
            with dist.step():
                dist.all_gather_into_tensor(out, x[rank])
                dist.all_to_all_single(both, x[rank])
                pair = dist.P2POp(dist.isend, x[rank], 1 - rank), dist.P2POp(dist.irecv, got, 1 - rank)
                for work in dist.batch_isend_irecv(list(pair)):
                    work.wait()
                dist.all_reduce(small)
        dist.check()
        works = [dist.isend(x[rank].to(torch.int32), 1 - rank), dist.irecv(plain.view(torch.int32), 1 - rank)]
        for work in works:
            work.wait()
        dist.agree(True)
    assert torch.equal(plain.view(torch.int32), x[1 - rank].to(torch.int32))
    assert float((got - x[1 - rank]).norm()) < 0.1 * numel**0.5
    whole = torch.cat(x)
    return float((out - whole).norm() / whole.norm())


def test_ranks_with_other_defaults_agree():
    assert all(error < 0.1 for error in run_ranks(_rank))
