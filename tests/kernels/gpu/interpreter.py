"""Triton's interpreter, hurried: what it works out anew for every operation of every launch is worked out once.

Every value is computed by the same operation of numpy as before. `hurry()` changes this process and its forks.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from typing import Any


def hurry() -> None:
    """Change Triton's interpreter, for as long as this process lives."""
    _patch_once()
    _leave_sums_unchecked()
    _make_types_once()
    _call_members_directly()
    _spread_by_tables()
    _rewrite_before_ranks_begin()


def _patch_once() -> None:
    """Let a Triton function that another one calls run as it is.

    The interpreter replaces the members of ``triton.language`` before every such call, though the kernel's own start
    has done it: two thirds of the time these tests would take. Triton's own functions see them under other names. A
    start replaces them once for each module, too, and puts nothing back.
    """
    from triton.runtime import interpreter

    seen: set[str] = set()
    scope = interpreter._LangPatchScope()
    patch = interpreter._patch_lang

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = self.fn.__module__
        if module.startswith("triton."):
            once(self.fn)
        return self.rewrite()(*args, **kwargs)

    def once(fn: Any) -> Any:
        if fn.__module__ not in seen:
            patch(fn)
            seen.add(fn.__module__)
        return scope

    interpreter.InterpretedFunction.__call__ = call
    interpreter._patch_lang = once


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


def _call_members_directly() -> None:
    """Unwrap what is no constant at once, and call the functions of ``triton.language`` without their checks."""
    import triton.language.core as core
    from triton.runtime import interpreter

    slow, as_they_are = core._unwrap_if_constexpr, {core.tensor, int, float, bool, str, type(None)}
    checks = core.builtin(lambda: None).__code__
    semantic = interpreter.interpreter_semantic

    def unwrap(value: Any) -> Any:
        if type(value) in as_they_are:
            return value
        return value.value if type(value) is core.constexpr else slow(value)

    def patch(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        function = member.__wrapped__ if getattr(member, "__code__", None) is checks else member

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return function(*args, **kwargs)

        scope.set_attr(obj, name, call)

    core._unwrap_if_constexpr, interpreter._patch_attr = unwrap, patch


def _spread_by_tables() -> None:
    """Look up the types that two operands take together.

    Operands of one type are neither cast nor spread: numpy spreads them where it computes. A number is prepared once
    for each type that it meets.
    """
    import numpy as np
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime.interpreter import TensorHandle

    fit, check = TritonSemantic.broadcast_impl_value, TritonSemantic.binary_op_type_checking_impl
    spread: dict[tuple[str, str], tuple[Any, Any]] = {}
    numbers: dict[tuple[Any, ...], Any] = {}
    narrow = set(tl.dtype.FP_TYPES) - {"fp32", "fp64"}

    def types_of(semantic: Any, one: Any, other: Any) -> tuple[Any, Any]:
        key = one.type.name, other.type.name
        if key not in spread:
            spread[key] = tuple(value.type for value in fit(semantic, one, other))
        return spread[key]

    def broadcast(self: Any, lhs: Any, rhs: Any) -> Any:
        if lhs.type.name == rhs.type.name:
            return lhs, rhs
        return tuple(
            value
            if value.type.name == kind.name
            else tl.tensor(TensorHandle(np.broadcast_to(value.handle.data, kind.shape), value.handle.dtype), kind)
            for value, kind in zip((lhs, rhs), types_of(self, lhs, rhs), strict=True)
        )

    def together(semantic: Any, one: Any, other: Any) -> tuple[Any, Any]:
        if one.type.name == other.type.name:
            return one, other
        types = types_of(semantic, one, other)
        return tl.tensor(one.handle, types[0]), tl.tensor(other.handle, types[1])

    def number_as(semantic: Any, number: Any, beside: Any, div_or_mod: bool) -> Any:
        """The number as a value of the same type, or None if the other operand would take another type."""
        key = (type(number), number.hex() if type(number) is float else number, beside.type.name, div_or_mod)
        if key not in numbers:
            dtype = beside.type.scalar
            common = semantic.computation_type_impl(dtype, False, semantic.to_tensor_type(number), True, div_or_mod)
            made = semantic._cast_to_computation_type(number, dtype) if common == dtype else None
            numbers[key] = None if made is None else tl.tensor(made.handle, beside.type)
        return numbers[key]

    def as_they_are(semantic: Any, one: Any, other: Any, ptr: bool, div_or_mod: bool) -> tuple[Any, Any] | None:
        if type(one) is type(other) is tl.tensor:
            dtype = one.dtype
            if dtype.is_ptr():
                return together(semantic, one, other) if ptr and other.dtype.is_int() else None
            same = dtype.name == other.dtype.name and not (div_or_mod and dtype.name in narrow)
            return together(semantic, one, other) if same else None
        if type(one) is tl.tensor and type(other) in (bool, int, float) and not one.dtype.is_ptr():
            number = number_as(semantic, other, one, div_or_mod)
            return None if number is None else (one, number)
        if type(other) is tl.tensor and type(one) in (bool, int, float) and not other.dtype.is_ptr():
            number = number_as(semantic, one, other, div_or_mod)
            return None if number is None else (number, other)
        return None

    def checked(
        self: Any,
        lhs: Any,
        rhs: Any,
        lhs_ptr: Any = False,
        rhs_ptr: Any = False,
        arithmetic: Any = True,
        div: Any = False,
    ) -> Any:
        ready = as_they_are(self, lhs, rhs, lhs_ptr, div) if arithmetic else None
        return check(self, lhs, rhs, lhs_ptr, rhs_ptr, arithmetic, div) if ready is None else ready

    TritonSemantic.broadcast_impl_value, TritonSemantic.binary_op_type_checking_impl = broadcast, checked


def _rewrite_before_ranks_begin() -> None:
    """Rewrite all kernels before this process forks for the first time, so that no rank does it for itself."""
    from triton.runtime.interpreter import InterpretedFunction

    import compactdist.kernels.gpu as package

    done: list[str] = []

    def rewrite() -> None:
        if done:
            return
        done.extend(module.name for module in pkgutil.iter_modules(package.__path__))
        for name in done:
            module = importlib.import_module(f"{package.__name__}.{name}")
            for value in list(vars(module).values()):  # a rewrite adds to them
                if isinstance(value, InterpretedFunction):
                    value.rewrite()

    os.register_at_fork(before=rewrite)
