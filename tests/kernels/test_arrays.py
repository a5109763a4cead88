"""Views of tensors for kernels: the same numbers, and a storage that can still be resized."""

import numpy as np
import pytest
import torch

from lastlayer import AdaptiveSoftmax, FullSoftmax, HierarchicalSoftmax, MixtureOfSoftmaxes, TreeSoftmax
from lastlayer.kernels.arrays import array_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.uint8])
@pytest.mark.parametrize("cut", [torch.clone, torch.t, lambda t: t[1:, ::2], lambda t: t[:0], lambda t: t[0, 0]])
def test_a_view_is_what_numpy_makes(dtype, cut):
    tensor = cut(torch.arange(24).reshape(4, 6).to(dtype))
    view, expected = array_of(tensor), tensor.clone().numpy()
    assert view.dtype == expected.dtype
    assert np.array_equal(view, expected)
    if tensor.numel():
        view[...] = 7
        assert (tensor == 7).all(), "a copy"


def test_a_view_keeps_the_memory_alive():
    view = array_of(torch.full((1 << 16,), 3.0))
    torch.full((1 << 16,), 5.0)
    assert (view == 3).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: FullSoftmax(16, 40_000),
        lambda: MixtureOfSoftmaxes(16, 40_000, 2),
        lambda: AdaptiveSoftmax(16, 60_000, [40_000]),
        lambda: HierarchicalSoftmax(16, 100),
        lambda: HierarchicalSoftmax(16, 40_000),
        lambda: HierarchicalSoftmax(16, 100, clusters=torch.zeros(100, dtype=torch.int64)),
        lambda: TreeSoftmax(16, torch.ones(100)),
    ],
)
def test_training_leaves_the_storage_of_parameters_free(make):
    """FSDP frees it after the forward pass: large problems and small ones, which take different kernels."""
    layer = make()
    for rows in (1, 64):
        layer(torch.randn(rows, 16), torch.randint(layer.num_classes, (rows,))).backward()
        layer.topk(torch.randn(rows, 16), 3)
        layer.sample(torch.randn(rows, 16), 3)
    for name, parameter in layer.named_parameters():
        assert parameter.untyped_storage().resizable(), f"the storage of {name} is fixed"
