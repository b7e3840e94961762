"""Compiled code by name, from a cache on disk or from Numba; what was compiled once runs without importing Numba.

A *unit* is one function of a block of numbers (``call.py``), made by a maker in one of the modules beside this one from
a key of plain values: ``address_of("rows.apply_codes", "float32", True, 2, 4)``. Its object code is kept in a folder
whose name is a digest of all sources of the kernel room, of the versions it was compiled with, and of the processor. A
change of any of these leads to another folder, so compiled code is never stale; nothing in it refers to other files,
and nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, NamedTuple

from llvmlite import binding

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from compactdist.kernels.sources import digest, digest_now

__all__ = ["address_of", "build", "folder", "has_feature"]

_SYMBOL = "compactdist_unit"
_CHECK_NBYTES = 32
_DEFINITION = re.compile(r"^(define .*) \{$", re.MULTILINE)
_STACK_ALIGNMENT = 64
"""Registers that LLVM keeps on the stack begin cache lines. It would not see to that by itself, and where one happens
to cross a page, which differs from process to process, a loop takes three times as long.
"""
_EVERYWHERE = {"memset", "memcpy", "memmove"}
"""Functions that code may call: LLVM finds these in any process. One missing name leaves *no* call with an address."""
_PATIENCE_S, _LOOK_S = 60.0, 0.02
_lock = threading.RLock()
_in_use: dict[object, _Loaded] = {}
"""All code in memory. ``functools.cache`` would not do: of two threads that ask at once it keeps what one was given,
and the other would go on to call code that is gone.
"""


class _Machine(NamedTuple):
    """What code is made for: Numba's own choices, which its environment variables may override."""

    cpu: str
    features: str
    target: Any


class _Loaded(NamedTuple):
    """Code in memory, as long as this lives."""

    engine: Any
    address: int


@cache
def _machine() -> _Machine:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    cpu, features = os.environ.get("NUMBA_CPU_NAME"), os.environ.get("NUMBA_CPU_FEATURES")
    named = cpu or binding.get_host_cpu_name()
    if features is None:
        features = "" if cpu else binding.get_host_cpu_features().flatten()
    triple = binding.Target.from_default_triple()
    target = triple.create_target_machine(
        cpu=named, features=features, opt=3, reloc="default", codemodel="jitdefault", jit=True
    )
    return _Machine(named, features, target)


def has_feature(name: str) -> bool:
    """Whether code is made for a processor with a feature, by LLVM's name."""
    return f"+{name}" in _machine().features.split(",")


@cache
def folder() -> Path | None:
    """Where compiled code is kept; ``None`` if nothing can be written anywhere."""
    machine = _machine()
    made_with = [digest(), *(f"{name} {version(name)}" for name in ("numba", "llvmlite", "numpy"))]
    made_with += [platform.python_version(), platform.machine(), machine.cpu, machine.features]
    name = "compactdist-" + hashlib.sha256("\n".join(made_with).encode()).hexdigest()[:20]
    for place in _places():
        with contextlib.suppress(OSError):
            (place / name).mkdir(parents=True, exist_ok=True)
            if os.access(place / name, os.W_OK):
                return place / name
    return None


def _places() -> list[Path]:
    """As Numba has it: where the user says, else beside the sources, else in the user's cache."""
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    if chosen:
        return [Path(chosen)]
    cache_home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return [Path(__file__).parent / "__pycache__", Path(cache_home) / "compactdist"]


@cache
def address_of(unit: str, *key: Any) -> int:
    """The address of a unit's function, which takes the address of a block and returns an integer.

    Args:
        unit: module beside this one, a dot, and the maker in it.
        key: what the maker is called with: strings, integers and booleans.
    """
    return _kept((unit, key), partial(_code_of, unit, key))


def _kept(key: object, code: Callable[[], bytes]) -> int:
    """The address of the code in memory that stands under a key, which ``code`` gives the first time."""
    with _lock:
        found = _in_use.get(key)
        if found is None:
            found = _in_use[key] = _in_memory(code())
        return found.address


