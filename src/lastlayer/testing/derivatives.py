"""The laws of second derivatives and of the transforms of `torch.func`."""

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.functional import hessian, hvp
from torch.func import functional_call, grad, jacrev, jvp, vmap

from lastlayer.layers.base import OutputLayer
from lastlayer.testing.cases import LayerCase
from lastlayer.testing.rows import assert_equal, rows_for

Scalar = Callable[[Tensor], Tensor]


class _Call(NamedTuple):
    """One differentiable call of a layer as a curved scalar function, and the oracle's (None for sampled)."""

    name: str
    layer: OutputLayer
    hidden: Tensor
    ours: Scalar
    oracle: Scalar | None


def law_second_derivatives(case: LayerCase) -> None:
    """9a. Second derivatives are right, in every way that PyTorch has to form them; sampled ones agree."""
    for name, layer, hidden, ours, oracle in _calls(case):
        direction = _direction(hidden)
        expected = (_by_jvp if oracle is None and not _refuses(ours, hidden) else _by_grad)(
            oracle or ours, hidden, direction
        )
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
    _check_per_example_gradients(case)
    _check_replaced_parameters(case)


def _calls(case: LayerCase) -> Iterator[_Call]:
    for reduction in ("mean", "sum", "none"):
        layer = case.build(reduction=reduction)
        hidden, targets = rows_for(layer, 3)
        if case.likelihood:  # a sampled loss draws nothing for such a row, where it can read it
            targets[1] = layer.ignore_index

        def loss(hidden: Tensor, layer: OutputLayer = layer, targets: Tensor = targets) -> Tensor:
            if not case.likelihood:  # the same classes drawn from the same state each time
                torch.manual_seed(0)
                layer = copy.deepcopy(layer)
            return _curved(layer(hidden, targets), hidden)

        def exact(hidden: Tensor, layer: OutputLayer = layer, targets: Tensor = targets) -> Tensor:
            return _curved(case.loss(layer, hidden, targets), hidden)

        yield _Call(f"loss, reduction={reduction!r}", layer, hidden, loss, exact if case.likelihood else None)
    ids, k = targets.clamp(min=0)[:, None], min(2, layer.num_classes)
    others = {
        "target_log_prob": (lambda h: layer.target_log_prob(h, ids[:, 0])[:, None], lambda lp: lp.gather(1, ids)),
        "log_prob": (layer.log_prob, lambda lp: lp),
        "topk": (lambda h: layer.topk(h, k).log_prob, lambda lp: lp.topk(k).values),
        "score": (lambda h: layer.score(h, ids), lambda lp: lp.gather(1, ids)),
    }
    for name, (call, pick) in others.items():
        oracle = lambda h, pick=pick: _curved(pick(case.oracle(layer, h)), h)  # noqa: E731
        yield _Call(name, layer, hidden, lambda h, call=call: _curved(call(h), h), oracle)


def _curved(values: Tensor, hidden: Tensor) -> Tensor:
    """One number of all values, and of hidden, as those of a single class depend on nothing."""
    weights = torch.linspace(0.5, 2.0, values.numel()).to(values).reshape(values.shape)
    return (values.square() * weights).sum() + 0.1 * hidden.square().sum()


def _refuses(call: Scalar, hidden: Tensor) -> bool:
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


def _by_grad(call: Scalar, hidden: Tensor, direction: Tensor) -> Tensor:
    leaf = hidden.clone().requires_grad_()
    (slope,) = torch.autograd.grad(call(leaf), leaf, create_graph=True)
    return torch.autograd.grad((slope * direction).sum(), leaf, materialize_grads=True)[0]


def _by_backward(call: Scalar, hidden: Tensor, direction: Tensor) -> Tensor:
    leaf = hidden.clone().requires_grad_()
    call(leaf).backward(create_graph=True)
    slope, leaf.grad = leaf.grad, None
    assert slope is not None
    (slope * direction).sum().backward()
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.detach()


