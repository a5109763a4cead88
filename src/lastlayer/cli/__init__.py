"""The command line: one file a verb, no mathematics."""

import io
import sys
from importlib.util import find_spec

NEEDED = ("typer", "rich", "matplotlib")  # what `pip install lastlayer[cli]` brings


def main() -> None:
    """The `lastlayer` command."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without a sign shows another in its place
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(f"lastlayer: the command needs {', '.join(missing)}: pip install 'lastlayer[cli]'", file=sys.stderr)
        raise SystemExit(1)
    from lastlayer.cli.app import app

    app()
