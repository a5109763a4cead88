"""For mkdocstrings: examples in docstrings are shown as code wherever they stand, not only under "Examples:"."""

import re
from typing import Any

from griffe import Extension, Object

# lines from one that starts with >>> up to a blank one, as the doctest module reads them
EXAMPLE = re.compile(r"^(?P<indent> *)>>> .*\n?(?:^(?P=indent)\S.*\n?)*", re.MULTILINE)


def fenced(text: str) -> str:
    """The text with a code fence around every example."""
    return EXAMPLE.sub(lambda found: f"{found['indent']}```pycon\n{_whole(found[0])}{found['indent']}```\n", text)


def _whole(example: str) -> str:
    return example if example.endswith("\n") else f"{example}\n"


class DoctestsAsCode(Extension):
    """Puts every docstring through `fenced`, before it is parsed."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
