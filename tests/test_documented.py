"""No public name without a docstring and its place in the reference, and no page names what does not exist."""

import importlib.util
import inspect
import pydoc
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DIRECTIVE = re.compile(r"^::: (lastlayer[\w.]*)$", re.MULTILINE)
RESULTS_FILE = re.compile(r"results/(\w+\.json)\b")
DOORS = [  # packages whose `__all__` a user imports from; some need an extra, or are not built here
    f"lastlayer{door}"
    for door in ("", ".functional", ".screening", ".testing", ".transformers", ".distributed", ".export")
    if (ROOT / "src" / "lastlayer" / door.strip(".") / "__init__.py").exists()
]


def public(door):
    try:
        package = importlib.import_module(door)
    except ModuleNotFoundError as missing:
        if (missing.name or "").startswith("lastlayer"):
            raise
        pytest.skip(f"needs {missing.name}")
    return {f"{door}.{name}": getattr(package, name) for name in package.__all__}


@pytest.mark.parametrize("door", DOORS)
def test_public_names_are_documented(door):
    for name, thing in public(door).items():
        if not isinstance(thing, tuple):
            assert inspect.getdoc(thing), f"{name} has no docstring"
        for member, value in vars(thing).items() if inspect.isclass(thing) else ():
            shown = inspect.isfunction(value) or isinstance(value, property | classmethod | staticmethod)
            if shown and not member.startswith("_") and member != "extra_repr":
                assert inspect.getdoc(getattr(thing, member)), f"{name}.{member} has no docstring"


@pytest.mark.parametrize("door", DOORS)
def test_public_names_are_in_the_reference(door):
    """Each by one directive, under one of its names; a package that is a door by itself has its names there."""
    names = [name for page in PAGES for name in DIRECTIVE.findall(page.read_text(encoding="utf-8"))]
    assert len(names) == len(set(names))
    shown = [pydoc.locate(name) for name in names]
    for name, thing in public(door).items():
        if name not in DOORS:
            assert any(thing is other for other in shown), f"no page of docs/ has `::: {name}`"


def test_overview_of_the_reference_names_all_of_it():
    overview = (ROOT / "docs" / "api" / "index.md").read_text(encoding="utf-8")
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        if page.name != "index.md":
            assert f"]({page.name})" in overview, page.name
            for name in DIRECTIVE.findall(page.read_text(encoding="utf-8")):
                assert re.search(rf"`([\w.]+\.)?{name.rpartition('.')[2]}`", overview), (
                    f"{name} is not in the overview"
                )


def test_pages_name_only_what_exists():
    for page in PAGES:
        for name in DIRECTIVE.findall(page.read_text(encoding="utf-8")):
            assert pydoc.locate(name) is not None, f"{page.name} names {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_figures_are_from_files_that_exist(page):
    for name in RESULTS_FILE.findall(page.read_text(encoding="utf-8")):
        assert (ROOT / "benchmarks" / "results" / name).exists(), f"{page.name} names {name}"


def test_remembered_claims_say_so():
    """† marks a figure that nobody has verified against the paper; a page that uses it says what it means."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if "†" in text:
            said = " ".join(text.split())
            assert re.search(r"†(: | \()as remembered; not verified against the paper", said), page.name


@pytest.fixture(scope="module")
def docstrings():
    pytest.importorskip("griffe")
    spec = importlib.util.spec_from_file_location("docstrings", ROOT / "docs" / "_docstrings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_examples_are_shown_as_code(docstrings):
    """Markdown takes `>>>` for three levels of quotation: every example of a docstring is put into a fence."""
    text = "Does.\n\nExample:\n    >>> x = [\n    ...     1]\n    >>> x\n    [1]\n\nMore.\n>>> y"
    said = "Does.\n\nExample:\n    ```pycon\n    >>> x = [\n    ...     1]\n    >>> x\n    [1]\n    ```\n\nMore.\n"
    assert docstrings.fenced(text) == said + "```pycon\n>>> y\n```\n"
    for name, thing in public("lastlayer").items():
        outside = re.sub(
            r"```pycon\n.*?```\n", "", docstrings.fenced(inspect.getdoc(thing) or ""), flags=re.DOTALL
        )
        assert ">>>" not in outside, name


@pytest.mark.parametrize("door", DOORS)
def test_arguments_have_the_names_of_the_signature(door, docstrings):
    text = "Args:\n    a, b: both\n        of them.\n    c: one.\n\nRaises:\n    x, y: no."
    both = "both\n        of them.\n"
    said = f"Args:\n    a: {both}    b: {both}    c: one.\n\nRaises:\n    x, y: no."
    assert docstrings.separate(text) == said
    for name, thing in public(door).items():
        section = docstrings.ARGUMENTS.search(docstrings.separate(inspect.getdoc(thing) or ""))
        if section is None or not callable(thing):
            continue
        parameters = inspect.signature(thing).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            continue  # `**options` go on to a base class
        described = re.findall(r"^ {4}(\w+): ", section[0], re.MULTILINE)
        assert described, name
        assert set(described) <= parameters.keys(), f"{name} has no {set(described) - parameters.keys()}"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(name):
    """Those between pages are checked by mkdocs."""
    for link in re.findall(r"\]\(([^)#]+)", (ROOT / name).read_text(encoding="utf-8")):
        assert (ROOT / link).exists(), f"{name} links to {link}"
