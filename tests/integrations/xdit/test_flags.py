"""The adapter's flags, its environment variable and its launcher."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import compactdist
from compactdist_xdit import add_cli_args, flags, options_from
from compactdist_xdit.__main__ import main


def parsed(*words: str) -> dict[str, Any] | None:
    return options_from(add_cli_args(argparse.ArgumentParser()).parse_args(words))


def test_flags_become_arguments_of_enable() -> None:
    assert parsed() is None
    assert parsed("--compact_codec", "int2") == {"codec": "int2"}
    assert parsed("--compact_codec", "int4:scales=block", "--compact_order", "2") == {
        "codec": "int4:scales=block",
        "order": 2,
    }
    assert parsed("--compact_codec", "int2", "--compact_keyframe", "raw") == {"codec": "int2", "keyframe": "raw"}
    assert parsed("--parallel_method", "patch") == {"codec": None, "parallel_method": "patch"}
    assert parsed("--compact_codec", "int2", "--compact_routes", "ring,cfg") == {"codec": "int2", "routes": "ring,cfg"}


def test_flags_without_a_codec_are_refused() -> None:
    with pytest.raises(ValueError, match="--compact_order: no effect without --compact_codec"):
        parsed("--compact_order", "1")


def test_steps_of_a_method_without_it_are_refused() -> None:
    for others in ((), ("--compact_codec", "int2"), ("--parallel_method", "patch")):
        with pytest.raises(ValueError, match=r"--method_warmup_steps 2: no effect without --parallel_method distri"):
            parsed("--method_warmup_steps", "2", *others)
    assert parsed("--parallel_method", "distrifusion", "--method_warmup_steps", "2") == {
        "codec": None,
        "parallel_method": "distrifusion",
        "method_warmup_steps": 2,
    }


def test_policy_file(tmp_path: Path) -> None:
    file = tmp_path / "policy.json"
    file.write_text(json.dumps([{"codec": "int8", "dtype": "bfloat16"}, {"codec": "pass", "key": "*out*"}]))
    options = parsed("--compact_codec", "int2", "--compact_policy", str(file))
    assert options is not None
    assert options["policy"] == [
        compactdist.Rule("int8", dtype=torch.bfloat16),
        compactdist.Rule("pass", key="*out*"),
    ]
    for text in ("{}", '[{"codek": "int2"}]', '[{"codec": "int2", "dtype": "bfloat17"}]', "nonsense"):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"--compact_policy .*policy\.json: "):
            flags.read_policy(file)


def test_a_preset_or_a_target_needs_no_codec() -> None:
    assert parsed("--compact_preset", "small") == {"codec": "auto", "preset": "small"}
    given = parsed("--compact_target", "nmse_db=-30", "--compact_codec", "rates:rungs=scalar", "--compact_order", "1")
    assert given == {"codec": "rates:rungs=scalar", "target": "nmse_db=-30", "order": 1}


def test_environment() -> None:
    assert flags.arguments_from({}) is None
    found = flags.arguments_from({"COMPACTDIST_XDIT": "--compact_codec int2 --compact_explain"})
    assert found is not None
    assert (found.compact_codec, found.compact_explain) == ("int2", True)


@pytest.mark.parametrize("name", ["COMPACTDIST_XDITT", "COMPACTDIST_XDTI", "COMPACTDIST_XDIT_CODEC", "COMPACTDISTXDIT"])
def test_a_misspelt_variable_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is unknown; did you mean .*COMPACTDIST_XDIT"):
        flags.arguments_from({name: "--compact_codec int2", "PATH": "/bin"})


@pytest.mark.parametrize("value", ["--compact_codek int2", "int2", "--compact_order many"])
def test_a_misspelt_value_is_an_error(value: str) -> None:
    with pytest.raises(ValueError, match="COMPACTDIST_XDIT"):
        flags.arguments_from({"COMPACTDIST_XDIT": value})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["script.py"], "nothing to do"),
        (
            ["script.py", "--compact_codek", "int2"],
            "unknown flag --compact_codek; there are --compact_codec, --compact_pr",
        ),
        (["script.py", "--compact_order", "1"], "no effect without --compact_codec"),
        (["script.py", "--compact_codec", "in2"], "argument --compact_codec: "),
        (["script.py", "--compact_codec", "int4:scale=block"], "argument --compact_codec: codec 'int4' has no option"),
        (["script.py", "--compact_keyframe", "row"], "argument --compact_keyframe: "),
        (["script.py", "--compact_target", "nmse=-30"], "argument --compact_target: target is nmse_db="),
        (["script.py", "--compact_preset", "smal"], "argument --compact_preset: there is no preset 'smal'"),
        (["script.py", "--compact_routes", "rink"], "argument --compact_routes: routes must be among"),
    ],
)
def test_launcher_refuses(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(words)
    assert message in capsys.readouterr().err


SCRIPT = """
import sys
from compactdist_harness.cpu import xdit as xdit_on_cpu
xdit_on_cpu.install()
import torch
from xfuser import xFuserArgs
from xfuser.config import FlexibleArgumentParser
from xfuser.core.distributed import get_runtime_state
from xfuser.model_executor.pipelines.register import xFuserPipelineWrapperRegister
from compactdist_harness.tiny import build

assert __name__ == "__main__"
args = xFuserArgs.add_cli_args(FlexibleArgumentParser()).parse_args()
engine_config, _ = xFuserArgs.from_cli_args(args).create_config()
engine_config.runtime_config.dtype = torch.float32
plain, call = build("flux", steps=4)
pipe = xFuserPipelineWrapperRegister.get_class(plain)(pipeline=plain, engine_config=engine_config)
pipe(**call)
get_runtime_state().destroy_distributed_env()
"""


@pytest.mark.xdit
@pytest.mark.slow
@pytest.mark.timeout(200)
def test_an_unmodified_script_runs_compressed(tmp_path: Path) -> None:
    pytest.importorskip("yunchang")
    script = tmp_path / "user_script.py"
    script.write_text(SCRIPT)
    # xfuser is made to run on this machine before the launcher imports it, as a GPU would let it run
    start = tmp_path / "start.py"
    start.write_text(
        "from compactdist_harness.cpu import xdit; xdit.install()\nfrom compactdist_xdit.__main__ import main; main()"
    )
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(start), str(script), "--model", "tiny", "--ring_degree", "2", "--attention_backend", "SDPA_FLASH"]
    done = subprocess.run(
        [*command, "--compact_codec", "int4", "--compact_explain"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "LOG_LEVEL": "error"},
        timeout=180,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    # 4 layers, 4 steps, on each rank
    assert done.stderr.count("total: 16 compressed and 0 passed-through calls") == 2, done.stderr[-3000:]
