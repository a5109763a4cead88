"""Imports only go down, and never in a circle: the layering of DESIGN.md, read from the import statements."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lastlayer

PACKAGE = Path(lastlayer.__file__).parent
LEVELS = {
    "kernels": 0,
    "functional": 1,
    "screening": 2,
    "layers": 3,
    "transformers": 4,
    "distributed": 4,
    "export": 4,
    "study": 5,
    "reproduce": 6,
    "cli": 7,
}
# Modules on an import cycle today. This must shrink to nothing: whoever removes a cycle removes its modules here.
CYCLIC: set[str] = set()


def name_of(path: Path, package: Path) -> str:
    """`.../src/lastlayer/study/files.py` is `lastlayer.study.files`; a package's `__init__.py` is the package."""
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> Iterator[str]:
    """Every name that a file imports, at its top or inside a function, but for those that only types need."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the level"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def import_graph(package: Path) -> dict[str, set[str]]:
    """Each module, with the modules of the package that it imports."""
    modules = {name_of(path, package): path for path in package.rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        graph[module] = set()
        for name in imported(path):
            while name and name not in modules:  # a class or function: the module that holds it
                name = name.rpartition(".")[0]
            graph[module] |= {name} - {"", module}
    return graph


def cyclic(graph: dict[str, set[str]]) -> set[str]:
    """The modules that can reach themselves."""

    def reaches_itself(module: str) -> bool:
        seen: set[str] = set()
        ahead = list(graph[module])
        while ahead:
            name = ahead.pop()
            if name == module:
                return True
            if name not in seen:
                seen.add(name)
                ahead += graph[name]
        return False

    return {module for module in graph if reaches_itself(module)}


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    level = path.relative_to(PACKAGE).parts[0]
    parts = [name.split(".") for name in imported(path)]
    levels = {part[1] for part in parts if part[0] == "lastlayer" and len(part) > 1} & {*LEVELS, "testing"}
    if level == "testing":
        assert "cli" not in levels
        return
    assert "testing" not in levels
    above = {name for name in levels if name != level and LEVELS[name] >= LEVELS[level]}
    assert not above, f"{path.name} in {level} imports {above}"


def test_no_module_imports_itself_in_a_circle():
    found = cyclic(import_graph(PACKAGE))
    assert not found - CYCLIC, f"import cycle through {sorted(found - CYCLIC)}"
    assert not CYCLIC - found, f"no longer in a cycle, remove from CYCLIC: {sorted(CYCLIC - found)}"


def test_cycles_are_seen(tmp_path):
    """A cycle of three, one import of it inside a function; a module beside it that only looks at the cycle."""
    package = tmp_path / "lastlayer"
    package.mkdir()
    sources = {
        "__init__": "from lastlayer.a import f",
        "a": "from lastlayer.b import g",
        "b": "import lastlayer.c",
        "c": "def h():\n    from lastlayer import a",
        "d": "from lastlayer.a import f",
        "e": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lastlayer.f import F",
        "f": "from lastlayer.e import E",
    }
    for name, source in sources.items():
        (package / f"{name}.py").write_text(source)
    assert cyclic(import_graph(package)) == {"lastlayer.a", "lastlayer.b", "lastlayer.c"}


def test_every_folder_has_a_level():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= {*LEVELS, "testing"}


def test_import_is_lean():
    """Importing lastlayer imports nothing heavy but torch."""
    heavy = "numba matplotlib rich typer transformers onnx onnxruntime faiss hnswlib entmax sklearn scipy pandas"
    code = f"import sys, lastlayer; print([m for m in '{heavy}'.split() if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_public_names():
    assert sorted(lastlayer.__all__) == sorted(set(lastlayer.__all__))
    assert all(hasattr(lastlayer, name) for name in lastlayer.__all__)
