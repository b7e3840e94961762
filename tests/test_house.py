"""The house keeps its rules (``tools/house.py``): arrows point one way, without circles, and functions are short."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tools import house as script
from tools.house import House, room_of

ROOT = Path(__file__).parents[1]

# What breaks a rule today. Both sets are to become empty: an entry that is no longer needed fails the tests too.


@pytest.fixture(scope="module")
def house() -> House:
    return House(ROOT)


def test_there_are_no_circles(house: House) -> None:
    assert house.circles() == []


def test_arrows_point_one_way(house: House) -> None:
    assert set(house.wrong_arrows()) == set()


def test_kernels_know_no_codec(house: House) -> None:
    found = {f"{a.path} -> {b.path}" for a, b, _ in house.arrows() if a.room == "kernels" and b.room == "codecs"}
    assert found == set()


def test_codecs_state_and_kernels_import_nothing_distributed(house: House) -> None:
    assert house.distributed_imports() == []


def test_no_function_is_too_long(house: House) -> None:
    assert set(house.long_functions()) == set()


def test_every_file_is_in_a_room(house: House) -> None:
    rooms = house.rooms()
    assert sum(files for files, _ in rooms.values()) == len(house.files)
    assert {"group", "exchange", "state", "codecs", "kernels", "observe", "testing", "cli", "integrations.xdit"} <= {
        *rooms
    }
    assert len({(a.path, b.path) for a, b, _ in house.arrows()}) > 300, "imports are not resolved any more"


def test_the_script_prints_one_json_object(
    house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "House", lambda: house)  # it takes seconds to read
    monkeypatch.setattr(sys, "argv", ["house", "--json", "-"])
    assert script.main() == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["circles"] == []
    assert printed["rooms"]["group"]["files"] > 5
    recipes = printed["recipes"]
    assert len(recipes) == 8
    for what in ("quantizer", "collective", "predictor", "metric"):
        assert 1 <= len(recipes[f"Add a {what}"]) <= 2, what


# --- the script finds what it looks for


def build(root: Path, files: dict[str, str]) -> House:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return House(root)


def test_it_finds_circles_but_not_late_or_typing_ones(tmp_path: Path) -> None:
    built = build(
        tmp_path,
        {
            "compactdist/state/__init__.py": "from compactdist.state.a import A\n",
            "compactdist/state/a.py": "import compactdist.state.b\n",
            "compactdist/state/b.py": "from .c import C\n",
            "compactdist/state/c.py": "from compactdist.state import a\n",
            "compactdist/state/late.py": "def f():\n    from compactdist.state import later\n",
            "compactdist/state/later.py": "from compactdist.state import late\n",
            "compactdist/state/typed.py": (
                "from typing import TYPE_CHECKING\n"
                "if TYPE_CHECKING:\n    from compactdist.state.typing2 import B\n"
                "else:\n    B = None\n"
            ),
            "compactdist/state/typing2.py": "from compactdist.state.typed import A\n",
        },
    )
    assert built.circles() == [[f"compactdist/state/{name}.py" for name in "abc"]]
    assert built.wrong_arrows() == []


def test_it_finds_arrows_against_the_direction(tmp_path: Path) -> None:
    upwards = {
        "compactdist/kernels/up.py": "from compactdist.codecs import Codec\n",
        "compactdist/codecs/up.py": "def f():\n    import compactdist.state.stream\n",
        "compactdist/state/up.py": "from compactdist.config import Options\n",
        "compactdist/exchange/up.py": "from compactdist.group import keys\n",
        "compactdist/exchange/looks.py": "from compactdist.observe.explain import explain\n",
        "compactdist/group/up.py": "from compactdist import wrap\n",
        "compactdist/wire.py": "from compactdist.codecs import Codec\n",
    }
    downwards = {
        "compactdist/__init__.py": "__version__ = '1'\nfrom compactdist.group.keys import wrap\n",
        "compactdist/codecs/__init__.py": "from compactdist.kernels import spec\nfrom compactdist.errors import E\n",
        "compactdist/state/stream.py": "from compactdist.wire import pack\n",
        "compactdist/config.py": "from compactdist.state import stream\nfrom compactdist import __version__\n",
        "compactdist/exchange/plan.py": "from compactdist.observe.stats import S\nimport compactdist.config\n",
        "compactdist/group/__init__.py": "",
        "compactdist/group/keys.py": "from compactdist.observe.explain import explain\nfrom ..exchange import plan\n",
        "compactdist/observe/explain.py": "from compactdist.state.stream import S\n",
        "compactdist/observe/stats.py": "from compactdist import errors\n",
        "compactdist/kernels/spec.py": "",
        "compactdist/errors.py": "",
        "integrations/xdit/adapter.py": "import compactdist\nfrom compactdist.group import keys\n",
        "tests/test_it.py": "from compactdist_xdit import adapter\n",
    }
    built = build(tmp_path, {**upwards, **downwards})
    assert [arrow.split(" -> ")[0] for arrow in built.wrong_arrows()] == sorted(upwards)
    assert built.room_arrows()["tests", "integrations.xdit"] == 1
    assert built.room_arrows()["group", "exchange"] == 1


@pytest.mark.parametrize(
    "text",
    [
        "import torch.distributed as dist\n",
        "from torch import distributed\n",
        "from torch.distributed import all_reduce\n",
        "import torch\ndef f():\n    return torch.distributed.get_rank()\n",
        "def f():\n    from compactdist import _torch\n",
        "from compactdist.group.keys import K\n",
    ],
)
def test_it_finds_distributed_imports(tmp_path: Path, text: str) -> None:
    rest = {"compactdist/_torch.py": "", "compactdist/group/keys.py": ""}
    built = build(tmp_path, {"compactdist/codecs/far.py": text, "compactdist/group/near.py": text, **rest})
    assert len(built.distributed_imports()) == 1
    assert built.distributed_imports()[0].startswith("compactdist/codecs/far.py -> ")


def test_it_finds_long_functions_and_files_outside_kernels_and_tests(tmp_path: Path) -> None:
    long = "class A:\n    def f(self):\n" + "        pass\n" * 60
    built = build(tmp_path, {f"{room}/a.py": long for room in ("compactdist/state", "compactdist/kernels", "tests")})
    assert built.long_functions() == {"compactdist/state/a.py:A.f": 61}
    assert built.long_functions(61) == {}
    assert set(built.long_files(61)) == {
        f"{room}/a.py" for room in ("compactdist/state", "compactdist/kernels", "tests")
    }
    assert built.long_files() == {}


def test_it_finds_globals_that_change(tmp_path: Path) -> None:
    text = """
