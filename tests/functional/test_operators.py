"""The operators of `torch.library`, and the form of every hand-written gradient."""

import importlib
import pkgutil

import pytest
import torch
from torch.library import opcheck

import lastlayer
from lastlayer import HierarchicalSoftmax, TreeSoftmax
from lastlayer.functional import mixture_cross_entropy
from lastlayer.functional.sampled_logits import _SampledLogits
from lastlayer.functional.second_order import HandWritten


def two_level(bias):
    layer = HierarchicalSoftmax(5, 11, bias=bias).double()
    targets = torch.tensor([3, 10, 3, 0, 7])
    tables = layer._clusters[targets], layer._slots[targets], layer.offsets
    return "two_level_log_prob", 5, (layer.head_weight, layer.head_bias, layer.weight, layer.bias, *tables)


def path():
    layer = TreeSoftmax(5, 11).double()
    tree = layer._tree
    return (
        "path_log_prob",
        2,
        (layer.weight, torch.tensor([3, 10, 3, 0, 7]), tree.parents, tree.sides, tree.depths),
    )


@pytest.mark.parametrize(
    "make", [lambda: two_level(True), lambda: two_level(False), path], ids=["two-level", "no-bias", "path"]
)
def test_operators_are_registered_with_shapes_and_gradients(make):
    torch.manual_seed(0)
    name, leaves, others = make()
    hidden = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    opcheck(getattr(torch.ops.lastlayer, name).default, (hidden, *others))
    wanted = [part is not None for part in (hidden, *others)][:leaves]
    inputs = [part if part is None else part.detach() for part in (hidden, *others)]
    opcheck(getattr(torch.ops.lastlayer, f"{name}_backward").default, (torch.randn(5).double(), wanted, *inputs))


def hand_written():
    for module in pkgutil.walk_packages(lastlayer.__path__, "lastlayer."):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as missing:  # an optional extra
            if (missing.name or "").startswith("lastlayer"):
                raise
    return [kind for kind in torch.autograd.Function.__subclasses__() if kind.__module__.startswith("lastlayer")]


def test_every_function_has_the_form_that_transforms_take():
    assert hand_written() == [HandWritten]
    kinds = HandWritten.__subclasses__()
    assert len(kinds) > 9
    for kind in kinds:
        assert kind.setup_context is not torch.autograd.Function.setup_context, kind


def test_a_function_that_is_batched_names_the_library():
    weight, ids = torch.randn(4, 3), torch.zeros(2, 1, dtype=torch.int64)

    def call(hidden):
        return _SampledLogits.apply(hidden, weight, None, ids, ids, torch.float32, False)

    with pytest.raises(RuntimeError, match="lastlayer"):
        torch.func.vmap(call)(torch.randn(6, 2, 3))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_a_mixture_takes_targets_of_any_integer_dtype(dtype):
    latent, prior, weight = torch.randn(2, 3, 4), torch.randn(2, 3).log_softmax(1), torch.randn(5, 4)
    targets = torch.tensor([4, 0])
    found = mixture_cross_entropy(latent, prior, weight, targets.to(dtype))
    assert torch.equal(found, mixture_cross_entropy(latent, prior, weight, targets))
    with pytest.raises(TypeError, match="targets must be class ids of an integer dtype"):
        mixture_cross_entropy(latent, prior, weight, targets.float())
