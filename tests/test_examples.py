"""The examples run as they are."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.quick import quick_for
from tests.scripts import run_script

ROOT = Path(__file__).parents[1]
XDIT = ["flux", "sd3", "pixart_alpha", "cogvideox", "wan"]


def run(example: str, *flags: str, xfuser: bool = False) -> str:
    """What an example prints on two ranks."""
    return run_script(ROOT / "examples" / f"{example}.py", *flags, timeout=110, xfuser=xfuser)


def run_by_torchrun(example: str, *flags: str) -> str:
    """The same, started as the example says."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(ROOT / "examples" / f"{example}.py"), *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_quickstart() -> None:
    shown = run_by_torchrun("quickstart")
    assert "all_gather#0" in shown
    assert "20 x all_reduce: op" in shown


def test_the_quickstart_of_the_readme(tmp_path: Path) -> None:
    """As it is written, after the names that a reader has: the tensors and the steps of their own loop."""
    written = re.search(r"```python\n(import torch\.distributed.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert written is not None
    given = """
    import torch
    timesteps = range(5)
    kv, q = torch.randn(64, 32), torch.randn(64, 32)
    out, o = torch.empty(128, 32), torch.empty(64, 32)
    """
    script = tmp_path / "quickstart.py"
    script.write_text(textwrap.dedent(given) + written[1])
    shown = run_script(script)
    assert "total: 10 compressed and 0 passed-through calls" in shown
    assert "all_gather#0" in shown
    assert "all_to_all#0" in shown


def test_any_framework() -> None:
    shown = run("any_framework")
    assert "total: 100 compressed and 0 passed-through calls" in shown
    assert float(shown.rpartition("relative error of the model: ")[2]) < 5e-3


def test_tensor_parallel() -> None:
    shown = run("tensor_parallel")
    assert f"total: {2 * 4 * 20} compressed and 0 passed-through calls" in shown
    assert 1e-6 < float(shown.rpartition("relative error of the last step: ")[2]) < 5e-3


@pytest.mark.xdit
@pytest.mark.parametrize(
    ("flags", "calls"),
    [
        (["--tiny", "flux"], 4 * 8),
        pytest.param(["--tiny", "wan", "--ulysses", "2", "--codec", "int4"], 4 * 3 * 2 * 8, marks=pytest.mark.slow),
    ],
)
def test_diffusers(flags: list[str], calls: int) -> None:
    shown = run("diffusers_context_parallel", *flags, xfuser=True)
    assert "steps: 8; requests begun: set_timesteps 1" in shown
    assert f"total: {calls} compressed and 0 passed-through calls" in shown
    assert 1e-6 < float(shown.rpartition("the uncompressed request: ")[2]) < 5e-2


@pytest.mark.xdit
@pytest.mark.parametrize("model", quick_for(XDIT[:1], XDIT))
def test_xdit(model: str) -> None:
    flags = ("--tiny", "--ring_degree", "2", "--compact_codec", "int4")
    _check_xdit(model, run(f"{model}_example", *flags, xfuser=True))


@pytest.mark.xdit
@pytest.mark.slow
def test_xdit_as_users_start_it() -> None:
    """One of them: the others begin with the same lines, in xdit_common.py."""
    flags = ("--tiny", "--ring_degree", "2", "--compact_codec", "int4")
    _check_xdit(XDIT[0], run_by_torchrun(f"{XDIT[0]}_example", *flags))


def _check_xdit(model: str, shown: str) -> None:
    calls = 3 * 2 * 8 if model == "wan" else 4 * 8
    assert f"total: {calls} compressed and 0 passed-through calls" in shown
    assert "latents (1, " in shown
    assert 1e-6 < float(shown.rpartition("the uncompressed request: ")[2].split()[0]) < 5e-2


@pytest.mark.xdit
@pytest.mark.slow
def test_xdit_without_compression() -> None:
    shown = run("flux_example", "--tiny", "--ulysses_degree", "2", xfuser=True)
    assert "compressed" not in shown
    assert "latents (1, 64, 16)" in shown


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_its_example_says_what_to_install() -> None:
    command = [sys.executable, str(ROOT / "examples" / "ray_flux_example.py"), "--ulysses_degree", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "pip install ray" in done.stderr
    assert "Traceback" not in done.stderr