import functools
KEPT, LISTED, COUNTED, SHADOWED, READ, LOCAL = {}, [], 0, {}, {}, []
kept = {}
listed: list[int] = []
counted = 0
read = {"a": 1}
shadowed = []

def change(shadowed):
    global counted
    counted += 1
    kept["a"] = 1
    listed.append(read["a"])
    shadowed.append(1)

def local():
    listed2 = []
    listed2.append(1)

@functools.lru_cache(maxsize=None)
def slow():
    return 1
"""
    built = build(tmp_path, {"compactdist/state/a.py": text})
    assert built.changed_globals() == [f"compactdist/state/a.py:{name}" for name in ("counted", "kept", "listed")]
    assert built.caches() == ["compactdist/state/a.py:slow"]


def test_it_counts_the_files_of_a_recipe(tmp_path: Path) -> None:
    page = """# Contributing
## Set up
`nothing/here.py`
## Add a codec
One file in `compactdist/codecs/`, `encode` and `make test`, then `registry.py`, and again `registry.py`.
## Add an op
`compactdist/exchange/patterns.py`
"""
    built = build(tmp_path, {"CONTRIBUTING.md": page, "compactdist/__init__.py": ""})
    assert built.recipes() == {
        "Add a codec": ["compactdist/codecs/", "registry.py"],
        "Add an op": ["compactdist/exchange/patterns.py"],
    }


def test_rooms() -> None:
    rooms = {
        "compactdist/__init__.py": "compactdist",
        "compactdist/wire.py": "wire",
        "compactdist/observe/stats.py": "observe.stats",
        "compactdist/observe/explain.py": "observe",
        "compactdist/kernels/cpu/simd/rows.py": "kernels",
        "integrations/xdit/methods/base.py": "integrations.xdit",
        "tests/state/test_store.py": "tests",
    }
    assert {path: room_of(path) for path in rooms} == rooms
