"""Layout hints: einops' notation, made concrete, and undone exactly."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compactdist import kernels
from compactdist.errors import LayoutError
from compactdist.state import Layout, blocks, plain
from tests.state import kit


@st.composite
def patterns(draw):
    """A pattern over up to six axes in any order, with its sizes."""
    names = draw(st.permutations(["a", "b", "head", "s", "d_0", "kv"]))[: draw(st.integers(1, 6))]
    sizes = {name: draw(st.integers(1, 4)) for name in names}
    order = draw(st.permutations(names))
    cuts = sorted(draw(st.lists(st.integers(0, len(order)), min_size=2, max_size=2)))
    terms = [order[: cuts[0]], order[cuts[0] : cuts[1]], order[cuts[1] :]]
    shown = []
    for term in terms:
        if not term:
            shown.append(draw(st.sampled_from(["1", "()"])))
        elif len(term) == 1 and draw(st.booleans()):
            shown.append(term[0])
        else:
            shown.append(f"({' '.join(term)})")
    left = " ".join(names)
    pattern = f"{left if draw(st.booleans()) else f'({left})'} -> {' '.join(shown)}"
    missing = draw(st.none() | st.sampled_from(names))
    return pattern, names, sizes, terms, missing


@given(patterns())
def test_matrix_is_the_permutation_the_pattern_says(case):
    pattern, names, sizes, terms, missing = case
    given_sizes = {name: size for name, size in sizes.items() if name != missing}
    numel = math.prod(sizes.values())
    view = Layout(pattern, **given_sizes).resolve(numel)
    flat = torch.arange(numel)
    order = [names.index(name) for term in terms for name in term]
    shape = tuple(math.prod(sizes[name] for name in term) for term in terms)
    expected = flat.view([sizes[name] for name in names]).permute(order).reshape(shape)
    assert view.shape == shape
    assert torch.equal(view.to_matrix(flat), expected)
    assert torch.equal(view.to_flat(expected), flat)


def test_heads_joined():
    layout = Layout("(kv b h s d) -> kv (b s) (h d)", kv=2, b=1, h=4, d=32)
    flat = torch.randn(2 * 4 * 34 * 32)
    matrix = layout.resolve(flat.numel()).to_matrix(flat)
    assert torch.equal(matrix, flat.view(2, 1, 4, 34, 32).permute(0, 1, 3, 2, 4).reshape(2, 34, 128))


@given(numel=st.integers(0, 1000))
def test_blocks(numel):
    view = blocks(numel)
    flat = torch.arange(1, numel + 1)
    matrix = view.to_matrix(flat)
    assert view.groups == 1
    assert view.channels == min(128, max(numel, 1))
    assert math.prod(view.shape) - numel < 128
    assert torch.equal(matrix.reshape(-1)[:numel], flat)
    assert not matrix.reshape(-1)[numel:].any()
    assert torch.equal(view.to_flat(matrix), flat)


def test_plain():
    assert plain(24, 2, 3).shape == (2, 4, 3)
    for groups, channels in ((5, 3), (2, 5), (0, 3), (2, 0), (-2, 3)):
        with pytest.raises(LayoutError):
            plain(24, groups, channels)


@pytest.mark.parametrize(
    ("pattern", "sizes", "says"),
    [
        ("a b c", {}, "no '->'"),
        ("(a b) -> a b", {"a": 2}, "groups, rows and channels"),
        ("(a b c d) -> a b c d", {"a": 2}, "groups, rows and channels"),
        ("(a b) -> 1 a a", {"a": 2}, "once on each side"),
        ("(a b) -> 1 1 a", {"a": 2}, "once on each side"),
        ("(a a) -> 1 a a", {}, "once on each side"),
        ("(a b) -> 1 a c", {"a": 2}, "once on each side"),
        ("(a b) -> 1 a b", {"c": 2}, "no axis c"),
        ("(a b) -> 1 a b", {"a": 0}, "positive"),
        ("(a b) -> 1 a b", {"a": -1}, "positive"),
        ("(a b) -> 1 a b", {"a": 2.0}, "positive"),
        ("(a b c) -> a b c", {"a": 2}, "all of"),
        ("(a (b c)) -> a b c", {"a": 2, "b": 2}, "axis names only"),
        ("(a, b) -> 1 a b", {"a": 2}, "axis names only"),
        ("(a 3) -> 1 a 3", {}, "axis names only"),
    ],
)
def test_malformed(pattern, sizes, says):
    with pytest.raises(LayoutError, match=says):
        Layout(pattern, **sizes)


@pytest.mark.parametrize(
    ("sizes", "numel"), [({"a": 4}, 10), ({"a": 4}, 0), ({"a": 4, "b": 3}, 24), ({"a": 4, "b": 3}, 11)]
)
def test_wrong_number_of_elements(sizes, numel):
    with pytest.raises(LayoutError, match=f"{numel} elements"):
        Layout("(a b) -> 1 a b", **sizes).resolve(numel)


def test_equality_and_fingerprint():
    one, same = Layout("(a b) -> 1 a b", a=2, b=3), Layout(" (a  b) ->  1 a b ", b=3, a=2)
    assert one == same
    assert hash(one) == hash(same)
    assert one.hint == same.hint != 0
    assert repr(one) == "Layout('(a b) -> 1 a b', a=2, b=3)"
    for other in (Layout("(a b) -> 1 a b", a=2), Layout("(a b) -> 1 b a", a=2, b=3)):
        assert other != one
        assert other.hint != one.hint


@pytest.mark.parametrize("which", ["reference", "cpu"])
@pytest.mark.parametrize(
    "codec",
    [
        "binary",
        "ternary",
        "int2",
        "int4",
        "int8",
        "fp8",
        "int4:scales=block",
        "int4:scales=token_history",
        "topk",
        "lowrank",
    ],
)
def test_rows_of_one_channel_that_lie_apart(codec, which):
    """A matrix that is no view of consecutive memory, of sizes that one way or the other of coding takes."""
    for numel in (3200, 160000):
        with kernels.use(which):
            encoder, decoder = kit.pair(codec=codec, layout=Layout("(s h) -> h s 1", h=8))
            for seed in range(3):
                x = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
                assert decoder.decode(encoder.encode(x)).shape == x.shape
                kit.check_in_step(encoder, decoder)
