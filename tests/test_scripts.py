"""Scripts on several ranks: what they find, what comes back, and that one which fails is noticed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.scripts import run_script

FINDS = """
import os, sys, warnings
from beside import NAME
assert __name__ == "__main__"
warnings.warn("which pytest would make an error of")
if os.environ["RANK"] == "1":
    print(NAME, sys.argv[1:], os.environ["WORLD_SIZE"])
os.system("echo from a process of its own")
print("an error", file=sys.stderr)
sys.exit()
"""


def test_it_finds_words_ranks_and_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("NAME = 'found'\n")
    (tmp_path / "finds.py").write_text(FINDS)
    words, path = list(sys.argv), list(sys.path)
    shown = run_script(tmp_path / "finds.py", "a", "--b", timeout=60)
    assert sorted(shown.splitlines()) == ["found ['a', '--b'] 2", *2 * ["from a process of its own"]]
    assert (sys.argv, sys.path) == (words, path)
    assert "beside" not in sys.modules


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("sys.exit(3)", "SystemExit"),
        ("raise ValueError('this one')", "ValueError: this one"),
        ("os._exit(0)", "exited with status 0 and no result"),
    ],
)
def test_a_rank_that_fails_fails_the_test_with_what_it_wrote(tmp_path: Path, end: str, said: str) -> None:
    script = tmp_path / "fails.py"
    script.write_text(f"import os, sys\nprint('before it', flush=True)\nif os.environ['RANK'] == '0':\n    {end}\n")
    with pytest.raises(AssertionError, match="1 of 2 ranks failed") as failed:
        run_script(script, timeout=60)
    assert said in str(failed.value)
    assert "--- fails.py printed ---\nbefore it" in str(failed.value)
