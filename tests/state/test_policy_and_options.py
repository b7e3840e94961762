"""Rules, policy functions, options and their fingerprint."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
import torch

from compactdist import CallInfo, Layout, Options, Rule, Rules, codecs
from compactdist.config import Settings
from compactdist.errors import CodecConfigError, ConfigError, UnknownCodecError
from compactdist.state import ResidualEncoder


def call(key="cond/blocks.3.attn/all_gather#0", op="all_gather", dtype=torch.bfloat16, numel=4096, step=5):
    return CallInfo(key, op, dtype, numel, step)


@pytest.mark.parametrize(
    ("conditions", "matches"),
    [
        ({}, True),
        ({"key": "*attn*"}, True),
        ({"key": "cond/*"}, True),
        ({"key": "*#0"}, True),
        ({"key": "*norm*"}, False),
        ({"key": "COND/*"}, False),
        ({"key": "attn"}, False),
        ({"op": "all_gather"}, True),
        ({"op": "send"}, False),
        ({"dtype": torch.bfloat16}, True),
        ({"dtype": torch.float32}, False),
        ({"min_numel": 4096}, True),
        ({"min_numel": 4097}, False),
        ({"max_numel": 4096}, True),
        ({"max_numel": 4095}, False),
        ({"first_step": 5}, True),
        ({"first_step": 6}, False),
        ({"last_step": 5}, True),
        ({"last_step": 4}, False),
        ({"key": "*attn*", "op": "all_gather", "first_step": 1, "last_step": 9, "min_numel": 1}, True),
        ({"key": "*attn*", "op": "all_gather", "first_step": 1, "last_step": 4, "min_numel": 1}, False),
    ],
)
def test_conditions(conditions, matches):
    assert Rule("int8", **conditions).matches(call()) is matches
    assert Rules(Rule("int8", **conditions))(call()) == (codecs.get("int8") if matches else None)


def test_the_first_match_decides():
    rules = Rules(Rule("pass", key="*norm*"), Rule("int8", last_step=3), Rule("binary"))
    assert rules(call(key="norm", step=0)) == "pass"
    assert rules(call(step=3)) == codecs.get("int8")
    assert rules(call(step=4)) == codecs.get("binary")


@pytest.mark.parametrize(
    "wrong",
    [{"between": (3,)}, {"between": 3}, {"min_numel": 5, "max_numel": 4}, {"first_step": 3, "last_step": 2}],
)
def test_impossible_rules(wrong):
    with pytest.raises(ConfigError):
        Rule("int8", **wrong)
    with pytest.raises(UnknownCodecError):
        Rule("int5")


def keep_all(info):
    return None


def pass_all(info):
    return "pass"


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"codec": "int5"}, UnknownCodecError),
        ({"codec": {"id": "int8", "nonsense": 1}}, CodecConfigError),
        ({"warmup_steps": -1}, ConfigError),
        ({"warmup_steps": 1.5}, ConfigError),
        ({"order": 3}, ConfigError),
        ({"order": 2, "damping": 2}, ConfigError),
        ({"damping": 0.5}, ConfigError),
        ({"order": 0, "damping": 0.0}, ConfigError),
        ({"error_feedback": True, "order": 0}, ConfigError),
        ({"local": "mine"}, ConfigError),
        ({"min_numel": -1}, ConfigError),
        ({"min_numel": 1.0}, ConfigError),
        ({"min_numel": True}, ConfigError),
        ({"state_budget_bytes": -1}, ConfigError),
        ({"state_budget_bytes": "1 GB"}, ConfigError),
        ({"sample_errors_every": -1}, ConfigError),
        ({"state": "bfloat16"}, ConfigError),
        ({"policy": ["int8"]}, ConfigError),
        ({"policy": [Rule("int8"), 3]}, ConfigError),
        ({"layouts": {"*": "(a b) -> 1 a b"}}, ConfigError),
        ({"layouts": 3}, ConfigError),
    ],
)
def test_impossible_options(settings, error):
    with pytest.raises(error):
        Options(**settings)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"policy": "int8"},
            r"policy='int8' is a codec: codec='int8' gives it to every site, policy=Rule\('int8', key=",
        ),
        ({"policy": codecs.get("int8")}, r"codec=Int8\(\) gives it to every site"),
        ({"keyframe": "none"}, "keyframe='none': no codec has the id 'none'.*With 'raw' keyframes are not coded"),
    ],
)
def test_the_error_says_what_was_meant(settings, told):
    with pytest.raises((ConfigError, UnknownCodecError), match=told):
        Options(**settings)


def test_equal_options_have_equal_fingerprints():
    def make():
        return Options(
            codec="int4",
            policy=[Rule("pass", key="*norm*")],
            layouts={"*": Layout("(a b) -> 1 a b", a=4)},
            order=2,
            damping=0.25,
        )

    assert make().fingerprint() == make().fingerprint()
    assert all(isinstance(v, str) for v in make().fingerprint().values())


@pytest.mark.parametrize(
    "change",
    [
        {"codec": "int4"},
        {"policy": Rule("int8")},
        {"policy": [Rule("int8"), Rule("int4")]},
        {"policy": keep_all},
        {"policy": pass_all},
        {"warmup_steps": 2},
        {"order": 2},
        {"order": 2, "damping": 0.25},
        {"error_feedback": False},
        {"local": "exact"},
        {"min_numel": 1},
        {"layouts": {"*": Layout("(a b) -> 1 a b", a=4)}},
        {"layouts": {"x": Layout("(a b) -> 1 a b", a=4)}},
        {"layouts": keep_all},
        {"find_layout": False},
        {"state": "int8"},
        {"state": "fp8"},
        {"keyframe": "raw"},
        {"keyframe": "int4"},
    ],
    ids=lambda change: ",".join(f"{name}={getattr(value, '__name__', value)}" for name, value in change.items()),
)
def test_every_option_that_changes_frames_changes_the_fingerprint(change):
    others = [{}, {"layouts": {"*": Layout("(a b) -> 1 a b", a=5)}}, {"policy": Rule("int8", key="a")}]
    for other in others:
        assert Options(**change).fingerprint() != Options(**other).fingerprint()


def test_an_option_at_its_default_is_not_in_the_fingerprint():
    """Groups of versions without the option go on agreeing; keyframes were the tensors' own bytes in some."""
    assert Options().fingerprint()["streams"] == (
        "StreamConfig(order=1, error_feedback=None, warmup_steps=1, find_layout=True, keyframe=Int8())"
    )
    assert "damping=0.5" in Options(order=2).fingerprint()["streams"]
    assert "state='int8'" in Options(state="int8").fingerprint()["streams"]


