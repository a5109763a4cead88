"""The operators of `torch.library`, and the form of every hand-written gradient."""

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest
import torch
from torch.library import opcheck

import lastlayer
from lastlayer import HierarchicalSoftmax, TreeSoftmax
from lastlayer.functional import mixture_cross_entropy
from lastlayer.functional.sampled_logits import _SampledLogits
from lastlayer.functional.second_order import HandWritten


def cluster(bias):
    layer = HierarchicalSoftmax(5, 11, bias=bias).double()
    targets = torch.tensor([3, 10, 3, 0, 7])
    tables = layer._slots[targets], layer._clusters[targets], layer.offsets
    return "cluster_log_prob", 3, (layer.weight, layer.bias, *tables)


def head():
    return "cluster_log_prob", 3, (torch.randn(4, 5).double(), None, torch.tensor([3, 1, 3, 0, 2]), None, None)


def path():
    layer = TreeSoftmax(5, 11).double()
    tree = layer._tree
    return (
        "path_log_prob",
        2,
        (layer.weight, torch.tensor([3, 10, 3, 0, 7]), tree.parents, tree.sides, tree.depths),
    )


def sampled(bias, *shape):
    weight, targets = torch.randn(11, 5).double().requires_grad_(), torch.tensor([[3], [10], [3], [0], [7]])
    own = torch.randn(11).double().requires_grad_() if bias else None
    return "sampled_logits", 3, (weight, own, targets, torch.randint(11, shape))


def one_vs_all(bias):
    weight, ids = (
        torch.randn(11, 5).double().requires_grad_(),
        torch.tensor([[3, 10], [0, 0], [7, 1], [2, 0], [5, 5]]),
    )
    own = torch.randn(11).double().requires_grad_() if bias else None
    values = torch.tensor([[1, 0.5], [0, 0], [1, 1], [1, 0], [0, 1]]).double()
    return "one_vs_all", 3, (weight, own, ids, values, 2 * torch.ones_like(values))


OPERATORS = {
    "cluster": lambda: cluster(True),
    "cluster-no-bias": lambda: cluster(False),
    "head": head,
    "path": path,
    "sampled-shared": lambda: sampled(True, 4),
    "sampled-own": lambda: sampled(False, 5, 4),
    "sampled-none": lambda: sampled(True, 0),
    "one-vs-all": lambda: one_vs_all(True),
    "one-vs-all-no-bias": lambda: one_vs_all(False),
}


@pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS)
def test_operators_are_registered_with_shapes_and_gradients(make):
    torch.manual_seed(0)
    name, leaves, others = make()
    hidden = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    operator = getattr(torch.ops.lastlayer, name).default
    opcheck(operator, (hidden, *others))
    wanted = [part is not None for part in (hidden, *others)][:leaves]
    inputs = [part if part is None else part.detach() for part in (hidden, *others)]
    results = operator(*inputs)
    upstream = [torch.randn_like(part) for part in (results if isinstance(results, tuple) else (results,))]
    opcheck(getattr(torch.ops.lastlayer, f"{name}_backward").default, (upstream, wanted, *inputs))


def hand_written():
    for module in pkgutil.walk_packages(lastlayer.__path__, "lastlayer."):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as missing:  # an optional extra
            if (missing.name or "").startswith("lastlayer"):
                raise
    names = {kind: kind.__module__ for kind in torch.autograd.Function.__subclasses__()}
    return [kind for kind, name in names.items() if name.startswith("lastlayer") and ".testing." not in name]


def descendants(kind):
    return [own for below in kind.__subclasses__() for own in (below, *descendants(below))]


def test_every_function_has_the_form_that_transforms_take():
    assert hand_written() == [HandWritten]
    kinds = [kind for kind in descendants(HandWritten) if not kind.__subclasses__()]
    assert len(kinds) > 5
    for kind in kinds:
        assert kind.setup_context is not torch.autograd.Function.setup_context, kind


def test_every_function_is_called_by_run_alone():
    """`apply` in a compiled graph without gradients passes `forward` a context that it does not take."""
    found, package = {}, Path(lastlayer.__file__).parent
    for path in set(package.rglob("*.py")) - set(package.glob("testing/*")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        owners = [call.value for call in calls if isinstance(call, ast.Attribute) and call.attr == "apply"]
        names = [owner.id for owner in owners if isinstance(owner, ast.Name)]
        found[path.name] = {name for name in names if name == "cls" or name.strip("_")[0].isupper()}
    assert {path: names for path, names in found.items() if names} == {"second_order.py": {"cls"}}


def test_a_function_that_is_batched_names_the_library():
    weight, ids = torch.randn(4, 3), torch.zeros(2, 1, dtype=torch.int64)

    def call(hidden):
        return _SampledLogits.run(hidden, weight, None, ids, ids, False)

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
