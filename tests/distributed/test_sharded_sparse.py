"""Sharded layers with row-sparse gradients: those of one process, and the optimizers that take them."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from same_answers import batch, check_equal, make_sharded
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lastlayer import HierarchicalSoftmax, LogUniform, OneVsAll, SampledSoftmax, Uniform
from lastlayer.distributed import shard
from lastlayer.testing.cases import spread_parameters

V = 23
MAKES = {
    "hierarchical": lambda: HierarchicalSoftmax(5, V, sparse=True, dtype=torch.float64),
    "hierarchical, four classes": lambda: HierarchicalSoftmax(5, 4, sparse=True, bias=False, dtype=torch.float64),
    "sampled": lambda: SampledSoftmax(5, V, LogUniform(V), 4, sparse=True, dtype=torch.float64),
    "sampled for each row": lambda: SampledSoftmax(
        5, V, Uniform(V, shared=False), 2, sparse=True, dtype=torch.float64
    ),
    "sampled of four classes": lambda: SampledSoftmax(5, 4, Uniform(4), 2, sparse=True, dtype=torch.float64),
    "one against all": lambda: OneVsAll(5, V, sampler=Uniform(V), num_samples=4, sparse=True, dtype=torch.float64),
}
OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, 0.1),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, 0.1),
    "SparseAdam": lambda parameters: torch.optim.SparseAdam(parameters, 0.1),
}


def optimizers(layer, name):
    """One for the parameters with row-sparse gradients, and one for the others if there are any."""
    sparse = layer.sparse_parameters()
    dense = [p for p in layer.parameters() if not any(p is part for part in sparse)]
    return [OPTIMIZERS[name](sparse), *([torch.optim.SGD(dense, 0.1)] if dense else [])]


def loss_of(layer, hidden, targets):
    torch.manual_seed(5)
    return layer(hidden, targets)


def training_is_equal(group, name, optimizer):
    torch.manual_seed(1)
    layer = MAKES[name]()
    spread_parameters(layer)
    sharded = make_sharded(layer, group)
    own = sharded.ranks.span(layer.num_classes)
    assert len(sharded.sparse_parameters()) == len(layer.sparse_parameters()) > 0
    both = [(each, optimizers(each, optimizer)) for each in (layer, sharded)]
    for step, targets in enumerate(([0, 1, 1, 3], [2, 2, 2, 2], [-100, -100, -100, 1], [3, 0, -100, 1])):
        hidden, targets, slopes = batch(layer, 4)[0] + step, torch.tensor(targets), []
        for each, steps in both:
            each.zero_grad()
            leaf = hidden.clone().requires_grad_()
            loss_of(each, leaf, targets).backward()
            slopes.append(leaf.grad)
            assert all(part.grad is not None and part.grad.is_sparse for part in each.sparse_parameters())
            for one in steps:
                one.step()
        check_equal(slopes[1], slopes[0], f"{name}, step {step}, hidden", times=1000)
        for expected, found in zip(layer.sparse_parameters(), sharded.sparse_parameters(), strict=True):
            check_equal(found.grad, expected.grad.to_dense()[own], f"{name}, step {step}, gradient", times=1000)
            check_equal(found.detach(), expected.detach()[own], f"{name}, step {step}", times=1000)
    for key, tensor in layer.state_dict().items():
        check_equal(sharded.state_dict()[key], tensor, key, times=1000)


@pytest.mark.parametrize("name", MAKES)
def test_training(pool, name):
    for optimizer in OPTIMIZERS:
        pool.run(training_is_equal, 3, name, optimizer)
    pool.run(training_is_equal, 1, name, "SGD")


def states(group, folder):
    """The state has DTensors, which checkpoints divide among other ranks; the state of the whole layer loads."""
    torch.manual_seed(1)
    layer = MAKES["hierarchical"]()
    sharded = make_sharded(layer, group)
    for key in ("weight", "bias"):
        assert isinstance(sharded.state_dict()[key], DTensor)
        assert not isinstance(sharded.get_parameter(key), DTensor)
    dcp.save({"layer": sharded.state_dict()}, checkpoint_id=folder, process_group=group)
    for twin in (copy.deepcopy(sharded), shard(MAKES["hierarchical"](), group)):
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        dcp.load({"layer": twin.state_dict()}, checkpoint_id=folder, process_group=group)
        check_equal(twin.log_prob(batch(layer, 4)[0]), layer.log_prob(batch(layer, 4)[0]), "in place")
        twin.load_state_dict(layer.state_dict())
        twin.load_state_dict(sharded.state_dict())
        check_equal(twin.log_prob(batch(layer, 4)[0]), layer.log_prob(batch(layer, 4)[0]), "loaded")
    before = sharded.weight.clone()
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        sharded.load_state_dict({**layer.state_dict(), "weight": sharded.weight.detach()})
    assert torch.equal(sharded.weight, before)


def test_states(pool, tmp_path):
    pool.run(states, 3, str(tmp_path / "checkpoint"))


def copies_average(group, name):
    """Each of two processes has its own data; one touches classes that the other does not."""
    mesh = DeviceMesh("cpu", [[0], [1]])
    torch.manual_seed(1)
    layer = MAKES[name]()
    sharded = shard(copy.deepcopy(layer), mesh)
    hidden, targets = batch(layer, 6)
    targets[:3] = 0
    parts = [slice(0, 3), slice(3, 6)]
    sum(loss_of(layer, hidden[part], targets[part]) / 2 for part in parts).backward()
    mine = parts[group.rank()]
    loss_of(sharded, hidden[mine], targets[mine]).backward()
    for key, parameter in layer.named_parameters():
        found = sharded.get_parameter(key).grad
        assert found.is_sparse == parameter.grad.is_sparse
        check_equal(found, parameter.grad.to_dense(), key)


def test_copies(pool):
    for name in ("hierarchical", "sampled", "one against all"):
        pool.run(copies_average, 2, name)
