"""Print how the house is built: ``python -m tools.house [--json FILE]``.

Rooms with their files and lines, who imports whom, circles, arrows against the direction, long functions and files,
mutable module globals, and how many files each recipe of CONTRIBUTING.md touches. Sources are parsed, never imported.
``tests/test_house.py`` holds the house to its rules.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("compactdist", "integrations", "tests", "benchmarks", "tools")
"""What is parsed; an adapter's folder ``integrations/NAME`` is imported as ``compactdist_NAME``."""

LEAVES = ("errors", "wire", "_torch", "observe.stats", "kernels.spec", "kernels.sections")
"""Anyone may import them; they import nothing of the house but each other."""

HEIGHT = {
    "kernels": 0,
    "codecs": 1,
    "state": 2,
    "policy": 3,
    "config": 3,
    "presets": 3,
    "exchange": 4,
    "observe": 5,
    "group": 6,
    "compactdist": 7,  # __init__.py, the public names
    "testing": 8,
    "integrations.common": 8,
    "integrations": 9,
    "integrations.harness": 10,
    "cli": 11,
    "benchmarks": 12,
    "tools": 13,
    "tests": 14,
}
"""An arrow goes down, or stays in its room. ``integrations`` stands for every adapter that has no line of its own."""

OBSERVERS = frozenset({"group", "compactdist", "cli", "testing", "integrations", "benchmarks", "tools", "tests"})
"""Who may import observe (other than observe.stats)."""

LOCAL_ROOMS = ("kernels", "codecs", "state")
"""Rooms that import nothing distributed."""

LONG_FUNCTION = 60
LONG_FILE = 500
_CHANGES = frozenset(
    (
        "add",
        "append",
        "clear",
        "discard",
        "extend",
        "insert",
        "pop",
        "popitem",
        "popleft",
        "remove",
        "setdefault",
        "update",
    )
)


@dataclass
class Import:
    """One import: from file to file of the house, or to a module outside.

    Attributes:
        line: where it stands.
        target: path of a file of the house, or a dotted name of another package's.
        late: in a function, so that importing the file does not follow it.
        typing: for type checkers only.
    """

    line: int
    target: str
    late: bool
    typing: bool


@dataclass
class File:
    """One source file.

    Attributes:
        path: from the root, with ``/``.
        room: see :func:`room_of`.
        lines: of the file.
        imports: all of them.
        functions: qualified name to (line, number of lines).
        changed_globals: module globals that code of this file changes, ``global`` statements included; of the package
            and its adapters only.
        caches: functions whose results the module keeps (``functools.cache``, ``lru_cache``), likewise.
    """

    path: str
    room: str
    lines: int
    imports: list[Import] = field(default_factory=list)
    functions: dict[str, tuple[int, int]] = field(default_factory=dict)
    changed_globals: list[str] = field(default_factory=list)
    caches: list[str] = field(default_factory=list)


