"""Test modules can import each other, and small matrices run on one thread."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
pytest_plugins = ["engines", "browser", "scripts"]

SLOW = ("cli", "reproduce", "study", "transformers")  # whole commands, studies and models


def pytest_collection_modifyitems(items):
    """Fast tests first."""
    here = Path(__file__).parent
    items.sort(key=lambda item: item.path.relative_to(here).parts[0] in SLOW)
