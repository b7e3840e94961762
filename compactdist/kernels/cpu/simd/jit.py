"""How functions are compiled, and what of Numba they are written with; no other file imports Numba.

``inlined`` functions become part of whatever calls them and are never kept on disk: some take other functions as
arguments, which Numba's own cache can hold on to only while those live. A whole unit is compiled by :func:`ir_of`, and
``native.py`` keeps its code.

Numba would optimise each function whole, once more inside each of its callers, and make machine code of all of them.
Here a function is only simplified (``native.py`` optimises a unit once, with all that it calls inside), and machine
code is made of units alone: a unit takes half the time.
"""

from __future__ import annotations

from typing import Any

import numba
from numba import types
from numba.core import cgutils, compiler, config
from numba.core.codegen import JITCodeLibrary
from numba.core.datamodel import models
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, lower_cast, register_model

__all__ = [
    "AbstractTemplate",
    "cgutils",
    "config",
    "infer_global",
    "inlined",
    "intrinsic",
    "ir_of",
    "lower_builtin",
    "lower_cast",
    "models",
    "register_model",
    "signature",
    "types",
]


class _NoEnvironments:
    """What a part tells its Numba environment to: code without machine code has no place for one, nor need of it."""

    def set_env(self, name: str, env: Any) -> None:
        pass


class _Part(JITCodeLibrary):
    """A function's LLVM IR as Numba made it, with that of all functions it calls: for linking, not for running."""

    codegen = _NoEnvironments()

    def _optimize_final_module(self) -> None:
        pass  # a unit's is, by native.py

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._verify_declare_only_symbols()
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        self._ensure_finalized()
        return 0


class _Compiler(compiler.Compiler):
    """Numba's compiler, into parts."""

    def __init__(self, typingctx: Any, targetctx: Any, library: Any, *others: Any) -> None:
        super().__init__(typingctx, targetctx, library or _Part(targetctx.codegen(), "part"), *others)


inlined = numba.njit(
    error_model="numpy", forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, pipeline_class=_Compiler
)
"""Compiles a function that becomes part of those that call it; Python itself cannot call it."""

_OF_A_BLOCK = types.int64(types.CPointer(types.int64))


def ir_of(function: Any) -> tuple[str, str]:
    """Compile a function of a block.

    Returns:
        Its LLVM IR with all that it calls, not optimised; and the name of the C function in there.
    """
    compiled = numba.cfunc(_OF_A_BLOCK, error_model="numpy", pipeline_class=_Compiler)(function)
    return compiled.inspect_llvm(), compiled.native_name
