"""How functions are compiled, and what of Numba they are written with; no other file imports Numba.

``inlined`` functions become part of whatever calls them and are never kept on disk: some take other functions as
arguments, which Numba's own cache can hold on to only while those live. A whole unit is compiled by :func:`ir_of`, and
``native.py`` keeps its code.
"""

from __future__ import annotations

from typing import Any

import numba
from numba import types
from numba.core import cgutils, config
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

inlined = numba.njit(error_model="numpy", forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""Compiles a function that becomes part of those that call it; Python itself cannot call it."""

_OF_A_BLOCK = types.int64(types.CPointer(types.int64))


def ir_of(function: Any) -> tuple[str, str]:
    """Compile a function of a block; its optimised LLVM IR, and the name of the C function in there."""
    compiled = numba.cfunc(_OF_A_BLOCK, error_model="numpy")(function)
    return compiled.inspect_llvm(), compiled.native_name
