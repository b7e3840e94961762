"""Options by environment variable: codec options, switches, and variables that belong to adapters."""

from __future__ import annotations

import inspect
import logging
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import compactdist
from compactdist import codecs
from compactdist.errors import ConfigError
from compactdist.group.environment import _FIELDS, settings_from_environment, warn_overruled
from compactdist_xdit import flags
from tests.group.kit import NUMEL, data, gathered, told
from tests.launch import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


RULES = '[{"codec": "int8:scales=block", "key": "*kv*", "dtype": "bfloat16"}, {"codec": "pass", "last_step": 2}]'
LAYOUTS = '{"*kv*": {"pattern": "(n c) -> 1 n c", "c": 64}, "*": "(a) -> 1 1 a"}'


def options_from(environment):
    return compactdist.Options(**settings_from_environment(environment))


def test_a_codec_with_options():
    codec, keyframe = "int4:scales=block,block=64", "int8:scales=block,block=32"
    options = options_from({"COMPACTDIST_CODEC": codec, "COMPACTDIST_KEYFRAME": keyframe})
    assert options.default_codec == codecs.get({"id": "int4", "scales": "block", "block": 64})
    assert options.stream.keyframe == codecs.get("int8", scales="block", block=32)


@pytest.mark.parametrize("in_a_file", [False, True])
def test_policy_and_layouts(tmp_path, in_a_file):
    values = {"POLICY": RULES, "LAYOUTS": LAYOUTS}
    if in_a_file:
        for name, text in values.items():
            (tmp_path / name).write_text(text)
            values[name] = str(tmp_path / name)
    settings = settings_from_environment({f"COMPACTDIST_{name}": value for name, value in values.items()})
    assert settings["policy"] == [
        compactdist.Rule("int8:scales=block", key="*kv*", dtype=torch.bfloat16),
        compactdist.Rule("pass", last_step=2),
    ]
    assert settings["layouts"] == {
        "*kv*": compactdist.Layout("(n c) -> 1 n c", c=64),
        "*": compactdist.Layout("(a) -> 1 1 a"),
    }


@pytest.mark.parametrize("field", ["forward", "find_layout", "error_feedback"])
@pytest.mark.parametrize(
    ("text", "value"), [("1", True), ("0", False), ("true", True), ("false", False), ("True", True), ("FALSE", False)]
)
def test_switches(field, text, value):
    options = options_from({f"COMPACTDIST_{field.upper()}": text})
    assert getattr(options, field) is value
    assert options == compactdist.Options(**{field: value})


def test_error_feedback_may_be_left_to_the_order():
    assert options_from({"COMPACTDIST_ERROR_FEEDBACK": "auto"}).error_feedback is None
    with pytest.raises(ConfigError, match="COMPACTDIST_FORWARD='auto' is not one of 1, 0, true, false"):
        options_from({"COMPACTDIST_FORWARD": "auto"})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("COMPACTDIST_ERROR_FEEDBACK", "yes", "'yes' is not one of 1, 0, true, false, auto"),
        ("COMPACTDIST_FIND_LAYOUT", "2", "'2' is not one of 1, 0, true, false"),
        ("COMPACTDIST_CODEC", "int4:block", "'block' is not option=value"),
        ("COMPACTDIST_CODEC", '{"id": "int4", "block": 64}', "write 'id:option=value"),
        ("COMPACTDIST_CODEC", "int4:scales=none", "scales"),
        ("COMPACTDIST_POLICY", "[", "COMPACTDIST_POLICY='.' is not a JSON list of rules.*not valid JSON"),
        ("COMPACTDIST_POLICY", '["int8"]', "objects"),
        ("COMPACTDIST_POLICY", '[{"codec": "int8", "dtype": "Tensor"}]', "dtype is one of torch's.*'Tensor'"),
        ("COMPACTDIST_POLICY", '[{"codek": "int8"}]', "codek"),
        ("COMPACTDIST_POLICY", "/no/such/file", "No such file"),
        ("COMPACTDIST_LAYOUTS", '{"*": "(n c)"}', "has no '->'"),
        ("COMPACTDIST_LAYOUTS", '{"*": 3}', "COMPACTDIST_LAYOUTS"),
        ("COMPACTDIST_TIMEOUT", "long", "COMPACTDIST_TIMEOUT='long' is not a number"),
    ],
)
def test_a_wrong_value_says_what_is_right(name, value, said):
    with pytest.raises(ValueError, match=said):
        options_from({name: value})


def test_every_option_has_a_variable():
    options = {name for name, field in compactdist.Options.__dataclass_fields__.items() if field.init}
    named = {*inspect.signature(compactdist.wrap).parameters} - {"group", "options", "settings"}
    assert {name.lower() for name in _FIELDS} == options | named


