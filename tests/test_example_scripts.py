"""The scripts in `examples/` run as a user would run them, and learn."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def share_right(script, *arguments):
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(re.search(r"right: ([\d.]+)%", output)[1])


def test_many_classes():
    assert share_right("many_classes.py", "--classes", "5000", "--steps", "60") > 50


def test_digits():
    assert share_right("digits.py") > 90
