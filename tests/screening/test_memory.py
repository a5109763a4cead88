"""What a compiled query allocates: at most three numbers a class and row, whatever the preview."""

import pytest
import torch

from lastlayer import Int4Preview, Int8Preview, ScreenedSoftmax, SVDPreview
from lastlayer.kernels import engine
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


@pytest.mark.parametrize("name", PREVIEWS)
def test_a_query_in_plain_pytorch_allocates_a_few_numbers_a_class(weight, name):
    """As in float64 and on a GPU: scores, bounds, their normaliser, and 16 bytes a class of PyTorch's `topk`."""
    with engine.forced(None):
        layer = ScreenedSoftmax(weight, preview=PREVIEWS[name], candidates=1000, exact=True, use="screen")
        hidden = torch.randn(4, D, generator=torch.Generator().manual_seed(1))
        layer.topk(hidden, 10)
        assert peak_bytes(lambda: layer.topk(hidden, 10)) <= 10 * 4 * V * len(hidden)
