"""The codec of an `enable` that was given none."""

from __future__ import annotations

import inspect

import pytest

import compactdist_diffusers
import compactdist_xdit
from compactdist.errors import ConfigError
from compactdist_common import AUTO, chosen_codec, chosen_option


def test_the_environment_counts_where_no_codec_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMPACTDIST_CODEC", raising=False)
    assert chosen_codec(AUTO) == "int2"
    monkeypatch.setenv("COMPACTDIST_CODEC", "int8:scales=block")
    assert chosen_codec(AUTO) == "int8:scales=block"
    assert chosen_codec("int4") == "int4"
    assert chosen_codec(None) is None
    monkeypatch.setenv("COMPACTDIST_KODEC", "int8")
    assert chosen_codec("int4") == "int4"
    with pytest.raises(ConfigError, match="did you mean COMPACTDIST_CODEC"):
        chosen_codec(AUTO)


def test_other_options_come_from_the_same_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMPACTDIST_WARMUP_STEPS", raising=False)
    assert chosen_option("warmup_steps", {}, 1) == 1
    monkeypatch.setenv("COMPACTDIST_WARMUP_STEPS", "3")
    assert chosen_option("warmup_steps", {}, 1) == 3
    assert chosen_option("warmup_steps", {"warmup_steps": 2}, 1) == 2
    monkeypatch.setenv("COMPACTDIST_WARMUP_STEPS", "many")
    with pytest.raises(ConfigError, match="COMPACTDIST_WARMUP_STEPS"):
        chosen_option("warmup_steps", {}, 1)


def test_a_preset_names_the_codec_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPACTDIST_PRESET", "small")
    assert chosen_codec(AUTO) == "binary"
    assert chosen_codec(AUTO, {"preset": "safe"}) == "int4"
    monkeypatch.setenv("COMPACTDIST_CODEC", "int8")
    assert chosen_codec(AUTO) == "int8"
    assert chosen_codec(AUTO, {"preset": "safe"}) == "int4"
    assert chosen_codec("int2", {"preset": "safe"}) == "int2"


@pytest.mark.parametrize("adapter", [compactdist_xdit, compactdist_diffusers])
def test_no_adapter_gives_a_codec_that_nobody_asked_for(adapter: object) -> None:
    assert inspect.signature(adapter.enable).parameters["codec"].default == AUTO


def test_a_preset_names_the_keyframe_too() -> None:
    assert chosen_option("keyframe", {}, None) is None
    assert chosen_option("keyframe", {"preset": "tiny"}, None) == "int4"
    assert chosen_option("keyframe", {"preset": "tiny", "keyframe": "raw"}, None) == "raw"


def test_a_target_needs_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen_codec(AUTO, {"target": "bits=1"}) == "rates"
    assert chosen_codec(AUTO, {"target": "bits=1", "preset": "small"}) == "rates"
    monkeypatch.setenv("COMPACTDIST_TARGET", "nmse_db=-30")
    assert chosen_codec(AUTO) == "rates"
    assert chosen_codec("int4") == "int4"
    monkeypatch.setenv("COMPACTDIST_CODEC", "rates:rungs=scalar")
    assert chosen_codec(AUTO) == "rates:rungs=scalar"
