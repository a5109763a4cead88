"""The laws of second derivatives and of the transforms of `torch.func`."""

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.functional import hessian, hvp
from torch.func import functional_call, grad, jacrev, jvp, vmap

from lastlayer.layers.base import OutputLayer
from lastlayer.testing.cases import REDUCTIONS, Function, LayerCase, assert_equal, rows_for

UNUSED: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}


class _Call(NamedTuple):
    """One differentiable call of a layer as a curved scalar function, and the oracle's (None for sampled)."""

    name: str
    layer: OutputLayer
    hidden: Tensor
    ours: Function
    oracle: Function | None


def law_second_derivatives(case: LayerCase) -> None:
    """9a. Second derivatives are right, in every way that PyTorch has to form them; sampled ones agree."""
    for name, layer, hidden, ours, oracle in _calls(case):
        direction = _direction(hidden)
        by_one_way = _by_jvp if oracle is None and not _refuses(ours, hidden) else _by_grad
        expected = by_one_way(oracle or ours, hidden, direction)
        for way, product in WAYS.items():
            assert_equal(product(ours, hidden, direction), expected, name=f"{name} by {way}")
        leaves = [hidden.clone().requires_grad_(), *layer.parameters()]
        if oracle is not None:
            assert_equal(_of_all(ours, leaves), _of_all(oracle, leaves), name=f"{name}, all leaves")


def law_functional_transforms(case: LayerCase) -> None:
    """9b. `torch.func` gives what autograd gives: `grad`, `vmap`, `jvp`, `jacrev`, `functional_call`."""
    for name, _, hidden, ours, oracle in _calls(case):
        if oracle is None and _refuses(ours, hidden):
            continue
        direction, expected = _direction(hidden), oracle or ours
        (slope,) = torch.autograd.grad(expected(leaf := hidden.clone().requires_grad_()), leaf)
        assert_equal(grad(ours)(hidden), slope, name=f"{name} by func.grad")
        assert_equal(jvp(ours, (hidden,), (direction,))[1], (slope * direction).sum(), name=f"{name} by func.jvp")
        twice = _by_grad(expected, hidden, direction)
        assert_equal(_by_jvp(ours, hidden, direction), twice, name=f"{name} by jvp of grad")
    _check_per_example(case)
    if case.likelihood:
        _check_per_example_gradients(case)
        _check_replaced_parameters(case)


def _calls(case: LayerCase) -> Iterator[_Call]:
    for reduction in REDUCTIONS:
        layer = case.build(reduction=reduction)
        # a sampled loss draws nothing for an ignored row, where it can read that it is
        hidden, targets = rows_for(layer, 3, ignored=1 if case.likelihood else None)
        if not case.likelihood:

            def sampled(hidden: Tensor, layer: OutputLayer = layer, targets: Tensor = targets) -> Tensor:
                torch.manual_seed(0)  # the same classes drawn from the same state each time
                return copy.deepcopy(layer)(hidden, targets)

            yield _Call(f"loss, {reduction}", layer, hidden, partial(_curved, sampled), None)
        for name, (call, oracle) in case.calls(layer, targets).items():
            if name == "loss" or reduction == "none":
                functions = partial(_curved, call), partial(_curved, oracle)
                yield _Call(f"{name}, {reduction}", layer, hidden, *functions)


def _curved(call: Function, hidden: Tensor) -> Tensor:
    """One number of all results, and of hidden, as those of a single class depend on nothing."""
    return _weighted_squares(call(hidden)) + 0.1 * hidden.square().sum()


def _weighted_squares(values: Tensor) -> Tensor:
    weights = torch.linspace(0.5, 2.0, values.numel()).to(values).reshape(values.shape)
    return (values.square() * weights).sum()


def _refuses(call: Function, hidden: Tensor) -> bool:
    """Whether a sampled loss refuses to be transformed, in an error that names the library."""
    try:
        grad(call)(hidden)
    except RuntimeError as refusal:
        if "lastlayer" not in str(refusal):
            raise
        return True
    return False


def _direction(hidden: Tensor) -> Tensor:
    return torch.linspace(-1.0, 2.0, hidden.numel(), dtype=hidden.dtype).reshape(hidden.shape)


# The ways to compute a Hessian times a vector.


