"""Threads, memory and imports of the CPU kernels."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from compactdist import codecs
from compactdist.errors import NonFiniteError
from compactdist.kernels import use
from compactdist.kernels.cpu import call, native
from compactdist.kernels.cpu.call import Work
from compactdist.kernels.cpu.steps import Block
from compactdist.kernels.threads import team
from compactdist.state import ResidualDecoder, ResidualEncoder, StateStore, StreamConfig
from compactdist.state.matrix_view import plain
from tests.codecs import kit

pytest.importorskip("numba")
CODECS = ("binary", "int2", "int4", "int8")
CUT = plain(2 * 301 * 264, 2, 264)


@functools.cache
def _marking() -> int:
    """The address of a loop that counts every element of the parts that a thread gets, and notes their bounds."""
    from compactdist.kernels.cpu.simd.slots import longs_at, next_part

    work = call.FIRST_PASS

    def body(args):
        seen, bounds = longs_at(args, call_x), longs_at(args, call_out)
        lo, hi = next_part(args, work)
        part = 0
        while lo < hi:
            bounds[2 * part], bounds[2 * part + 1] = lo, hi
            part += 1
            for i in range(lo, hi):
                seen[i] += 1
            lo, hi = next_part(args, work)
        return 0

    call_x, call_out = call.X, call.OUT
    return native.build(body)


def _mark(count: int, elements: int, backwards: bool = False) -> tuple[torch.Tensor, list[list[int]]]:
    """How often each of ``count`` things was met, and the parts, if it was one thread."""
    team.prepare()
    seen, bounds = torch.zeros(count, dtype=torch.int64), torch.zeros(2 * count, dtype=torch.int64)
    slots = {call.X: seen.data_ptr(), call.OUT: bounds.data_ptr(), call.TEAM: team.address}
    slots[call.THREADS] = torch.get_num_threads()
    work = Work(count, elements, _marking(), backwards)
    block = Block(native.address_of("entries.first_pass"), slots, {call.FIRST_PASS: work})
    assert block.run(block.address) == 1
    return seen, bounds.view(-1, 2)[: block.slots[call.FIRST_PASS + call.PARTS]].tolist()


@pytest.fixture
def threads():
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.mark.parametrize("codec_id", CODECS)
def test_no_byte_depends_on_the_number_of_threads(codec_id, threads):
    codec = codecs.get(codec_id)
    base = torch.randn(CUT.numel).bfloat16()
    x = base + torch.randn(CUT.numel).bfloat16() / 8
    results = []
    for count in (1, 2, 3, 5):
        threads(count)
        out = torch.empty_like(x)
        results.append((kit.encode_residual(codec, x, (base,), CUT, out), out))
    for payload, out in results[1:]:
        assert torch.equal(payload, results[0][0])
        assert torch.equal(out, results[0][1])


def test_callers_on_several_threads(threads):
    threads(2)
    codec = codecs.get("int2")
    inputs = [torch.randn(CUT.numel, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    expected = [kit.encode_residual(codec, x, (), CUT) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda x: kit.encode_residual(codec, x, (), CUT), inputs))
    assert all(map(torch.equal, got, expected))


def test_a_forked_child_makes_threads_of_its_own(threads):
    """OpenMP's do not survive a fork, and a child that used them would hang."""
    threads(2)
    codec, x = codecs.get("int2"), torch.randn(CUT.numel)
    expected = kit.encode_residual(codec, x, (), CUT)
    assert (_mark(10, 1 << 20)[0] == 1).all()  # compiles it
    child = os.fork()
    if child == 0:
        before = torch.get_num_threads
        torch.get_num_threads = lambda: 2
        seen, _ = _mark(10, 1 << 20)
        torch.get_num_threads = before
        os._exit(0 if (seen == 1).all() else 1)
    assert _ended_well(child, 60)
    assert torch.equal(kit.encode_residual(codec, x, (), CUT), expected)


