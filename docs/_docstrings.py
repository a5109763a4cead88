"""For mkdocstrings: what docstrings here do that its parser does not know."""

import re
from typing import Any

from griffe import Extension, Object

# lines from one that starts with >>> up to a blank one, as the doctest module reads them
EXAMPLE = re.compile(r"^(?P<indent> *)>>> .*\n?(?:^(?P=indent)\S.*\n?)*", re.MULTILINE)
# one entry for several arguments, with the lines that continue it
SHARED = re.compile(
    r"^(?P<indent> +)(?P<names>\w+(?:, \w+)+)(?P<said>: .*\n?(?:^(?P=indent) +.*\n?)*)", re.MULTILINE
)
ARGUMENTS = re.compile(r"^(?P<indent> *)Args:\n(?:^(?P=indent) +.*\n?|^\n)*", re.MULTILINE)


def fenced(text: str) -> str:
    """The text with a code fence around every example, wherever it stands."""
    return EXAMPLE.sub(lambda found: f"{found['indent']}```pycon\n{_whole(found[0])}{found['indent']}```\n", text)


def separate(text: str) -> str:
    """The text with an entry for each argument."""
    return ARGUMENTS.sub(lambda section: SHARED.sub(_entries, section[0]), text)


def _entries(found: re.Match[str]) -> str:
    return "".join(f"{found['indent']}{name}{_whole(found['said'])}" for name in found["names"].split(", "))


def _whole(lines: str) -> str:
    return lines if lines.endswith("\n") else f"{lines}\n"


class Docstrings(Extension):
    """Puts every docstring through both, before it is parsed."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(separate(obj.docstring.value))