class House:
    """All files under a root, parsed.

    Args:
        root: folder that holds ``compactdist`` and the rest.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        paths = sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py"))
        self.known = {path.relative_to(root).as_posix() for path in paths}
        self.files = {name: self._parse(name) for name in sorted(self.known)}

    def _parse(self, name: str) -> File:
        text = (self.root / name).read_text()
        tree = ast.parse(text, name)
        file = File(name, room_of(name), len(text.splitlines()))
        for node, late, typing in _imports(tree):
            for target in self._targets(name, node):
                file.imports.append(Import(node.lineno, target, late, typing))
        file.functions = dict(_functions(tree))
        if _is_shipped(name):  # nobody asks it of others, and it takes longer than the rest
            file.changed_globals = sorted(_changed_globals(tree))
            file.caches = sorted(_caches(tree))
        return file

    def _targets(self, name: str, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            base = node.module or ""
            if node.level:
                package = [*name.split("/")[: -node.level], *([base] if base else [])]
                base = ".".join(package)
            # `from package import name`: the submodule of that name if there is one, else the package
            modules = [
                joined
                if self._file_of(joined := f"{base}.{alias.name}") or base == "torch" or alias.name == "__version__"
                else base
                for alias in node.names
            ]
        for module in dict.fromkeys(modules):
            if module == "compactdist.__version__":
                continue  # a string, there before the package imports anything
            yield self._file_of(module) or module

    def _file_of(self, module: str) -> str | None:
        head, *rest = module.split(".")
        folder = head.replace("compactdist_", "integrations/", 1)
        stem = "/".join([folder, *rest])
        return next((path for path in (f"{stem}.py", f"{stem}/__init__.py") if path in self.known), None)

    def arrows(self, *, typing: bool = False) -> Iterator[tuple[File, File, Import]]:
        """From file to file, each import once; those for type checkers only if ``typing``."""
        for file in self.files.values():
            for found in file.imports:
                target = self.files.get(found.target)
                if target is not None and target is not file and found.typing == typing:
                    yield file, target, found

    def rooms(self) -> dict[str, tuple[int, int]]:
        """Room to (files, lines)."""
        found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for file in self.files.values():
            found[file.room][0] += 1
            found[file.room][1] += file.lines
        return {room: (files, lines) for room, (files, lines) in sorted(found.items())}

    def room_arrows(self) -> Counter[tuple[str, str]]:
        """(importing room, imported room) to the number of imports between files."""
        return Counter((a.room, b.room) for a, b, _ in self.arrows() if a.room != b.room)

    def circles(self) -> list[list[str]]:
        """Files that import each other while they are imported, in rings of more than one; should be none."""
        graph: dict[str, set[str]] = {path: set() for path in self.files}
        for a, b, found in self.arrows():
            if not found.late:
                graph[a.path].add(b.path)
        return sorted(sorted(ring) for ring in _strongly_connected(graph) if len(ring) > 1)

    def wrong_arrows(self) -> list[str]:
        """Imports against the direction, as ``importing file -> imported file``; should be none."""
        wrong = {f"{a.path} -> {b.path}" for a, b, _ in self.arrows() if not _may_import(a.room, b.room)}
        return sorted(wrong)

    def distributed_imports(self) -> list[str]:
        """Where kernels, codecs or state reach for something distributed; should be none."""
        forbidden = ("compactdist/_torch.py", "compactdist/exchange/", "compactdist/group/")
        wrong = set()
        for file in self.files.values():
            if file.room.split(".")[0] in LOCAL_ROOMS:
                for found in file.imports:
                    if not found.typing and found.target.startswith(("torch.distributed", *forbidden)):
                        wrong.add(f"{file.path} -> {found.target}")
        return sorted(wrong)

    def long_functions(self, limit: int = LONG_FUNCTION) -> dict[str, int]:
        """``file:function`` to its lines, longest first, outside kernels and tests."""
        found = {
            f"{file.path}:{name}": lines
            for file in self.files.values()
            if file.room.split(".")[0] not in ("kernels", "tests")
            for name, (_, lines) in file.functions.items()
            if lines > limit
        }
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    def long_files(self, limit: int = LONG_FILE) -> dict[str, int]:
        """File to its lines, longest first."""
        found = {file.path: file.lines for file in self.files.values() if file.lines > limit}
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def changed_globals(self) -> list[str]:
        """``file:name`` of module globals that the package's own code changes."""
        return [f"{file.path}:{name}" for file in self._shipped() for name in file.changed_globals]

    def caches(self) -> list[str]:
        """``file:function`` of functions of the package that keep what they returned."""
        return [f"{file.path}:{name}" for file in self._shipped() for name in file.caches]

    def _shipped(self) -> list[File]:
        return [file for file in self.files.values() if _is_shipped(file.path)]

    def recipes(self) -> dict[str, list[str]]:
        """Heading ``Add a ...`` of CONTRIBUTING.md to the files and folders that its recipe names in backticks."""
        page = self.root / "CONTRIBUTING.md"
        found: dict[str, list[str]] = {}
        for section in re.split(r"^## ", page.read_text() if page.exists() else "", flags=re.MULTILINE):
            title, _, text = section.partition("\n")
            if title.startswith("Add a"):
                quoted = re.findall(r"`([^`\n]+)`", text)
                paths = [
                    q for q in quoted if re.fullmatch(r"[\w./<>*-]+", q) and ("/" in q or q.endswith((".py", ".md")))
                ]
                found[title] = list(dict.fromkeys(paths))
        return found