def _ended_well(child: int, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status == 0
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


@pytest.mark.parametrize("openmp", [True, False])
def test_parts_cover_the_range(threads, openmp):
    if not openmp:
        team.use_pool()
    try:
        for count in (1, 2, 3, 7, 100):
            for wanted in (1, 2, 5):
                threads(wanted)
                assert (_mark(count, 1 << 22)[0] == 1).all()
    finally:
        team.address = 0
        team.prepare()


def test_parts_are_small_and_go_backwards_if_asked(threads):
    threads(1)
    assert _mark(10, 100)[1] == [[0, 10]], "nothing to share"
    parts = [[0, 2], [2, 5], [5, 7], [7, 10]]
    assert _mark(10, 4 * call.PART_ELEMENTS)[1] == parts
    assert _mark(10, 4 * call.PART_ELEMENTS, True)[1] == parts[::-1]


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("codec_id", CODECS)
def test_a_hundred_steps_take_no_more_memory(codec_id):
    encoder, decoder = ResidualEncoder(codec_id), ResidualDecoder(codec_id)
    x = torch.randn(1 << 18)
    for step in range(110):
        decoder.decode(encoder.encode(x * (1 + step / 100)))
        if step == 10:
            before = _resident()
    assert _resident() - before < 4 * x.nbytes


def test_streams_of_a_store_share_one_spare():
    store = StateStore(StreamConfig(find_layout=False), "group", None)
    codec, x = codecs.get("int2"), torch.randn(1 << 15)
    encoders = [store.site(f"site{i}").encoder(0) for i in range(5)]
    for step in range(4):
        for encoder in encoders:
            staged = encoder.stage(x * (step + 1), codec, keyframe=step == 0)
            held = encoder.predictor.base
            before = None if held is None else held.clone()
            repeated = encoder.stage(x * (step + 1), codec, keyframe=step == 0)
            assert torch.equal(repeated.frame, staged.frame), "a staged frame changed the state"
            assert held is None or torch.equal(held, before)
            del held
            encoder.commit(staged)
    assert sum(store.state_bytes().values()) == 5 * x.nbytes
    assert store.spares.nbytes == x.nbytes
    store.reset()
    assert store.spares.nbytes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("codec_id", CODECS)
def test_frames_are_those_of_the_reference(codec_id, order, dtype):
    frames: dict[str, list[torch.Tensor]] = {}
    for kernels in ("reference", "cpu"):
        torch.manual_seed(1)
        encoder, decoder = ResidualEncoder(codec_id, order=order), ResidualDecoder(codec_id, order=order)
        x = torch.randn(3, 70, 136)
        frames[kernels] = []
        with use(kernels):
            for step in range(6):
                x = x + 0.1 * torch.randn_like(x)
                value = x.to(dtype)
                if step in (3, 4) and dtype != torch.float16:
                    value = value.sign() * (3e38 if step == 3 else -3e38)  # and back: differences no float32 holds
                frame = encoder.encode(value)
                frames[kernels] += [frame, decoder.decode(frame).view(torch.uint8).reshape(-1)]
                assert order == 0 or torch.equal(encoder.state, decoder.state)
            bad = x.to(dtype).clone()
            bad[0, 0, 0] = torch.nan
            with pytest.raises(NonFiniteError, match="stand-alone stream"):
                encoder.encode(bad)
            frames[kernels].append(encoder.encode(x.to(dtype)))
    assert all(map(torch.equal, frames["reference"], frames["cpu"]))


def test_numba_is_loaded_only_when_it_is_needed():
    script = (
        "import sys, compactdist, torch; from compactdist import codecs; "
        "codecs.get('int2').decode(codecs.get('int2').encode(torch.randn(4, 64)), (4, 64), torch.float32); "
        "assert 'numba' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_without_numba_the_reference_runs_and_says_so_once():
    script = """
import sys, logging
sys.modules["numba"] = None
import torch
from compactdist import codecs
from compactdist.kernels.spec import MatrixView
seen = []
handler = logging.Handler()
handler.emit = lambda record: seen.append(record.getMessage())
logging.getLogger("compactdist").addHandler(handler)
logging.getLogger("compactdist").setLevel(logging.INFO)
session = codecs.get("int2").open(MatrixView(1 << 16, 1, 1 << 9, 128), torch.float32, torch.device("cpu"))
payload = torch.empty(session.payload_nbytes, dtype=torch.uint8)
for _ in range(3):
    session.encode(torch.randn(1 << 16), (), torch.empty(1 << 16), payload)
assert len(seen) == 1 and "Numba" in seen[0], seen
"""
    subprocess.run([sys.executable, "-c", script], check=True)
