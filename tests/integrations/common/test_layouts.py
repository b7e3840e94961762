"""Tokens become rows and heads channels, and a call site answers only for messages it expects."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from compactdist_common import CallSites, any_of, expect

N, B, S, H, D = 2, 3, 5, 4, 8
SIZES = {"n": N, "b": B, "s": S, "h": H, "d": D, "c": H * D}


@pytest.mark.parametrize("axes", ["n b h s d", "n b s h d", "s b h d", "h s b d", "s n b h d", "b s c"])
@pytest.mark.parametrize("free", [None, "s"])
def test_rows_are_tokens_and_columns_are_features(axes: str, free: str | None) -> None:
    names = axes.split()
    x = torch.randn([SIZES[name] for name in names])
    layout = expect(axes, *(-1 if name == free else SIZES[name] for name in names))(x.numel())
    assert layout is not None
    matrices = layout.resolve(x.numel()).to_matrix(x.flatten())
    order = [name for name in ("n", "b", "s", "h", "d", "c") if name in names]
    x = x.permute([names.index(name) for name in order])
    assert torch.equal(matrices, x.reshape(N if "n" in names else 1, B * S, H * D))


@pytest.mark.parametrize(("sizes", "numel"), [((3, 4, 2, 8), 193), ((-1, 4, 2, 8), 100), ((-1, 0, 2, 8), 64)])
def test_another_size_is_not_expected(sizes: tuple[int, ...], numel: int) -> None:
    assert expect("s b h d", *sizes)(numel) is None


def test_the_first_message_of_that_size_counts() -> None:
    one, two = expect("b s c", 1, 2, 3), expect("b s c", 1, 3, 3)
    both = any_of(one, two, expect("b s c", 3, 3, 1))
    assert both(9).resolve(9).shape == (1, 3, 3)
    assert both(6).resolve(6).shape == (1, 2, 3)
    assert both(7) is None
    assert any_of()(6) is None


class Group:
    def __init__(self) -> None:
        self.told: list[str] = []

    @contextlib.contextmanager
    def key(self, name: str) -> Iterator[None]:
        self.told.append(f"into {name}")
        try:
            yield
        finally:
            self.told.append(f"out of {name}")


def test_sites_nest_and_end_with_an_error() -> None:
    sites, group = CallSites(), Group()
    six, nine = (SimpleNamespace(numel=numel) for numel in (6, 9))
    assert sites.layout_of(six) is None
    with sites.site(group, "outer", expect("b s c", 1, 2, 3)):
        with contextlib.suppress(ZeroDivisionError), sites.site(group, "inner", expect("b s c", 1, 3, 3)):
            assert sites.layout_of(nine) is not None
            assert sites.layout_of(six) is None
            raise ZeroDivisionError
        assert sites.layout_of(six) is not None
    assert sites.layout_of(six) is None
    assert group.told == ["into outer", "into inner", "out of inner", "out of outer"]
