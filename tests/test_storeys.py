"""Imports only go down: the storeys of DESIGN.md, held by reading the import lines."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lastlayer

PACKAGE = Path(lastlayer.__file__).parent
STOREYS = {
    "kernels": 0,
    "functional": 1,
    "screening": 2,
    "layers": 3,
    "transformers": 4,
    "distributed": 4,
    "export": 4,
    "study": 5,
    "cli": 6,
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


def imported_storeys(path: Path) -> set[str]:
    """The storeys that a file imports from."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the storey"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    parts = [name.split(".") for name in names]
    return {part[1] for part in parts if part[0] == "lastlayer" and len(part) > 1}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    storey = path.relative_to(PACKAGE).parts[0]
    imported = imported_storeys(path) & {*STOREYS, "testing"}
    if storey == "testing":
        assert "cli" not in imported
        return
    assert "testing" not in imported
    above = {name for name in imported if name != storey and STOREYS[name] >= STOREYS[storey]}
    assert not above, f"{path.name} in {storey} imports {above}"


def test_every_folder_is_a_storey():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= {*STOREYS, "testing"}


def test_import_is_lean():
    """Importing lastlayer imports nothing heavy but torch."""
    heavy = "numba matplotlib rich typer transformers faiss hnswlib sklearn scipy pandas"
    code = f"import sys, lastlayer; print([m for m in '{heavy}'.split() if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_public_names():
    assert sorted(lastlayer.__all__) == sorted(set(lastlayer.__all__))
    assert all(hasattr(lastlayer, name) for name in lastlayer.__all__)
