"""These tests need the Triton kernels to run: on a GPU, or on CPU tensors with TRITON_INTERPRET=1 in the environment.

Without either they are not collected; ``tests/kernels/test_gpu.py`` runs them in a process that has the variable.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The interpreter computes in numpy, which remarks on what floats do anyway.
    quiet = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(quiet)


def _patch_once() -> None:
    """Let a Triton function that another one calls run as it is.

    The interpreter replaces the members of ``triton.language`` before every such call, though the kernel's own start
    has done it: two thirds of the time these tests would take. Triton's own functions see them under other names.
    """
    from triton.runtime import interpreter

    seen: set[str] = set()

    def call(self, *args, **kwargs):
        module = self.fn.__module__
        if module.startswith("triton.") and module not in seen:
            interpreter._patch_lang(self.fn)
            seen.add(module)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def _leave_sums_unchecked() -> None:
    """Compute no sum and product of integers a second time in 64 bits.

    The interpreter does so to find overflows, and then asserts only where kernels are debugged: a third of the time.
    """
    from triton.runtime import interpreter

    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


def _make_types_once() -> None:
    """Describe each type of the interpreter once.

    It works out the element type, the shape and the name of a block anew for every value of every operation, which
    are many more than the types that there are.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    blocks: dict[Any, dict[str, Any]] = {}
    shapes: dict[Any, tuple[Any, Any]] = {}
    numpy_types: dict[str, Any] = {}
    make_block, make_tensor, numpy_type = tl.block_type.__init__, tl.tensor.__init__, interpreter._get_np_dtype

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(one.value if type(one) is tl.constexpr else one for one in shape))
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = self.__dict__
        self.__dict__ = blocks[key]

    def tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name not in shapes:
            make_tensor(self, handle, type)
            shapes[type.name] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[type.name]

    def numpy_type_of(dtype: Any) -> Any:
        found = numpy_types.get(dtype.name)
        if found is None:
            found = numpy_types[dtype.name] = numpy_type(dtype)
        return found

    tl.block_type.__init__, tl.tensor.__init__ = block, tensor
    interpreter._get_np_dtype = numpy_type_of


def _compare_equal_shapes_at_once() -> None:
    """Take two blocks of one shape as they are: most operations have such, and comparing them takes several objects."""
    from triton.language.semantic import TritonSemantic

    fit = TritonSemantic.broadcast_impl_value

    def broadcast(self: Any, lhs: Any, rhs: Any) -> Any:
        one, other = lhs.type, rhs.type
        if one.is_block() and other.is_block() and one.shape.values == other.shape.values:
            return lhs, rhs
        return fit(self, lhs, rhs)

    TritonSemantic.broadcast_impl_value = broadcast


if INTERPRETED:
    _patch_once()
    _leave_sums_unchecked()
    _make_types_once()
    _compare_equal_shapes_at_once()
