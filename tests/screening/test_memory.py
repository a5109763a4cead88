"""What a compiled query allocates: at most three numbers a class and row, whatever the preview."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lastlayer import Int4Preview, Int8Preview, ScreenedSoftmax, SVDPreview
from lastlayer.study.measuring.measure import peak_bytes

pytestmark = pytest.mark.skipif(not peak_bytes(lambda: torch.ones(1 << 22)), reason="the system does not tell")
V, D = 200_000, 8
PREVIEWS = {
    "float32": SVDPreview(2),
    "bfloat16": SVDPreview(2, storage="bfloat16"),
    "int8": Int8Preview(),
    "int4": Int4Preview(),
}


@pytest.fixture(scope="module")
def weight():
    return torch.randn(V, D, generator=torch.Generator().manual_seed(0))


def test_the_measure_sees_what_is_allocated():
    assert peak_bytes(lambda: torch.ones(10 * V)) >= 39 * V  # Linux counts in steps


@pytest.mark.parametrize("name", PREVIEWS)
@pytest.mark.parametrize("rows", [1, 5])
def test_a_query_allocates_at_most_three_numbers_a_class(weight, name, rows):
    layer = ScreenedSoftmax(weight, preview=PREVIEWS[name], candidates=1000, exact=True)
    hidden = torch.randn(rows, D, generator=torch.Generator().manual_seed(1))
    layer.topk(hidden, 10)
    assert peak_bytes(lambda: layer.topk(hidden, 10)) <= 3 * 4 * V * rows


@pytest.fixture(scope="module")
def plain():
    """Numbers a class and row that queries in plain PyTorch allocate; in a process with no holes yet."""
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("the sanitizer's allocator keeps what is freed, and no kernel runs here")
    script = Path(__file__).with_name("plain_memory.py")
    return json.loads(subprocess.run([sys.executable, script], capture_output=True, check=True).stdout)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8", "int4", "shifted"])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_query_in_plain_pytorch_allocates_at_most_three_numbers_a_class(plain, name, exact, dtype):
    assert 1 <= plain[f"{name} {dtype} {exact}"] <= 3
