"""These tests need the Triton kernels to run: on a GPU, or on CPU tensors with TRITON_INTERPRET=1 in the environment.

Without either they are not collected; ``tests/kernels/test_gpu.py`` runs them in a process that has the variable.
"""

from __future__ import annotations

import os
from pathlib import Path

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


if INTERPRETED:
    _patch_once()
    _leave_sums_unchecked()
