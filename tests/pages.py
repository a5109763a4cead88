"""The Python blocks of a page, run in order as a reader would."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def run_page(page: Path) -> dict[str, Any]:
    """Runs every block of the page, and returns the names that they define."""
    names: dict[str, Any] = {"__name__": page.stem}
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        exec(compile(block, str(page), "exec"), names)
    return names