def test_local_matters_of_a_rank_are_not_in_the_fingerprint():
    assert Options().fingerprint() == Options(sample_errors_every=3).fingerprint()
    assert Options().fingerprint() != Options(state_budget_bytes=7).fingerprint()


def test_lossless_groups_keep_no_history():
    assert Options(codec="raw").stream.order == 0
    assert Options(codec="raw", policy=Rule("pass")).stream.order == 0
    assert Options(codec="raw", policy=Rule("int8")).stream.order == 1
    assert Options(codec="raw", policy=keep_all).stream.order == 1
    assert Options(codec="int2", order=2).stream.order == 2
    assert Options(codec="raw", order=2, damping=0.25).stream.order == 0


def test_layout_hints_by_glob_and_by_function():
    first, second = Layout("(a b) -> 1 a b", a=4), Layout("(a b) -> 1 a b", a=8)
    find = Options(layouts={"*kv*": first, "*": second}).layout_function
    assert find(call(key="l3.kv/send#0")) is first
    assert find(call(key="q")) is second
    assert Options(layouts={"kv": first}).layout_function(call(key="q")) is None
    assert Options(layouts=keep_all).layout_function is keep_all
    assert Options().layout_function is None


@pytest.mark.parametrize("x", [[1.0, 2.0], None, 3])
def test_what_is_no_tensor_is_refused_by_a_stand_alone_stream(x):
    with pytest.raises(ConfigError, match=rf"encode\(\) takes a tensor, got {type(x).__name__}"):
        ResidualEncoder("int4").encode(x)


@pytest.mark.parametrize(
    ("conditions", "said"),
    [
        ({"dtype": "bf16"}, "dtype is one of torch's, or its name, such as 'bfloat16'; got 'bf16'"),
        ({"dtype": 16}, "got 16"),
        ({"first_step": "3"}, "first_step is a whole number from 0 on, got '3'"),
        ({"last_step": 2.5}, "last_step is a whole number from 0 on or None, got 2.5"),
        ({"min_numel": -5}, "min_numel is a whole number from 0 on, got -5"),
        ({"max_numel": True}, "max_numel is a whole number"),
        ({"key": None}, "key is a glob over keys"),
    ],
)
def test_a_rule_that_could_never_mean_what_it_says_is_refused(conditions, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        Rule("int8", **conditions)


def test_a_dtype_may_be_named():
    assert Rule("int8", dtype="bfloat16") == Rule("int8", dtype=torch.bfloat16)


def test_the_keywords_of_wrap_are_the_options():
    assert set(Settings.__annotations__) == {one.name for one in fields(Options) if one.init} - {"codec"}
