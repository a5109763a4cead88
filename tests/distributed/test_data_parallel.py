"""Processes with a part of the batch each: one step of all rows, row-sparse gradients, uneven batches."""

import copy
import math
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from same_answers import batch, check_equal
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from lastlayer import (
    AdaptiveSoftmax,
    FactoredOutput,
    FactoredSGD,
    HierarchicalSoftmax,
    LogUniform,
    SampledSoftmax,
    SphericalSoftmax,
    SquaredError,
    TreeSoftmax,
    ZLoss,
)
from lastlayer.distributed import GradientAverager, count_bytes
from lastlayer.layers.factored import optimizer as optimizers

MAKES = {
    "hierarchical": lambda: HierarchicalSoftmax(5, 23, sparse=True, dtype=torch.float64),
    "tree": lambda: TreeSoftmax(5, 13, sparse=True, dtype=torch.float64),
    "adaptive": lambda: AdaptiveSoftmax(6, 13, [4, 9], div_value=2.0, dtype=torch.float64),
    "sampled": lambda: SampledSoftmax(5, 13, LogUniform(13), 4, sparse=True, dtype=torch.float64),
}


def averages_are_equal(group, name):
    rank, size = group.rank(), group.size()
    layer = MAKES[name]()
    alone = [copy.deepcopy(layer) for _ in range(size)]
    hidden, targets = batch(layer, 4 * size)
    targets[:4] = 0  # the first process touches few rows, and no tail
    parts = [slice(4 * r, 4 * r + 4) for r in range(size)]
    for each, part in zip(alone, parts, strict=True):
        torch.manual_seed(0)
        each(hidden[part], targets[part]).backward()
    torch.manual_seed(0)
    layer(hidden[parts[rank]], targets[parts[rank]]).backward()
    with count_bytes() as sent:
        GradientAverager(layer, group)()
    assert (sent.total() > 0) == (size > 1)
    for key, parameter in layer.named_parameters():
        found = [each.get_parameter(key).grad for each in alone]
        if all(part is None for part in found):
            assert parameter.grad is None
            continue
        expected = sum(part.to_dense() for part in found if part is not None) / size
        check_equal(parameter.grad, expected, key)
        sparse = any(parameter is own for own in layer.sparse_parameters())
        assert parameter.grad.is_sparse == sparse
        assert not sparse or parameter.grad.is_coalesced()


@pytest.mark.parametrize("name", MAKES)
def test_averages(pool, name):
    for ranks in (1, 3):
        pool.run(averages_are_equal, ranks, name)


def uneven_batches(group):
    """Process r has r + 1 batches: `Join` with the encoder, and all end with the same parameters."""
    encoder = DistributedDataParallel(nn.Linear(5, 5, dtype=torch.float64), process_group=group)
    layer = MAKES["hierarchical"]()
    twins = copy.deepcopy(encoder.module), copy.deepcopy(layer)
    averager = GradientAverager(layer, group)

    def part(rank, number):
        generator = torch.Generator().manual_seed(10 * rank + number)
        inputs = torch.randn(4, 5, generator=generator, dtype=torch.float64)
        return inputs, torch.randint(23, (4,), generator=generator)

    optimizer = torch.optim.SGD([*encoder.parameters(), *layer.parameters()], lr=0.1)
    with Join([encoder, averager]):
        for number in range(group.rank() + 1):
            optimizer.zero_grad()
            inputs, targets = part(group.rank(), number)
            layer(encoder(inputs), targets).backward()
            averager()
            optimizer.step()
    optimizer = torch.optim.SGD([*twins[0].parameters(), *twins[1].parameters()], lr=0.1)
    for number in range(3):
        optimizer.zero_grad()
        for rank in range(number, 3):
            inputs, targets = part(rank, number)
            (twins[1](twins[0](inputs), targets) / 3).backward()
        optimizer.step()
    for own, twin in zip((encoder.module, layer), twins, strict=True):
        for name, parameter in own.named_parameters():
            check_equal(parameter, twin.get_parameter(name), name)


def test_uneven_batches(pool):
    pool.run(uneven_batches, 3)


LOSSES = {"squared": SquaredError(), "spherical": SphericalSoftmax(), "z": ZLoss()}


