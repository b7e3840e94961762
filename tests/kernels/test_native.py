"""Compiled code on disk: never stale, never half, and as much of it as one likes in one process."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from compactdist import kernels

pytest.importorskip("numba")
from compactdist.kernels.cpu import native

PACKAGE = Path(kernels.__file__).parent.parent

# Reads one channel scale of 1 and says whether it is one that is safe to multiply with: a constant of scales.py.
READ_A_SCALE = """
import sys, torch
from compactdist.kernels import digest
from compactdist.kernels.cpu import call
from compactdist.kernels.cpu.call import Work
from compactdist.kernels.cpu.native import address_of, folder
from compactdist.kernels.cpu.steps import Block
payload, room = torch.tensor([0x80, 0x3F], dtype=torch.uint8), torch.zeros(64)
slots = {call.PAYLOAD: payload.data_ptr(), call.SCRATCH: room.data_ptr(), call.SCALE_COUNT: 1, call.C_ROOM: 16}
works = {call.SECOND_PASS: Work(0, 0, address_of("codes.pack_eights"))}
block = Block(address_of("entries.decode_blocks"), slots, works)
print(block.run(block.address), "numba" in sys.modules, digest(), folder().parent)
"""


def _run(script: str, folder: Path, **environment: str) -> list[str]:
    kept = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, cwd=folder, env={**kept, "PYTHONPATH": str(folder), **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.slow
def test_a_change_in_an_imported_file_is_seen(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "compactdist", ignore=shutil.ignore_patterns("__pycache__"))
    cold, warm = _run(READ_A_SCALE, tmp_path), _run(READ_A_SCALE, tmp_path)
    assert cold[:2] == ["1", "True"]
    assert warm[:2] == ["1", "False"], "what was compiled is loaded without Numba"
    assert warm[3].startswith(str(tmp_path))
    imported = tmp_path / "compactdist/kernels/cpu/scales.py"
    changed = imported.read_text().replace("_LARGEST_SCALE = np.float32(2.0**90)", "_LARGEST_SCALE = np.float32(0.5)")
    assert changed != imported.read_text()
    imported.write_text(changed)
    after = _run(READ_A_SCALE, tmp_path)
    assert after[:2] == ["0", "True"], "the old code ran"
    assert after[2] != warm[2], "the digest is the same"


@pytest.mark.slow
def test_more_units_than_numba_would_hold(tmp_path):
    """Numba's cache forgets functions that others take as arguments after 128, and raises ReferenceError then."""
    script = """
import shutil, sys
from compactdist.kernels.cpu import native
first = native.address_of("codes.pack_eights")
numba = "numba" in sys.modules
made = native.folder() / "codes.pack_eights.o"
for i in range(200):
    shutil.copy(made, native.folder() / f"codes.pack_eights-{i}.o")
addresses = {native.address_of("codes.pack_eights", i) for i in range(200)}
print(len(addresses | {first}), native.address_of("codes.pack_trits") != 0, numba)
"""
    cache = str(tmp_path)
    assert _run(script, PACKAGE.parent, NUMBA_CACHE_DIR=cache) == ["201", "True", "True"]
    assert _run(script, PACKAGE.parent, NUMBA_CACHE_DIR=cache) == ["201", "True", "False"]


def test_half_a_file_is_not_loaded(tmp_path):
    path = tmp_path / "unit.o"
    assert native._read(path) is None
    native._write(path, b"code" * 100)
    assert native._read(path) == b"code" * 100
    assert [one.name for one in tmp_path.iterdir()] == ["unit.o"]
    path.write_bytes(path.read_bytes()[:-1])
    assert native._read(path) is None


@pytest.mark.slow
def test_a_unit_that_two_processes_want_is_compiled_by_one(tmp_path):
    script = """
import sys
from compactdist.kernels.cpu import native
print(native.address_of("codes.pack_trits") != 0, "numba" in sys.modules)
"""
    with ThreadPoolExecutor() as both:
        ends = [both.submit(_run, script, PACKAGE.parent, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2)]
        assert sorted(end.result() for end in ends) == [["True", "False"], ["True", "True"]]


@pytest.mark.parametrize("holder", ["killed", "stopped"])
def test_nobody_waits_for_a_process_that_does_not_compile(holder, monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_PATIENCE_S", 0.2)
    script = f"""
import sys, time
from pathlib import Path
from compactdist.kernels.cpu import native
with native._turn(Path({str(tmp_path / "unit.o")!r})):
    print("mine", flush=True)
    time.sleep(60)
"""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    with subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"mine\n"
            with open(tmp_path / "lock", "ab") as file:
                assert not native._locked(file, native._byte_of(tmp_path / "unit.o"))
                assert native._locked(file, native._byte_of(tmp_path / "other.o"))
            if holder == "killed":
                process.kill()
                process.wait(10)
            begun = time.monotonic()
            with native._turn(tmp_path / "unit.o"):
                waited = time.monotonic() - begun
            assert waited < 10
            assert (waited >= 0.2) == (holder == "stopped")
        finally:
            process.kill()


def test_code_that_a_process_without_numba_could_not_run_is_refused():
    def raises(block):
        if block[0]:
            raise ValueError
        return block[1]

    with pytest.raises(RuntimeError, match=r"raises calls .*numba_gil_ensure"):
        native.build(raises)


def test_code_is_kept_for_one_processor(monkeypatch, tmp_path):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    here = native._machine()
    names = []
    for machine in (here, here, here._replace(cpu="another"), here._replace(features="+another")):
        monkeypatch.setattr(native, "_machine", lambda machine=machine: machine)
        names.append(native.folder.__wrapped__().name)
    assert len(names) - len(set(names)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(set(names))


def test_the_digest_needs_no_numba():
    script = "import sys; from compactdist import kernels; print(kernels.digest(), 'numba' in sys.modules)"
    digest, numba = _run(script, PACKAGE.parent)
    assert re.fullmatch("[0-9a-f]{16}", digest)
    assert digest == kernels.digest()
    assert numba == "False"


def test_threads_that_ask_at_once_get_one_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each got code of its own, and all but one's was let go of while it was called."""
    made = []

    def in_memory(data: bytes) -> native._Loaded:
        time.sleep(0.02)
        made.append(data)
        return native._Loaded(object(), len(made))

    monkeypatch.setattr(native, "_in_use", {})
    monkeypatch.setattr(native, "_in_memory", in_memory)
    monkeypatch.setattr(native, "_read", lambda path: b"code")
    monkeypatch.setattr(native, "_compiled", lambda function: b"built")
    start = threading.Barrier(4)

    def ask(which: int) -> tuple[int, int]:
        start.wait()
        return native.address_of.__wrapped__("codes.unheard_of", 1), native.build(
            test_threads_that_ask_at_once_get_one_code
        )

    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(ask, range(4)))
    assert sorted(made) == [b"built", b"code"]
    assert len(found) == 1
    assert len(native._in_use) == 2