def test_every_variable_is_in_the_table_of_the_page():
    page = (Path(__file__).parents[2] / "docs" / "concepts.md").read_text()
    assert [name for name in _FIELDS if f"`{name.lower()}`" not in page] == []


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("COMPACTDIST_XDITS", "COMPACTDIST_XDIT"),
        ("COMPACTDIST_WARMUP", "COMPACTDIST_WARMUP_STEPS"),
        ("COMPACTDIST_LAYOUT", "COMPACTDIST_LAYOUTS"),
        ("COMPACDIST_CODEC", "COMPACTDIST_CODEC"),
        ("COMPACTDISTCODEC", "COMPACTDIST_CODEC"),
    ],
)
def test_a_misspelt_name_is_an_error_that_names_the_nearest(name, nearest):
    with pytest.raises(ConfigError, match=f"environment variable {name} is unknown; did you mean {nearest}[? ]"):
        settings_from_environment({"PATH": "/bin", name: "int2"})


def test_variables_of_core_and_adapter_do_not_disturb_each_other():
    """The core must not import the adapter, so it knows the name by heart."""
    both = {"COMPACTDIST_CODEC": "int8", flags.VARIABLE: "--compact_codec int2"}
    assert options_from(both) == compactdist.Options(codec="int8")
    assert flags.arguments_from({f"COMPACTDIST_{field}": "1" for field in _FIELDS}) is None


def test_the_backend_starts_with_all_of_them():
    def body(rank, size):
        os.environ.update(
            COMPACTDIST_CODEC="int8:scales=block",
            COMPACTDIST_POLICY='[{"codec": "pass", "op": "all_to_all"}]',
            COMPACTDIST_TIMEOUT="20",
            COMPACTDIST_MIN_NUMEL="64",
            COMPACTDIST_FORWARD="false",
            COMPACTDIST_FIND_LAYOUT="0",
            COMPACTDIST_ERROR_FEEDBACK="auto",
            COMPACTDIST_XDIT="--compact_codec int2",
        )
        dist.init_process_group("compactdist")
        g = dist.group.WORLD
        for _ in range(2):
            with g.step():
                dist.all_gather_into_tensor(out := torch.empty(size * NUMEL), data(rank))
        assert (out - gathered(size)).abs().max() < 0.1
        assert g.options.default_codec == codecs.get("int8", scales="block")
        assert g.options.policy == [compactdist.Rule("pass", op="all_to_all")]
        assert g.stats().compressed_calls == 2
        dist.destroy_process_group()

    run_ranks(body, 2, init=False, timeout=40)


def test_wrap_takes_from_the_environment_what_it_is_not_given():
    def body(rank, size):
        os.environ.update(COMPACTDIST_CODEC="int4:scales=block", COMPACTDIST_ORDER="0", COMPACTDIST_MIN_NUMEL="7")
        with compactdist.wrap(order=2) as given:
            assert given.options == compactdist.Options(codec="int4:scales=block", order=2, min_numel=7)
        with compactdist.wrap(options=compactdist.Options()) as whole:
            assert whole.options == compactdist.Options()
        os.environ["COMPACTDIST_KODEC"] = "int4"
        with pytest.raises(ConfigError, match="did you mean COMPACTDIST_CODEC"):
            compactdist.wrap()

    run_ranks(body, 2, timeout=40)


@pytest.mark.parametrize("codec", ["int4", {"id": "int4"}, codecs.get("int4")], ids=repr)
def test_a_codec_in_the_place_of_the_group_is_an_error_that_says_so(codec):
    with pytest.raises(ConfigError, match=r"did you mean codec=.*[iI]nt4"):
        compactdist.wrap(codec)


def test_the_program_goes_first_and_the_log_says_so(caplog):
    environment = settings_from_environment(
        {f"COMPACTDIST_{name}": value for name, value in {"CODEC": "int4", "ORDER": "2", "MIN_NUMEL": "7"}.items()}
    )
    with caplog.at_level(logging.WARNING, logger="compactdist"):
        warn_overruled(environment, {"codec": codecs.get("int4"), "order": 2, "local": "exact"})
        assert not caplog.records
        warn_overruled(environment, {"codec": "int2", "order": 2})
        (text,) = caplog.messages
    assert text.startswith("COMPACTDIST_CODEC='int4' has no effect on this group: the program (or its adapter)")
    assert "gives codec='int2' to wrap(), which overrides the environment. Unset the variable" in text


def test_wrap_warns_of_what_it_overrules():
    def body(rank, size):
        os.environ.update(COMPACTDIST_CODEC="int4", COMPACTDIST_ORDER="2", COMPACTDIST_TIMEOUT="30")
        lines = told(logging.WARNING)
        with compactdist.wrap(codec="int2", order=2, timeout=20) as wrapped:
            assert wrapped.options.default_codec == codecs.get("int2")
        overruled = sorted(line.split("=")[0] for line in lines if "has no effect" in line)
        assert overruled == ["COMPACTDIST_CODEC", "COMPACTDIST_TIMEOUT"], lines

    run_ranks(body, 2, timeout=40)
