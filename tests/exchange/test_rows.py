"""Parts of an output are kept while the caller keeps the output, and never for longer."""

from __future__ import annotations

import weakref

import pytest
import torch

from compactdist.exchange.plan import Rows


def parts_of(rows: Rows, output: torch.Tensor, size: int = 2) -> list[torch.Tensor]:
    return rows.kept(output) or rows.of(output, size)


def written(rows: Rows, output: torch.Tensor, size: int = 2) -> bool:
    """Whether what is written to the parts arrives in the output, each in its place."""
    for rank, part in enumerate(parts_of(rows, output, size)):
        with torch.inference_mode():
            part.fill_(rank + 1)
    flat = output.reshape(size, -1)
    return all(bool((flat[rank] == rank + 1).all()) for rank in range(size))


@pytest.mark.parametrize("shape", [(12,), (4, 3), (2, 2, 3)])
def test_the_same_output_is_divided_once(shape):
    rows, output = Rows(), torch.zeros(shape)
    assert rows.kept(output) is None
    for _ in range(2):
        parts_of(rows, output)
    first, second = rows.kept(output), rows.kept(output)
    assert all(a is b for a, b in zip(first, second, strict=True))
    assert first is not second  # callers take their own part out of the list
    assert written(rows, output)


def test_another_output_is_divided_anew():
    rows, one, other = Rows(), torch.zeros(12), torch.zeros(12)
    for output in (one, one, other, one, other, other, other):
        output.zero_()
        assert written(rows, output)
    assert rows.kept(one) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.resize_(24),
        lambda x: x.set_(torch.zeros(12)),
        lambda x: x.set_(torch.zeros(24)[12:]),
        lambda x: x.untyped_storage().resize_(4 * 24),
        lambda x: setattr(x, "data", torch.zeros(12)),
    ],
    ids=["resize", "set", "set to a part", "storage", "data"],
)
def test_an_output_whose_form_was_changed_is_divided_anew(change):
    rows, output = Rows(), torch.zeros(12)
    for _ in range(3):
        assert written(rows, output)
    change(output)
    output.zero_()
    assert written(rows, output)


def test_a_matrix_that_was_transposed_in_place_is_not_taken_for_its_former_self():
    rows, output = Rows(), torch.zeros(4, 3)
    for _ in range(3):
        parts_of(rows, output)
    output.t_()
    assert rows.kept(output) is None


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_an_output_that_the_caller_drops_is_gone_at_once(calls):
    rows, output = Rows(), torch.zeros(12)
    memory = weakref.ref(output.untyped_storage())
    gone = weakref.ref(output)
    for _ in range(calls):
        parts_of(rows, output)
    del output
    assert gone() is None
    assert memory() is None
    other = torch.zeros(12)
    assert rows.kept(other) is None
    assert written(rows, other)


def test_the_parts_go_with_the_plan():
    rows, output = Rows(), torch.zeros(12)
    for _ in range(3):
        parts_of(rows, output)
    part = weakref.ref(rows.kept(output)[0])
    assert part() is not None
    rows = Rows()
    del output
    assert part() is None


def test_autograd_notices_a_write_to_a_part_as_to_the_output():
    rows, output = Rows(), torch.zeros(12)
    for _ in range(3):
        before = output._version
        assert written(rows, output)
        assert output._version == before + 2
    assert not any(part.requires_grad for part in rows.kept(output))
