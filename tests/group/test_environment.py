"""Options by environment variable: codec options, switches, and variables that belong to adapters."""

from __future__ import annotations

import json
import os

import pytest
import torch
import torch.distributed as dist

import compactdist
from compactdist import codecs
from compactdist.errors import ConfigError
from compactdist.group.backend import _FIELDS, options_from_environment
from compactdist_xdit import flags
from tests.group.kit import NUMEL, data, gathered
from tests.launch import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_codec_options_as_json():
    config = {"id": "int4", "scales": "block", "block": 64}
    options = options_from_environment({"COMPACTDIST_CODEC": json.dumps(config)})
    assert options == compactdist.Options(codec=config)
    assert options.default_codec == codecs.get(config) != codecs.get("int4")


@pytest.mark.parametrize("field", ["forward", "find_layout", "error_feedback"])
@pytest.mark.parametrize(
    ("text", "value"), [("1", True), ("0", False), ("true", True), ("false", False), ("True", True), ("FALSE", False)]
)
def test_switches(field, text, value):
    options = options_from_environment({f"COMPACTDIST_{field.upper()}": text})
    assert getattr(options, field) is value
    assert options == compactdist.Options(**{field: value})


def test_error_feedback_may_be_left_to_the_order():
    assert options_from_environment({"COMPACTDIST_ERROR_FEEDBACK": "auto"}).error_feedback is None
    with pytest.raises(ConfigError, match="COMPACTDIST_FORWARD='auto' is not one of 1, 0, true, false"):
        options_from_environment({"COMPACTDIST_FORWARD": "auto"})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("COMPACTDIST_ERROR_FEEDBACK", "yes", "'yes' is not one of 1, 0, true, false, auto"),
        ("COMPACTDIST_FIND_LAYOUT", "2", "'2' is not one of 1, 0, true, false"),
        ("COMPACTDIST_CODEC", '{"id": "int4"', "JSON.*delimiter"),
        ("COMPACTDIST_CODEC", '{"id": "int4", "scales": "none"}', "scales"),
        ("COMPACTDIST_CODEC", "{}", "id"),
    ],
)
def test_a_wrong_value_says_what_is_right(name, value, said):
    with pytest.raises(ValueError, match=said):
        options_from_environment({name: value})


def test_every_option_that_text_can_express_has_a_variable():
    options = {name for name, field in compactdist.Options.__dataclass_fields__.items() if field.init}
    assert {name.lower() for name in _FIELDS} == options - {"policy", "layouts"}


def test_variables_of_core_and_adapter_do_not_disturb_each_other():
    """The core must not import the adapter, so it knows the name by heart."""
    both = {"COMPACTDIST_CODEC": "int8", flags.VARIABLE: "--compact_codec int2"}
    assert options_from_environment(both) == compactdist.Options(codec="int8")
    assert flags.arguments_from({f"COMPACTDIST_{field}": "1" for field in _FIELDS}) is None
    with pytest.raises(ConfigError, match="unknown environment variable COMPACTDIST_XDITS"):
        options_from_environment({"COMPACTDIST_XDITS": "--compact_codec int2"})


def test_the_backend_starts_with_all_of_them():
    def body(rank, size):
        os.environ.update(
            COMPACTDIST_CODEC='{"id": "int8", "scales": "block"}',
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
        assert g.options.codec == {"id": "int8", "scales": "block"}
        assert g.stats().compressed_calls == 2
        dist.destroy_process_group()

    run_ranks(body, 2, init=False, timeout=40)
