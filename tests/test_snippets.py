"""The Python code of a documentation page is one program, which two CPU ranks run as it stands."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from tests.scripts import run_script

ROOT = Path(__file__).parents[1]

if any(importlib.util.find_spec(name) is None for name in ("diffusers", "xfuser", "triton", "yunchang")):
    pytest.skip("xfuser is not installed", allow_module_level=True)

END = "\ntorch.distributed.barrier()\n"


@pytest.mark.xdit
@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(("page", "snippets", "tables"), [("xdit", 4, 2), ("diffusers", 3, 3)])
def test_page(page: str, snippets: int, tables: int, tmp_path: Path) -> None:
    found = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / f"{page}.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(found) == snippets
    script = tmp_path / f"{page}_page.py"  # not diffusers.py, which would be imported for diffusers
    script.write_text("\n".join(found) + END)
    shown = run_script(script, timeout=220, xfuser=True)
    # every rank prints its tables, and nothing that they count went uncompressed
    assert len(re.findall(r"total: [1-9]\d* compressed and 0 passed-through calls", shown)) == 2 * tables