def _by_backward_of_inputs(call: Scalar, hidden: Tensor, direction: Tensor) -> Tensor:
    leaf = hidden.clone().requires_grad_()
    call(leaf).backward(create_graph=True, inputs=[leaf])
    slope, leaf.grad = leaf.grad, None
    assert slope is not None
    (slope * direction).sum().backward(inputs=[leaf])
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.detach()


def _by_jvp(call: Scalar, hidden: Tensor, direction: Tensor) -> Tensor:
    return jvp(grad(call), (hidden,), (direction,))[1]


def _by_hessian(call: Scalar, hidden: Tensor, direction: Tensor, vectorize: bool = False) -> Tensor:
    return torch.tensordot(hessian(call, hidden, vectorize=vectorize), direction, hidden.dim())


WAYS = {
    "autograd.grad": _by_grad,
    "backward": _by_backward,
    "backward(inputs=)": _by_backward_of_inputs,
    "functional.hvp": lambda *arguments: hvp(*arguments)[1],
    "functional.hessian": _by_hessian,
    "functional.hessian(vectorize=True)": lambda *arguments: _by_hessian(*arguments, vectorize=True),
}


def _of_all(call: Scalar, leaves: list[Tensor]) -> list[Tensor]:
    """Second derivatives for hidden and all parameters, of one number that all first ones enter."""
    first = torch.autograd.grad(call(leaves[0]), leaves, create_graph=True, materialize_grads=True)
    total = torch.stack([_curved(part.to_dense(), leaves[0]) for part in first]).sum()
    second = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return [part.to_dense() for part in second]


def _nothing(layer: OutputLayer) -> Tensor:
    """0, which depends on the parameters, as the loss of a single class does not."""
    return torch.stack([0 * parameter.sum() for parameter in layer.parameters()]).sum()


def _check_per_example_gradients(case: LayerCase) -> None:
    """`vmap(grad(loss))` over examples, of all parameters; a sampled loss must not be one draw for all of them."""
    layer = case.build(reduction="sum")
    hidden, targets = rows_for(layer, 3)
    together = vmap(layer.log_prob)(hidden)
    assert_equal(together, case.oracle(layer, hidden), name="vmap(log_prob)")
    slopes = vmap(jacrev(layer.log_prob))(hidden)
    rows = torch.autograd.functional.jacobian(lambda h: case.oracle(layer, h).sum(0), hidden)
    assert_equal(slopes, rows.transpose(0, 1), name="vmap(jacrev(log_prob))")
    if not case.likelihood:
        return
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], hidden: Tensor, target: Tensor) -> Tensor:
        return functional_call(layer, parameters, (hidden, target))

    found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, hidden, targets)
    for row in range(len(hidden)):
        alone = case.loss(layer, hidden[row : row + 1], targets[row : row + 1]) + _nothing(layer)
        own = torch.autograd.grad(alone, list(layer.parameters()), allow_unused=True, materialize_grads=True)
        assert_equal([found[name][row] for name in parameters], list(own), name="vmap(grad(loss))")


def _check_replaced_parameters(case: LayerCase) -> None:
    """A backward pass after `functional_call` uses the parameters of that call."""
    if not case.likelihood:
        return
    for reduction in ("sum", "none"):
        layer, moved = case.build(reduction=reduction), case.build(reduction=reduction)
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter.mul_(0.7)
        hidden, targets = rows_for(layer, 4)
        parameters = {name: p.detach().clone().requires_grad_() for name, p in moved.named_parameters()}
        loss = functional_call(layer, parameters, (hidden, targets)).sum() + _nothing(layer)
        options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
        found = torch.autograd.grad(loss, list(parameters.values()), **options)
        own = torch.autograd.grad(
            case.loss(moved, hidden, targets).sum() + _nothing(moved), list(moved.parameters()), **options
        )
        assert_equal([part.to_dense() for part in found], list(own), name="functional_call")
