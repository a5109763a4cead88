"""Runs a script of `examples/` as `python SCRIPT ARGUMENTS` does, in this process, which has loaded PyTorch."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def output_of(monkeypatch, capsys):
    """A function of the script's name and arguments that returns what it printed."""

    def run(script, *arguments):
        monkeypatch.setattr("sys.argv", [script, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    return run
