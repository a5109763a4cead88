"""What a query by the fused kernels allocates: at most three numbers a class and row, whatever the preview."""

import ctypes

import pytest
import torch

from lastlayer import Int4Preview, Int8Preview, ScreenedSoftmax, SVDPreview
from lastlayer.study.measure import peak_bytes

pytestmark = pytest.mark.skipif(not peak_bytes(lambda: torch.ones(1 << 22)), reason="the system does not tell")
V, D = 400_000, 8
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
    layer.topk(hidden, 10)  # kernels are compiled, and the room that a screen keeps is made
    kept = sum(array.nbytes for array in layer._for_kernels.room) if layer._for_kernels else 0
    assert peak_bytes(lambda: layer.topk(hidden, 10)) + kept <= 3 * 4 * V * rows


MMAP_THRESHOLD, SMALL, USUAL = -3, 1 << 16, 1 << 17  # mallopt's name for it, and bytes


@pytest.fixture
def mapped_apart():
    """Large blocks go back to the system when they are freed: what is counted is not where a heap has holes."""
    malloc = ctypes.CDLL(None)
    malloc.mallopt(MMAP_THRESHOLD, SMALL)
    yield
    malloc.mallopt(MMAP_THRESHOLD, USUAL)


PLAIN = PREVIEWS | {"shifted": SVDPreview(2, tail_correction=1.0)}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.usefixtures("mapped_apart")
def test_a_query_without_kernels_allocates_at_most_three_numbers_a_class(weight, name, exact, dtype):
    """Plain PyTorch, as it runs on a GPU and in float64; numbers are of the dtype it works in."""
    layer = ScreenedSoftmax(weight.to(dtype), preview=PLAIN[name], candidates=1000, exact=exact)
    layer._for_kernels = False
    rows, number = 4, 8 if dtype == torch.float64 else 4
    hidden = torch.randn(rows, D, generator=torch.Generator().manual_seed(1)).to(dtype)
    layer.topk(hidden, 10)  # what the allocator keeps for the next call is there
    assert min(peak_bytes(lambda: layer.topk(hidden, 10)) for _ in range(3)) <= 3 * number * V * rows
