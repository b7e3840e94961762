from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest
import torch

from compactdist import codecs
from compactdist.codecs import registry
from compactdist.codecs.scalar.quantized import ScalarQuantizer
from compactdist.errors import CodecConfigError, UnknownCodecError


class Plugin(codecs.Raw):
    codec_id = "plugin"

    def __init__(self, level: int = 3) -> None:
        self.level = level

    def get_config(self):
        return {"level": self.level}


@pytest.fixture
def table(monkeypatch):
    """A copy of the table, so that what a test registers is gone after it."""
    monkeypatch.setattr(registry, "_CODECS", dict(registry._CODECS))
    return registry._CODECS


@pytest.fixture
def plugins(monkeypatch, table):
    points = [
        EntryPoint("plugin", f"{__name__}:Plugin", registry.ENTRY_POINT_GROUP),
        EntryPoint("misnamed", f"{__name__}:Plugin", registry.ENTRY_POINT_GROUP),
        EntryPoint("broken", "no_such_module_anywhere:Codec", registry.ENTRY_POINT_GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)


def test_the_five():
    assert {"binary", "int2", "int4", "int8", "raw"} <= set(codecs.list())
    assert codecs.list() == sorted(codecs.list())


def test_get_by_id_dict_and_instance(table):
    codecs.register(Plugin)
    assert codecs.get("plugin", level=5).get_config() == {"level": 5}
    assert codecs.get({"id": "plugin", "level": 6}).get_config() == {"level": 6}
    assert codecs.get({"id": "plugin"}, level=7).get_config() == {"level": 7}
    mine = Plugin(8)
    assert codecs.get(mine) is mine


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("plugin", {"level": 3}),
        ("plugin:", {"level": 3}),
        ("plugin:level=6", {"level": 6}),
        (" plugin : level = 6 , mode=fast,", {"level": 6, "mode": "fast"}),
        ("plugin:level=true,mode=a:b=c", {"level": True, "mode": "a:b=c"}),
        ("plugin:level=0.5,mode=null", {"level": 0.5, "mode": None}),
    ],
)
def test_get_by_text(table, text, config):
    """Values are JSON where they can be, else text."""

    class Optioned(Plugin):
        def __init__(self, level=3, **more):
            self.config = {"level": level, **more}

        @classmethod
        def from_config(cls, config):
            return cls(**config)

        def get_config(self):
            return self.config

    codecs.register(Optioned)
    assert codecs.get(text).get_config() == config
    assert codecs.get({"id": "plugin", **config}) == codecs.get(text)


def test_options_make_codecs_differ(table):
    codecs.register(Plugin)
    three, four = Plugin(3), Plugin(4)
    assert three != four
    assert three.fingerprint() != four.fingerprint()
    assert repr(four) == "Plugin(level=4)"
    assert len({codecs.get(codec_id).fingerprint() for codec_id in codecs.list()}) == len(codecs.list())


def test_fingerprint_is_for_ever():
    """Peers of different versions compare it, so a change here is a break of the wire."""
    assert codecs.get("int4").fingerprint() == 0xF23EA7C8
    assert codecs.get("binary").fingerprint() == 0x8539248D
    assert codecs.get("int2").fingerprint() == 0xF6B3DB7A
    assert codecs.get("int8").fingerprint() == 0xFB245EAC
    assert Plugin(3).fingerprint() == 0x6C7E8A3E


@pytest.mark.parametrize(
    ("codec", "config", "message"),
    [
        ({"level": 3}, {}, "needs the key 'id'"),
        ({"id": "raw", "level": 3}, {}, "'raw' has no option 'level'; it takes no options"),
        ({"id": "int4", "level": 3}, {}, "it takes 'block', 'centroids', 'scales'"),
        ({"id": "plugin", "level": 3}, {"level": 3}, "both"),
        ({"id": "plugin", "depth": 3}, {}, "has no option 'depth'; it takes 'level'"),
        ("int4", {"bits": 3}, "has no option 'bits'"),
        ("int4:bits=3", {}, "has no option 'bits'"),
        ("int4:block", {}, "'block' is not option=value; write 'id:option=value"),
        ("int4:=3", {}, "is not option=value"),
        ("int4:id=3", {}, "is not option=value"),
        ("int4:block=3,block=4", {}, "block is given twice"),
        ("plugin:level=3", {"level": 3}, "both"),
        ('{"id": "int4"}', {}, "write 'id:option=value"),
        (codecs.Raw(), {"level": 3}, "configured already"),
        (None, {}, "as 'int4' or 'int4:scales=block', got None"),
        (2, {}, "got 2"),
        (codecs.Raw, {}, "a codec is an id, a dict or a Codec"),
    ],
)
def test_bad_configs(table, codec, config, message):
    codecs.register(Plugin)
    with pytest.raises(CodecConfigError, match=message):
        codecs.get(codec, **config)


def test_unknown_id():
    with pytest.raises(UnknownCodecError, match=r"'int5'; known: binary, .*did you mean .*'int4'") as caught:
        codecs.get("int5")
    assert isinstance(caught.value, ValueError)
    with pytest.raises(UnknownCodecError, match=r"'zzz'; known: [^;]*$"):
        codecs.get({"id": "zzz"})


def test_reregistration(table):
    assert codecs.register(Plugin) is Plugin
    assert codecs.register(Plugin) is Plugin

    class Impostor(codecs.Raw):
        codec_id = "plugin"

    with pytest.raises(CodecConfigError, match=r"'plugin' already belongs to .*Plugin"):
        codecs.register(Impostor)
    assert type(codecs.get("plugin")) is Plugin


def test_only_codecs_can_be_registered(table):
    class Nameless(codecs.Raw):
        codec_id = ""

    for codec_id in ("", "a:b"):
        Nameless.codec_id = codec_id
        with pytest.raises(CodecConfigError, match="codec_id"):
            codecs.register(Nameless)
    with pytest.raises(CodecConfigError, match="subclass of Codec"):
        codecs.register(torch.Tensor)  # type: ignore[type-var]


@pytest.mark.usefixtures("plugins")
def test_plugins_load_when_asked_for():
    assert "plugin" in codecs.list()
    assert "plugin" not in registry._CODECS
    assert type(codecs.get("plugin")).__name__ == "Plugin"
    assert "plugin" in registry._CODECS
    with pytest.raises(CodecConfigError, match="misnamed"):
        codecs.get("misnamed")
    with pytest.raises(ModuleNotFoundError):
        codecs.get("broken")
    assert codecs.get("int4") == codecs.Int4()


def test_a_quantizer_that_kernels_cannot_be_told_of_names_itself(table):
    class Int5(ScalarQuantizer):
        codec_id = "int5"
        kind = "linear"
        bits = 5
        reach = 15.0

    with pytest.raises(CodecConfigError, match=r"codec 'int5' \(Int5\): kind='linear' takes bits of \(8,\), got 5"):
        codecs.register(Int5)().encode(torch.ones(3))
