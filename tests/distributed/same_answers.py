"""A sharded layer beside the whole one: every call must give the same, to rounding."""

import copy

import torch
from torch.testing import assert_close

from lastlayer.distributed import shard

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


def whole(tensor):
    """A DTensor in full; others as they are."""
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.to_dense() if isinstance(tensor, torch.Tensor) else tensor


def check_equal(actual, expected, name, times=1):
    close = times * TOLERANCE[expected.dtype] if expected.is_floating_point() else 0
    assert_close(
        whole(actual), whole(expected), rtol=close, atol=close, equal_nan=True, msg=lambda m: f"{name}: {m}"
    )


def gradients(layer, hidden, call):
    """The result of `call(layer, hidden)`, and the gradients of hidden and of all parameters, by name."""
    layer.zero_grad()
    leaf = hidden.clone().requires_grad_()
    result = call(layer, leaf)
    weights = torch.linspace(0.5, 2.0, result.numel()).to(result).reshape(result.shape)
    (result.masked_fill(result == -torch.inf, 0) * weights).sum().backward()
    found = {"result": result.detach(), "hidden": leaf.grad}
    for name, parameter in layer.named_parameters():
        gradient = whole(parameter.grad)
        found[name] = torch.zeros(parameter.shape, dtype=parameter.dtype) if gradient is None else gradient.clone()
    return found


def check_calls(layer, sharded, hidden, targets, calls, name):
    """Results and gradients of some calls, of which each takes a layer and hidden states."""
    for call, function in calls.items():
        expected, actual = (gradients(each, hidden, function) for each in (layer, sharded))
        for part, value in expected.items():
            check_equal(actual[part], value, f"{name}, {call}, {part}")


def queries(layer, hidden, targets):
    """The calls that every layer with probabilities has."""
    V, N = layer.num_classes, len(hidden)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(V, (N, 4), generator=generator)
    ids[:, 1::2] = layer.ignore_index
    mask = torch.rand(V, generator=generator) < 0.6
    mask[-1] = True
    return {
        "log_prob": lambda layer, h: layer.log_prob(h),
        "target_log_prob": lambda layer, h: layer.target_log_prob(h, targets),
        "score": lambda layer, h: layer.score(h, ids),
        "topk": lambda layer, h: layer.topk(h, min(3, V)).log_prob,
        "topk of all": lambda layer, h: layer.topk(h, V).log_prob,
        "topk of a selection": lambda layer, h: layer.topk(h, min(3, V), exclude=ids, allowed=mask).log_prob,
    }


def check_indices(layer, sharded, hidden, name):
    """Indices without gradients, and draws with the same random numbers."""
    k = min(4, layer.num_classes)
    with torch.no_grad():
        expected, actual = (each.topk(hidden, k) for each in (layer, sharded))
    check_equal(actual.log_prob, expected.log_prob, f"{name}, topk without gradients")
    check_equal(actual.indices, expected.indices, f"{name}, indices of topk")
    draws = []
    for each in (layer, sharded):
        torch.manual_seed(3)
        draws.append(each.sample(hidden, 5))
    check_equal(draws[1], draws[0], f"{name}, sample")


def make_sharded(layer, group):
    """The sharded copy of a layer."""
    return shard(copy.deepcopy(layer), group)


def batch(layer, rows, targets=None, dtype=torch.float64):
    """Hidden states and targets, the same on every rank."""
    generator = torch.Generator().manual_seed(11)
    hidden = torch.randn(rows, layer.in_features, generator=generator, dtype=torch.float64).to(dtype)
    ids = torch.randint(layer.num_classes, (rows,), generator=generator)
    return hidden, ids if targets is None else targets
