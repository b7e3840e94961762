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


if INTERPRETED:
    from tests.kernels.gpu.interpreter import hurry

    hurry()
