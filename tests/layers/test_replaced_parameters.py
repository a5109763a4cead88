"""A replaced parameter: one of equal shape is used, one of another shape is an error that names it."""

import pytest
import torch
from torch import nn

from lastlayer import OneVsAll
from law_table import CASES

# A factored layer has no weight to replace: `set_weight` checks what it is given.
WITH_PARAMETERS = [case for case in CASES if not case.name.startswith("factored")]


def own_parameters(layer):
    """Names of what a user may replace: not a logit map's, whose shapes are its own."""
    return [name for name, _ in layer.named_parameters() if not name.startswith("logit_map.")]


def replace(layer, name, tensor):
    place, _, last = name.rpartition(".")
    setattr(layer.get_submodule(place), last, nn.Parameter(tensor))


def other_shapes(shape):
    """One longer and one shorter in each dimension."""
    for dim, size in enumerate(shape):
        for other in {size + 1, abs(size - 1)}:
            yield (*shape[:dim], other, *shape[dim + 1 :])


def arguments(layer):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, layer.in_features, generator=generator, dtype=torch.float64)
    return hidden, torch.randint(layer.num_classes, (3,), generator=generator)


@pytest.mark.parametrize("case", WITH_PARAMETERS, ids=str)
def test_another_shape_is_refused_by_name(case):
    layer = case.build()
    hidden, targets = arguments(layer)
    for name in own_parameters(layer):
        parameter = layer.get_parameter(name)
        for shape in other_shapes(parameter.shape):
            replace(layer, name, torch.zeros(shape, dtype=torch.float64))
            calls = (
                lambda: layer(hidden, targets),
                lambda: layer.log_prob(hidden),
                lambda: layer.target_log_prob(hidden, targets),
                lambda: layer.topk(hidden, 1),
                lambda: layer.sample(hidden),
                lambda: layer.score(hidden, targets[:, None]),
            )
            for call in calls:
                with pytest.raises(ValueError, match=rf"^{name} must have the shape .*was replaced") as caught:
                    call()
                assert str(shape) in str(caught.value)
        replace(layer, name, parameter.detach())
    assert layer(hidden, targets).isfinite().all()


@pytest.mark.parametrize("case", WITH_PARAMETERS, ids=str)
def test_an_equal_shape_serves(case):
    layer = case.build()
    hidden, targets = arguments(layer)
    generator = torch.Generator().manual_seed(1)
    for name in own_parameters(layer):
        shape = layer.get_parameter(name).shape
        replace(layer, name, torch.randn(shape, generator=generator, dtype=torch.float64))
    torch.testing.assert_close(layer.log_prob(hidden), case.oracle(layer, hidden))
    if case.likelihood:
        torch.testing.assert_close(layer(hidden, targets), case.loss(layer, hidden, targets))
    layer(hidden, targets).backward()


def test_a_layer_without_probabilities():
    layer = OneVsAll(4, 9, dtype=torch.float64)
    hidden, targets = arguments(layer)
    for name in ("weight", "bias"):
        parameter = layer.get_parameter(name)
        for shape in other_shapes(parameter.shape):
            replace(layer, name, torch.zeros(shape, dtype=torch.float64))
            for call in (
                lambda: layer(hidden, targets),
                lambda: layer.scores(hidden),
                lambda: layer.topk(hidden, 1),
            ):
                with pytest.raises(ValueError, match=rf"^{name} must have the shape .*was replaced"):
                    call()
        replace(layer, name, 2 * parameter.detach())
    torch.testing.assert_close(layer.scores(hidden), hidden @ layer.weight.T + layer.bias)
    torch.testing.assert_close(layer(hidden, targets.to(torch.uint8)), layer(hidden, targets))
