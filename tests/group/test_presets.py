"""Options by intent: what each preset stands for, and what overrides it."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict

import pytest

import compactdist
from compactdist import codecs
from compactdist.errors import ConfigError
from compactdist.group.environment import settings_from_environment, warn_overruled
from compactdist.presets import PRESETS, expand
from tests.group.kit import told
from tests.launch import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_names() -> None:
    assert list(PRESETS) == ["safe", "balanced", "small", "tiny", "few-step"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_valid_set_of_options(name: str) -> None:
    options, preset = compactdist.Options(**expand({"preset": name})), PRESETS[name]
    assert options.default_codec == codecs.get(preset.codec)
    keyframe = codecs.get(preset.keyframe)
    assert options.stream.keyframe == (None if keyframe.lossless else keyframe)
    assert options.stream.order == preset.order


def test_what_is_given_beside_a_preset_goes_before_it() -> None:
    expanded = expand({"preset": "small", "codec": "int3", "min_numel": 7})
    assert expanded == {**asdict(PRESETS["small"]), "codec": "int3", "min_numel": 7}
    assert expand({"codec": "int3"}) == {"codec": "int3"}


@pytest.mark.parametrize(
    ("name", "says"), [("smal", "did you mean 'small'"), ("none", "There are: safe, balanced, small, tiny, few-step")]
)
def test_an_unknown_preset_is_refused_by_name(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        expand({"preset": name})
    with pytest.raises(ConfigError, match=f"COMPACTDIST_PRESET='{name}' is not a preset.*{says}"):
        settings_from_environment({"COMPACTDIST_PRESET": name})
    with pytest.raises(ConfigError, match=says):
        compactdist.wrap(preset=name)


def test_options_and_a_preset_are_too_much() -> None:
    with pytest.raises(ConfigError, match="not both"):
        compactdist.wrap(preset="small", options=compactdist.Options())


def test_the_log_says_what_of_the_environment_has_no_effect(caplog: pytest.LogCaptureFixture) -> None:
    def said(environment: dict[str, str], given: dict[str, object]) -> list[str]:
        caplog.clear()
        named = {f"COMPACTDIST_{name}": value for name, value in environment.items()}
        with caplog.at_level(logging.WARNING, logger="compactdist"):
            warn_overruled(settings_from_environment(named), {**expand(given), **given})
        return sorted(text.split(" has no effect")[0] for text in caplog.messages)

    assert said({"PRESET": "small"}, {"preset": "small"}) == []
    assert said({"PRESET": "small"}, {"codec": "binary"}) == []
    assert said({"PRESET": "small"}, {"codec": "int4"}) == ["codec='binary' of COMPACTDIST_PRESET='small'"]
    assert said({"PRESET": "small"}, {"preset": "tiny"}) == ["COMPACTDIST_PRESET='small'"]
    assert said({"CODEC": "int4"}, {"preset": "small"}) == ["COMPACTDIST_CODEC='int4'"]


def test_wrap_and_its_environment() -> None:
    def body(rank: int, size: int) -> None:
        lines = told(logging.WARNING)
        with compactdist.wrap(preset="few-step") as wrapped:
            assert wrapped.options == compactdist.Options(**asdict(PRESETS["few-step"]))
        os.environ.update(COMPACTDIST_PRESET="tiny", COMPACTDIST_KEYFRAME="raw")
        with compactdist.wrap() as wrapped:
            assert wrapped.options == compactdist.Options("transform:bits=0.4", keyframe="raw", order="auto")
        assert not lines
        with compactdist.wrap(preset="small", order=2) as wrapped:
            assert wrapped.options == compactdist.Options("binary", keyframe="int4", order=2)
        overruled = sorted(line.split("=")[0] for line in lines if "has no effect" in line)
        assert overruled == ["COMPACTDIST_KEYFRAME", "COMPACTDIST_PRESET"], lines

    run_ranks(body, 2, timeout=60)
