"""Checkpoints of a sharded `FactoredOutput` and its optimizer, for other numbers of ranks and for one process."""

import copy
import io

import pytest
import torch
import torch.distributed.checkpoint as dcp
from same_answers import batch, check_equal, make_sharded

from lastlayer import FactoredOutput, FactoredSGD, TaylorSoftmax
from lastlayer.distributed import shard


def make(V=11, seed=1):
    torch.manual_seed(seed)
    return FactoredOutput(5, V, loss=TaylorSoftmax(), bias=True, dtype=torch.float64)


def train(layer, optimizer, steps):
    hidden, targets = batch(layer, 6)
    for step in range(steps):
        layer(hidden, (targets + step) % layer.num_classes).backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(steps=4):
    """Of one process; every process can compute it."""
    layer = make()
    optimizer = FactoredSGD(layer, 0.1)
    train(layer, optimizer, steps)
    return layer, optimizer


def state_of(layer, optimizer):
    return {"layer": layer.state_dict(), "optimizer": optimizer.state_dict()}


def save(group, folder):
    layer = make_sharded(make(), group)
    optimizer = FactoredSGD(layer, 0.1)
    train(layer, optimizer, 4)
    dcp.save(state_of(layer, optimizer), checkpoint_id=folder, process_group=group)


def load(group, folder, V=11):
    layer = make_sharded(make(V, seed=2), group)
    optimizer = FactoredSGD(layer, 0.3)
    state = state_of(layer, optimizer)
    dcp.load(state, checkpoint_id=folder, process_group=group)
    layer.load_state_dict(state["layer"])
    optimizer.load_state_dict(state["optimizer"])
    assert optimizer.param_groups[0]["lr"] == 0.1
    expected, own = trained()
    check_equal(layer.weight, expected.weight, "the weight")
    check_equal(layer.state.tensors()["factor"], expected.state.factor, "the factor: U is not I", times=10)
    assert layer._stabilizer.counters()["gram_rows"] == expected._stabilizer.counters()["gram_rows"]
    train(expected, own, 2)
    train(layer, optimizer, 2)
    check_equal(layer.weight, expected.weight, "trained on")
    if group.size() == 3:
        straight = make_sharded(make(), group)
        optimizer = FactoredSGD(straight, 0.1)
        train(straight, optimizer, 4)
        train(straight, optimizer, 2)
        assert torch.equal(straight.state.factor, layer.state.factor), "not bit for bit"


def load_of_other_classes(group, folder):
    with pytest.raises(dcp.CheckpointException, match="Size mismatch"):
        load(group, folder, V=12)


def test_checkpoint_of_three_ranks_loads_on_others(pool, tmp_path):
    folder = str(tmp_path / "checkpoint")
    pool.run(save, 3, folder)
    for ranks in (3, 2, 1):
        pool.run(load, ranks, folder)
    pool.run(load_of_other_classes, 3, folder)


def state_of_one_process_loads(group):
    """Of a trained layer and its optimizer, also where the layer itself is divided in the middle of training."""
    layer, optimizer = trained()
    loaded = make_sharded(make(seed=2), group)
    own = FactoredSGD(loaded, 0.1)
    loaded.load_state_dict(layer.state_dict())
    own.load_state_dict(optimizer.state_dict())
    divided = shard(layer, group)
    for each in (loaded, divided, copy.deepcopy(divided)):
        assert torch.equal(each.state.tensors()["factor"].full_tensor(), layer.state.factor)
        assert torch.equal(each.state.reading, layer.state.reading)
        check_equal(each.weight, layer.weight, "the weight")
    train(layer, optimizer, 2)
    check_equal(divided.weight, trained()[0].weight, "a sharded layer shares nothing with the whole one")
    for each, optimizer in ((loaded, own), (divided, FactoredSGD(divided, 0.1))):
        train(each, optimizer, 2)
        check_equal(each.weight, layer.weight, "trained on")
    single = divided.to(torch.float32)
    assert single.state.factor.dtype == single.weight.dtype == torch.float32
    check_equal(single.weight, layer.weight.float(), "cast")
    with pytest.raises(RuntimeError, match="weight must have shape"):
        single.load_state_dict(make(V=12).state_dict())


def test_state_of_one_process(pool):
    for ranks in (2, 3):
        pool.run(state_of_one_process_loads, ranks)


def made_on_meta(group):
    """Without memory first, as large models are made, and then loaded."""
    layer, _ = trained()
    sharded = shard(
        FactoredOutput(5, 11, loss=TaylorSoftmax(), bias=True, dtype=torch.float64, device="meta"), group
    )
    assert sharded.state.factor.is_meta
    assert sharded.anchor.is_meta
    sharded.to_empty(device="cpu")
    sharded.load_state_dict(layer.state_dict())
    check_equal(sharded.weight, layer.weight, "the weight")
    own, whole = FactoredSGD(sharded, 0.1), FactoredSGD(layer, 0.1)
    train(sharded, own, 2)
    train(layer, whole, 2)
    check_equal(sharded.weight, layer.weight, "trained on")


def test_made_on_meta(pool):
    pool.run(made_on_meta, 3)


def other_factors_are_left_out(group):
    """Those of a weight that differs in one rank's rows: all ranks keep their own, and warn."""
    layer = make_sharded(make(), group)
    optimizer = FactoredSGD(layer, 0.1)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    weight = layer.weight.full_tensor()
    weight[-1] += 1
    layer.set_weight(weight)
    with pytest.warns(UserWarning, match="of another weight"):
        optimizer.load_state_dict(saved)
    check_equal(layer.weight, weight, "kept")


def test_factors_of_another_weight(pool):
    pool.run(other_factors_are_left_out, 3)
