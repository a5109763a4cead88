"""No public name without a docstring, and no page names what does not exist."""

import inspect
import pydoc
import re
from pathlib import Path

import pytest

import lastlayer

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", lastlayer.__all__)
def test_public_name_is_documented(name):
    thing = getattr(lastlayer, name)
    assert inspect.getdoc(thing), f"{name} has no docstring"
    if inspect.isclass(thing):
        for member, value in vars(thing).items():
            if inspect.isfunction(value) and not member.startswith("_") and member != "extra_repr":
                assert inspect.getdoc(getattr(thing, member)), f"{name}.{member} has no docstring"


@pytest.mark.parametrize("name", lastlayer.__all__)
def test_public_name_is_in_the_docs(name):
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md"))
    assert re.search(rf"\b{name}\b", pages), f"no page of docs/ mentions {name}"


def test_pages_name_only_what_exists():
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for name in re.findall(r"^::: lastlayer\.([\w.]+)", page.read_text(encoding="utf-8"), re.MULTILINE):
            assert pydoc.locate(f"lastlayer.{name}") is not None, f"{page.name} names lastlayer.{name}"