def room_of(path: str) -> str:
    """``compactdist/state/store.py`` lies in ``state``, ``compactdist/wire.py`` in ``wire``.

    A leaf is a room by itself, ``observe.stats`` for instance. The package's own ``__init__.py`` lies in
    ``compactdist``, an adapter in ``integrations.<name>``, everything else in its top folder.
    """
    parts = path.removesuffix(".py").split("/")
    if parts[0] == "integrations":
        return ".".join(parts[:2]) if len(parts) > 2 else "integrations"
    if parts[0] != "compactdist":
        return parts[0]
    if parts[1] == "__init__":
        return "compactdist"
    leaf = ".".join(parts[1:])
    return leaf if leaf in LEAVES else parts[1]


def _is_shipped(path: str) -> bool:
    return path.startswith(("compactdist/", "integrations/"))


def _may_import(importing: str, imported: str) -> bool:
    if importing == imported or imported in LEAVES:
        return True
    if importing in LEAVES:
        return False
    a, b = importing.split(".")[0], imported.split(".")[0]
    if b == "observe" and a not in OBSERVERS:
        return False
    below, above = _height(imported, len(HEIGHT)), _height(importing, -1)
    # a room without a height may import nothing but leaves, until it is given one
    return above > below or {a, b} == {"policy", "config"}


def _height(room: str, unknown: int) -> int:
    return HEIGHT.get(room, HEIGHT.get(room.split(".")[0], unknown))


def _imports(tree: ast.Module) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool, bool]]:
    """Every import with whether it is in a function, and whether it is for type checkers only.

    ``torch.distributed`` used as an attribute, without an import of its own, is given as an import.
    """
    pending: list[tuple[ast.AST, bool, bool]] = [(tree, False, False)]
    while pending:
        node, late, typing = pending.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, late, typing
        if isinstance(node, ast.Attribute) and node.attr == "distributed" and _is_name(node.value, "torch"):
            yield ast.Import([ast.alias("torch.distributed")], lineno=node.lineno), late, typing
        inner = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            pending += [(child, inner, True) for child in node.body]
            pending += [(child, inner, typing) for child in node.orelse]
        else:
            pending += [(child, inner, typing) for child in ast.iter_child_nodes(node)]


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, tuple[int, int]]]:
    """Qualified name, first line and number of lines of every function, those inside functions included."""
    for node in ast.iter_child_nodes(tree):
        name = prefix
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{prefix}.{node.name}" if prefix else node.name
            if not isinstance(node, ast.ClassDef):
                yield name, (node.lineno, (node.end_lineno or node.lineno) - node.lineno + 1)
        yield from _functions(node, name)


def _changed_globals(tree: ast.Module) -> set[str]:
    """Names bound at module level that code inside functions changes: assigned by ``global``, or changed in place."""
    bound = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    changed: set[str] = set()
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        nodes = list(ast.walk(function))
        own = {arg.arg for arg in ast.walk(function.args) if isinstance(arg, ast.arg)}
        rebound = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        declared = {name for n in nodes if isinstance(n, ast.Global) for name in n.names}
        visible = (bound - own - rebound) | (bound & declared)
        changed |= declared & rebound
        for node in nodes:
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
                owner = node.value
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _CHANGES:
                owner = node.func.value
            else:
                continue
            if isinstance(owner, ast.Name) and owner.id in visible:
                changed.add(owner.id)
    return changed


