"""What kernels are told of a codec: they import none, and any class that describes itself gets them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from compactdist import codecs, kernels
from compactdist.codecs.scalar.quantized import ScalarQuantizer
from compactdist.kernels import steps_for, use
from compactdist.kernels.spec import MatrixView, QuantizerSpec
from tests.codecs import kit

ROOM = Path(kernels.__file__).parent
CPU = torch.device("cpu")


class Uneven(ScalarQuantizer):
    """A quantizer from outside: its own levels, and nothing registered."""

    codec_id = "uneven"
    kind = "nearest"
    bits = 3
    magnitudes = (0.1, 0.5, 1.4, 2.5)


class WithZero(Uneven):
    """Zero is a level, so that nothing widens or holds the scale."""

    codec_id = "with_zero"
    magnitudes = (0.0, 0.5, 1.4, 2.5)


class Eight(Uneven):
    """Levels whose borders are far apart and near to one another."""

    codec_id = "eight"
    bits = 4
    magnitudes = (0.0, 0.01, 0.05, 0.2, 0.6, 1.5, 3.0, 9.0)


class Coarse(ScalarQuantizer):
    """Integers from -15 to 15."""

    codec_id = "coarse"
    kind = "linear"
    bits = 8
    reach = 15.0


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def test_kernels_import_nothing_above_them():
    ours = {name for path in ROOM.rglob("*.py") for name in _imports(path) if name.startswith("compactdist")}
    assert ours
    assert {name for name in ours if not name.startswith("compactdist.kernels")} == set()


def test_numba_is_imported_in_one_place():
    having = {
        path.relative_to(ROOM).as_posix()
        for path in ROOM.rglob("*.py")
        if any(name.split(".")[0] == "numba" for name in _imports(path))
    }
    assert having == {"cpu/simd/jit.py"}


@pytest.mark.parametrize("scales", ["token_channel", "block"])
@pytest.mark.parametrize("make", [Uneven, WithZero, Coarse])
def test_a_codec_from_outside_gets_the_kernels(make, scales):
    codec, view = make(scales=scales), MatrixView(70 * 136, 1, 70, 136)
    g = torch.Generator().manual_seed(0)
    x, base = (torch.randn(view.numel, generator=g) for _ in range(2))
    made = {}
    for name in ("reference", "cpu"):
        with use(name):
            steps, out = steps_for(codec.spec, view, torch.float32, CPU), torch.empty_like(x)
            assert (steps is None) == (name == "reference")
            payload = kit.encode_residual(codec, x, (base,), view, out)
            held = base.clone()
            kit.decode_residual(codec, payload, (held,), view, held)
            assert torch.equal(held, out)
            made[name] = payload, out
    assert all(map(torch.equal, *made.values()))
    kit.check_codec(codec, kit.sample("laplace", (70, 136)))


def test_a_spec_says_what_it_takes():
    with pytest.raises(ValueError, match="kind='cosine'"):
        QuantizerSpec("cosine", 2)
    with pytest.raises(ValueError, match="4 magnitudes, ascending from 0"):
        QuantizerSpec("nearest", 3, (0.1, 0.5))
    with pytest.raises(ValueError, match="4 magnitudes, ascending from 0"):
        QuantizerSpec("nearest", 3, (0.1, 0.5, 0.4, 1.0))
    with pytest.raises(ValueError, match="takes bits of"):
        QuantizerSpec("linear", 4, reach=7.0)
    with pytest.raises(ValueError, match="reach=0"):
        QuantizerSpec("linear", 8)
    assert hash(codecs.get("int4").spec) == hash(codecs.get("int4").spec)
    assert codecs.get("int4", scales="block", centroids="minmax").spec is None
    assert codecs.get("binary", scales="rank").spec is None