def _code_of(unit: str, key: tuple[Any, ...]) -> bytes:
    """The code of a unit, from the cache or compiled now."""
    place = folder()
    name = "-".join([unit, *(str(int(part) if isinstance(part, bool) else part) for part in key)])
    path = None if place is None else place / f"{name}.o"
    data = None if path is None else _read(path)
    if data is None:
        with _turn(path):
            data = (None if path is None else _read(path)) or _made(unit, key, path)
    return data


def _made(unit: str, key: tuple[Any, ...], path: Path | None) -> bytes:
    module, maker = unit.split(".")
    data = _compiled(getattr(import_module(f"compactdist.kernels.cpu.{module}"), maker)(*key))
    if path is not None and digest_now() == digest():  # else sources were edited in the meantime
        _write(path, data)
    return data


@contextlib.contextmanager
def _turn(path: Path | None) -> Iterator[None]:
    """Wait for another process that compiles the same unit: ranks of one machine want the same units at once.

    One byte of a file is locked, which the system undoes however the process ends. Where nothing can be locked, or
    after ``_PATIENCE_S`` seconds, nobody is waited for: a unit compiled twice is the same twice.
    """
    if path is None or fcntl is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            file = stack.enter_context(open(path.parent / "lock", "ab"))
            until = time.monotonic() + _PATIENCE_S
            while not _locked(file, _byte_of(path)) and time.monotonic() < until:
                time.sleep(_LOOK_S)
        yield


def _byte_of(path: Path) -> int:
    """Which byte of the file stands for a unit."""
    return int.from_bytes(hashlib.sha256(path.name.encode()).digest()[:4], "little") >> 2


def _locked(file: IO[bytes], byte: int) -> bool:
    """Whether the byte is this process's now.

    Raises:
        OSError: this file system has no locks.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
    except BlockingIOError:
        return False
    return True


def build(function: Any) -> int:
    """Compile a function of a block that is not part of the kernel room, for this process alone."""
    return _kept(function, partial(_compiled, function))


def _compiled(function: Any) -> bytes:
    from compactdist.kernels.cpu.simd import jit, vectors

    text, name = jit.ir_of(function)
    module = binding.parse_assembly(text)
    for one in [*module.functions, *module.global_variables]:
        if not one.is_declaration:
            one.linkage = "internal"
    entry = module.get_function(name)
    entry.linkage = "external"
    entry.name = _SYMBOL
    _optimise(module)
    missing = sorted({one.name for one in module.functions if one.is_declaration} - _EVERYWHERE)
    missing = [name for name in missing if not name.startswith("llvm.")]
    if missing:
        raise RuntimeError(
            f"compiled code of {function.__qualname__} calls {', '.join(missing)}, which a process that loads it"
            " without Numba does not have: something called in there raises an error or stays a call"
        )
    if vectors.AVX2:  # with twice as many registers next to nothing is kept on the stack
        module = binding.parse_assembly(_DEFINITION.sub(rf"\1 alignstack({_STACK_ALIGNMENT}) {{", str(module)))
    code: bytes = _machine().target.emit_object(module)
    return code


def _optimise(module: Any) -> None:
    """Run LLVM's passes for speed, as Numba sets them; then drop what handles errors that no function raises."""
    tuning = binding.create_pipeline_tuning_options(speed_level=3)
    tuning.loop_vectorization = True
    tuning.slp_vectorization = False
    passes = binding.create_pass_builder(_machine().target, tuning)
    manager = passes.getModulePassManager()
    manager.add_ipsccp_pass()
    manager.add_simplify_cfg_pass()
    manager.add_global_dead_code_eliminate_pass()
    manager.add_strip_dead_prototype_pass()
    manager.run(module, passes)


def _in_memory(code: bytes) -> _Loaded:
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), _machine().target)
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return _Loaded(engine, engine.get_function_address(_SYMBOL))


def _read(path: Path) -> bytes | None:
    """What :func:`_write` wrote, if it is whole."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    code = data[_CHECK_NBYTES:]
    return code if hashlib.sha256(code).digest() == data[:_CHECK_NBYTES] else None


def _write(path: Path, code: bytes) -> None:
    """Write to a file of another name first: other processes read and write here."""
    with contextlib.suppress(OSError):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(name, path)