def _by_grad(call: Function, hidden: Tensor, direction: Tensor) -> Tensor:
    leaf = hidden.clone().requires_grad_()
    (slope,) = torch.autograd.grad(call(leaf), leaf, create_graph=True)
    product = (slope * direction).sum()
    torch.autograd.grad(product, leaf, retain_graph=True, materialize_grads=True)  # a graph may be walked twice
    return torch.autograd.grad(product, leaf, materialize_grads=True)[0]


def _by_backward(call: Function, hidden: Tensor, direction: Tensor, only: bool = False) -> Tensor:
    """By `backward`, of all leaves or of hidden states only."""
    leaf = hidden.clone().requires_grad_()
    inputs = [leaf] if only else None
    call(leaf).backward(create_graph=True, inputs=inputs)
    slope, leaf.grad = leaf.grad, None
    assert slope is not None
    (slope * direction).sum().backward(inputs=inputs)
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.detach()


def _by_jvp(call: Function, hidden: Tensor, direction: Tensor) -> Tensor:
    return jvp(grad(call), (hidden,), (direction,))[1]


def _by_hessian(call: Function, hidden: Tensor, direction: Tensor) -> Tensor:
    return torch.tensordot(hessian(call, hidden, vectorize=True), direction, hidden.dim())


WAYS = {
    "autograd.grad": _by_grad,
    "backward": _by_backward,
    "backward(inputs=)": partial(_by_backward, only=True),
    "functional.hvp": lambda *arguments: hvp(*arguments)[1],
    "functional.hessian(vectorize=True)": _by_hessian,
}


def _of_all(call: Function, leaves: list[Tensor]) -> list[Tensor]:
    """Second derivatives for hidden and all parameters, of one number that all first ones enter."""
    first = torch.autograd.grad(call(leaves[0]), leaves, create_graph=True, materialize_grads=True)
    total = torch.stack([_weighted_squares(part.to_dense()) for part in first]).sum()
    return [part.to_dense() for part in torch.autograd.grad(total, leaves, **UNUSED)]


def _check_per_example(case: LayerCase) -> None:
    """`vmap` over examples, of all log-probabilities and of their derivatives."""
    layer = case.build()
    hidden, _ = rows_for(layer, 3)
    assert_equal(vmap(layer.log_prob)(hidden), case.oracle(layer, hidden), name="vmap(log_prob)")
    rows = torch.autograd.functional.jacobian(lambda h: case.oracle(layer, h).sum(0), hidden)
    assert_equal(vmap(jacrev(layer.log_prob))(hidden), rows.transpose(0, 1), name="vmap(jacrev(log_prob))")


def _check_per_example_gradients(case: LayerCase) -> None:
    """`vmap(grad(loss))` over examples, of all parameters."""
    layer = case.build(reduction="sum")
    hidden, targets = rows_for(layer, 3)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], hidden: Tensor, target: Tensor) -> Tensor:
        return functional_call(layer, parameters, (hidden, target))

    found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, hidden, targets)
    for row in range(len(hidden)):
        alone = _slopes(layer, case.loss(layer, hidden[row : row + 1], targets[row : row + 1]))
        assert_equal([found[name][row] for name in parameters], alone, name="vmap(grad(loss))")


def _check_replaced_parameters(case: LayerCase) -> None:
    """A backward pass after `functional_call` uses the parameters of that call."""
    for reduction in ("sum", "none"):
        layer, moved = case.build(reduction=reduction), case.build(reduction=reduction)
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter.mul_(0.7)
        hidden, targets = rows_for(layer, 4)
        parameters = {name: p.detach().clone().requires_grad_() for name, p in moved.named_parameters()}
        loss = functional_call(layer, parameters, (hidden, targets)).sum() + _nothing(parameters.values())
        found = torch.autograd.grad(loss, list(parameters.values()), **UNUSED)
        own = _slopes(moved, case.loss(moved, hidden, targets).sum())
        assert_equal([part.to_dense() for part in found], own, name="functional_call")


def _slopes(layer: OutputLayer, loss: Tensor) -> list[Tensor]:
    """The gradients of all parameters."""
    parameters = list(layer.parameters())
    return list(torch.autograd.grad(loss + _nothing(parameters), parameters, **UNUSED))


def _nothing(parameters: Any) -> Tensor:
    """0, which depends on the parameters, as the loss of a single class does not."""
    return torch.stack([0 * parameter.sum() for parameter in parameters]).sum()