def _caches(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            for decorator in node.decorator_list:
                called = decorator.func if isinstance(decorator, ast.Call) else decorator
                if ast.unparse(called).rpartition(".")[2] in ("cache", "lru_cache"):
                    yield node.name


def _strongly_connected(graph: dict[str, set[str]]) -> Iterator[list[str]]:
    """Tarjan's algorithm, with a stack of its own, as import chains may be long."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    path: list[str] = []
    on_path: set[str] = set()
    for start in graph:
        work: list[tuple[str, Iterator[str]]] = []
        if start not in index:
            work.append((start, iter(sorted(graph[start]))))
        while work:
            node, rest = work[-1]
            if node not in index:
                index[node] = low[node] = len(index)
                path.append(node)
                on_path.add(node)
            for target in rest:
                if target not in index:
                    work.append((target, iter(sorted(graph[target]))))
                    break
                if target in on_path:
                    low[node] = min(low[node], index[target])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    at = path.index(node)
                    ring, path = path[at:], path[:at]
                    on_path -= set(ring)
                    yield ring


# --- printing


def report(house: House) -> dict[str, object]:
    """Everything, as plain values."""
    return {
        "rooms": {room: {"files": files, "lines": lines} for room, (files, lines) in house.rooms().items()},
        "room_arrows": {f"{a} -> {b}": count for (a, b), count in sorted(house.room_arrows().items())},
        "file_arrows": len({(a.path, b.path) for a, b, _ in house.arrows()}),
        "circles": house.circles(),
        "wrong_arrows": house.wrong_arrows(),
        "distributed_imports": house.distributed_imports(),
        "long_functions": house.long_functions(),
        "long_files": house.long_files(),
        "changed_globals": house.changed_globals(),
        "caches": house.caches(),
        "recipes": house.recipes(),
    }


def _section(title: str, lines: Iterable[str]) -> None:
    rows = list(lines)
    print(f"\n{title}: {len(rows)}")
    for row in rows:
        print(f"  {row}")


def show(house: House) -> None:
    """Print everything."""
    rooms = house.rooms()
    print(f"{'room':24} {'files':>6} {'lines':>7}")
    for room, (files, lines) in rooms.items():
        print(f"{room:24} {files:6} {lines:7}")
    print(f"{'all':24} {sum(f for f, _ in rooms.values()):6} {sum(n for _, n in rooms.values()):7}")
    by_room: dict[str, list[str]] = defaultdict(list)
    for (a, b), count in sorted(house.room_arrows().items()):
        by_room[a].append(f"{b} {count}")
    _section("rooms that import others (imports between files)", (f"{a} -> {', '.join(b)}" for a, b in by_room.items()))
    print(f"\narrows from file to file: {len({(a.path, b.path) for a, b, _ in house.arrows()})}")
    _section("circles", (" -> ".join(ring) for ring in house.circles()))
    _section("arrows against the direction", house.wrong_arrows())
    _section("distributed imports in kernels, codecs, state", house.distributed_imports())
    functions, files = house.long_functions(), house.long_files()
    _section(f"functions over {LONG_FUNCTION} lines outside kernels and tests", _counted(functions))
    _section(f"files over {LONG_FILE} lines", _counted(files))
    _section("module globals that are changed", house.changed_globals())
    _section("functions that keep their results", house.caches())
    recipes = house.recipes()
    _section(
        "recipes in CONTRIBUTING.md", (f"{t}: {len(paths)} files ({', '.join(paths)})" for t, paths in recipes.items())
    )


def _counted(found: dict[str, int]) -> Iterator[str]:
    return (f"{count:5} {name}" for name, count in found.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    writable = argparse.FileType("w")
    parser.add_argument("--json", type=writable, metavar="FILE", help="write one JSON object there; -: print it")
    args = parser.parse_args()
    house = House()
    if args.json:
        args.json.write(json.dumps(report(house), indent=1) + "\n")
    else:
        show(house)
    return 0


if __name__ == "__main__":
    sys.exit(main())
