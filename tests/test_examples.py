"""Every published example runs: docstrings of all modules, and the Python blocks of the pages."""

import doctest
import importlib
import pkgutil
from contextlib import contextmanager

import pytest
import torch

import lastlayer
from pages import ROOT, run_page

MODULES = sorted(m.name for m in pkgutil.walk_packages(lastlayer.__path__, "lastlayer."))
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


@pytest.fixture(autouse=True)
def seeded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an example may write files
    torch.manual_seed(0)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    with skipped_without_extras():
        module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_examples(page):
    with skipped_without_extras():
        run_page(page)


@contextmanager
def skipped_without_extras():
    """A skip where an optional extra is not installed."""
    try:
        yield
    except ModuleNotFoundError as missing:
        if (missing.name or "").startswith("lastlayer"):
            raise
        pytest.skip(f"needs {missing.name}")