def factored_steps_are_equal(group, loss, bias):
    """Steps of each process's part, of several targets, one of them without a batch, are those of all rows."""
    rank, size = group.rank(), group.size()
    layer = FactoredOutput(6, 40, loss=LOSSES[loss], bias=bias, dtype=torch.float64)
    whole = copy.deepcopy(layer)
    own = FactoredSGD(layer, lr=0.5, weight_decay=0.01, max_norm=2.0, process_group=group)
    other = FactoredSGD(whole, lr=0.5, weight_decay=0.01, max_norm=2.0)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        hidden = torch.randn(size, 5, 6, generator=generator, dtype=torch.float64)
        targets = torch.randint(40, (size, 5, 2), generator=generator)
        missing = size - 1 if step == 2 and size > 1 else size
        own.zero_grad()
        other.zero_grad()
        leaf = hidden[rank].clone().requires_grad_()
        if rank != missing:
            layer(leaf, targets[rank]).backward()
        parts = [whole(hidden[r], targets[r]) / size for r in range(size) if r != missing]
        sum(parts).backward()
        own.step()
        other.step()
        check_equal(layer.weight, whole.weight, f"{loss}, step {step}", times=1000)
    first = layer.weight.clone()
    dist.broadcast(first, group=group, group_src=0)
    assert torch.equal(first, layer.weight), "the processes' layers drift apart"
    own.zero_grad()
    with pytest.raises(RuntimeError, match="without a backward"):
        own.step()


@pytest.mark.parametrize("ranks", [1, 3])
def test_factored_steps(pool, ranks):
    for loss in LOSSES:
        pool.run(factored_steps_are_equal, ranks, loss, loss == "squared")


def a_refusal_is_one_of_all(group):
    """A process that cannot plan the step: no other makes it, and all can make it afterwards."""
    layer = FactoredOutput(6, 40, loss=SquaredError(), dtype=torch.float64)
    own = FactoredSGD(layer, lr=0.02, process_group=group)
    before, targets = layer.weight, torch.arange(5) + group.rank()
    layer(torch.ones(5, 6, dtype=torch.float64) / 6, targets).backward()

    def fails(*_, **settings):
        raise ValueError("of one process alone")

    plan = fails if group.rank() == 1 else optimizers.plan_step
    with patch.object(optimizers, "plan_step", plan), pytest.raises(ValueError, match="of one process alone"):
        own.step()
    assert torch.equal(layer.weight, before)
    with count_bytes() as sent:
        own.step()
    assert not torch.equal(layer.weight, before)
    R, N, K, d = group.size(), 5, 1, 6
    numbers = N * (5 * d + 3 + 2 * K)  # of a loss that does not read the sum; and three facts, and an agreement
    assert sent.total() == (R - 1) * 8 * (numbers + 3) + round(2 * (R - 1) / R * 16)


def test_a_refusal_is_one_of_all(pool):
    pool.run(a_refusal_is_one_of_all, 3)


def encoder_and_factored_train_as_one(group):
    """As the page on FactoredOutput has it, beside an encoder in DistributedDataParallel."""
    rank, size = group.rank(), group.size()
    encoder, layer = nn.Linear(8, 8, dtype=torch.float64), FactoredOutput(8, 50, loss=SquaredError()).double()
    alone = copy.deepcopy(encoder), copy.deepcopy(layer)
    run = DistributedDataParallel(encoder, process_group=group)
    with pytest.warns(UserWarning, match="process_group"):
        FactoredSGD(copy.deepcopy(layer), 0.01)
    both = torch.optim.SGD(encoder.parameters(), 0.1), FactoredSGD(layer, 0.01, process_group=group)
    other = torch.optim.SGD(alone[0].parameters(), 0.1), FactoredSGD(alone[1], 0.01, process_group=None)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(size, 4, 8, generator=generator, dtype=torch.float64)
        targets = torch.randint(50, (size, 4), generator=generator)
        layer(run(inputs[rank]), targets[rank]).backward()
        alone[1](alone[0](inputs.flatten(0, 1)), targets.flatten()).backward()
        for optimizer in (*both, *other):
            optimizer.step()
            optimizer.zero_grad()
    check_equal(layer.weight, alone[1].weight, "weight", times=1000)
    check_equal(encoder.weight, alone[0].weight, "encoder", times=1000)


def test_encoder_and_factored(pool):
    pool.run(encoder_and_factored_train_as_one, 2)


def a_step_that_overflows_in_one_process(group):
    """Left out in all, where the anchor's gradient tells the others, as the page has it."""
    layer = FactoredOutput(8, 50)
    optimizer, scaler = FactoredSGD(layer, 0.5, process_group=group), torch.amp.GradScaler("cpu", init_scale=64.0)
    generator = torch.Generator().manual_seed(group.rank())
    for factor, trains in ((math.inf if group.rank() == 1 else 1.0, False), (1.0, True)):
        before = layer.weight
        loss = factor * layer(torch.randn(4, 8, generator=generator), torch.arange(4))
        scaler.scale(loss).backward()
        dist.all_reduce(layer.anchor.grad, group=group)
        layer.anchor.grad /= group.size()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(layer.weight, before) != trains
    assert scaler.get_scale() == 32
    first = layer.weight.clone()
    dist.broadcast(first, group=group, group_src=0)
    assert torch.equal(first, layer.weight)


def test_loss_scaling(pool):
    pool.run(a_step_that_overflows_in_one_process, 3)
