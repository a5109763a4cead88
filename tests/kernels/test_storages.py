"""Kernels and files leave the storage of parameters free to be resized, which `Tensor.numpy()` would not."""

import pytest
import torch

from lastlayer import (
    AdaptiveSoftmax,
    FullSoftmax,
    HierarchicalSoftmax,
    Int8Preview,
    MixtureOfSoftmaxes,
    ScreenedSoftmax,
    TreeSoftmax,
)


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


def test_saving_a_screen_leaves_the_storage_of_its_weight_free(tmp_path):
    layer = FullSoftmax(16, 300)
    screen = ScreenedSoftmax.from_layer(layer, preview=Int8Preview(), candidates=9, use="screen")
    screen.save(tmp_path, include_weight=False)
    assert layer.weight.untyped_storage().resizable()
