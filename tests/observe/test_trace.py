"""Trace files that others wrote: whatever their metadata holds, the error names the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from compactdist.observe.trace import Trace, TraceError
from tests.cli import kit

BAD_GROUPS = {
    "infinity": '{"a": Infinity}',
    "nan": '{"a": NaN}',
    "deep nesting": '{"a": ' + "[" * 200_000 + "]" * 200_000 + "}",
    "a deep list": "[" * 200_000 + "]" * 200_000,
    "a list": "[1, 2]",
    "a list of counts": '{"a": [2]}',
    "null": '{"a": null}',
    "a fraction": '{"a": 2.5}',
    "text": '{"a": "2"}',
    "many digits": '{"a": ' + "9" * 5000 + "}",
    "half an object": '{"a": ',
    "no json": "two",
}


@pytest.mark.parametrize("groups", BAD_GROUPS.values(), ids=BAD_GROUPS)
def test_bad_groups_name_the_file_and_the_remedy(tmp_path: Path, groups: str) -> None:
    path = kit.trace(tmp_path / "odd.safetensors", metadata={"groups": groups})
    with pytest.raises(TraceError, match=r"odd\.safetensors.*'groups' must be.*compactdist\.record"):
        Trace(path)
    result = kit.run("evaluate", path, "--codec", "int4")
    assert result.exit_code == 2
    assert "odd.safetensors" in result.output.replace("\n", "")


def test_whole_numbers_are_counts_however_they_are_written(tmp_path: Path) -> None:
    trace = Trace(kit.trace(tmp_path / "t.safetensors", metadata={"groups": '{"a": 2.0, "b": 4}'}))
    assert (trace.groups("a", 96), trace.groups("b", 64)) == (2, 4)
    for rows, site in ((97, "a"), (66, "b")):
        with pytest.raises(TraceError, match=rf"'{site}': {rows} rows"):
            trace.groups(site, rows)
