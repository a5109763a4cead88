"""`shard`: what it refuses, what it keeps, and its parameters under PyTorch's own tools."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from same_answers import batch, check_equal, make_sharded, whole
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.utils import clip_grad_norm_

from lastlayer import PLIF, FullSoftmax, SampledSoftmax, Uniform
from lastlayer.distributed import shard


def full(V=11, dtype=torch.float64, seed=1, **options):
    torch.manual_seed(seed)
    return FullSoftmax(5, V, dtype=dtype, logit_map=PLIF(6, 2.0, init_std=1.0), **options)


def parameters_are_dtensors(group):
    layer = make_sharded(full(class_weights=torch.ones(11)), group)
    assert all(isinstance(tensor, DTensor) for tensor in layer.state_dict().values())
    assert set(layer.state_dict()) == set(full(class_weights=torch.ones(11)).state_dict())
    assert layer.weight.placements == (Shard(0),)
    assert layer.weight.shape == (11, 5)
    assert layer.weight.to_local().shape[0] == [4, 4, 3][group.rank()]
    assert layer.bias.to_local().untyped_storage().nbytes() == 8 * layer.bias.to_local().numel()


def training_is_equal(group):
    """Steps with clipped gradients, AdamW and its state."""
    layer = full(label_smoothing=0.1)
    sharded = make_sharded(layer, group)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=0.1) for each in (layer, sharded)]
    hidden, targets = batch(layer, 6)
    for _ in range(3):
        norms = []
        for each, optimizer in zip((layer, sharded), optimizers, strict=True):
            optimizer.zero_grad()
            each(hidden, targets).backward()
            norms.append(whole(clip_grad_norm_(each.parameters(), 0.1)))
            optimizer.step()
        check_equal(norms[1], norms[0], "norm of the gradients")
    for name, parameter in layer.named_parameters():
        check_equal(sharded.get_parameter(name), parameter, name, times=1000)  # AdamW divides by small gradients


def plain_state_loads(group):
    layer, sharded = full(), make_sharded(full(seed=2), group)
    sharded.load_state_dict(layer.state_dict())
    for twin in (sharded, copy.deepcopy(sharded)):
        check_equal(twin.log_prob(batch(layer, 4)[0]), layer.log_prob(batch(layer, 4)[0]), "loaded")
    before = sharded.weight.full_tensor()
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        sharded.load_state_dict(full(V=12).state_dict())
    assert torch.equal(sharded.weight.full_tensor(), before)


def pickles(group):
    layer = make_sharded(full(), group)
    twin = pickle.loads(pickle.dumps(layer))
    check_equal(twin.weight, layer.weight, "pickled")


def casts(group):
    layer = make_sharded(full(), group).to(torch.float32)
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    hidden, targets = batch(layer, 4, dtype=torch.float32)
    check_equal(layer(hidden, targets), full().float()(hidden, targets), "float32")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(hidden, targets).dtype == torch.float32
    half = full().to(torch.bfloat16)
    hidden = hidden.to(torch.bfloat16)
    torch.testing.assert_close(
        make_sharded(half, group)(hidden, targets), half(hidden, targets), rtol=0.02, atol=0.02
    )


@pytest.mark.parametrize("check", [parameters_are_dtensors, training_is_equal, plain_state_loads, pickles, casts])
def test_parameters(pool, check):
    pool.run(check, 3)


def save(group, folder, seed):
    dcp.save(
        {"layer": make_sharded(full(seed=seed), group).state_dict()}, checkpoint_id=folder, process_group=group
    )


def load(group, folder, seed, V=11):
    layer = make_sharded(full(V=V, seed=seed + 1), group)
    state = {"layer": layer.state_dict()}
    dcp.load(state, checkpoint_id=folder, process_group=group)
    layer.load_state_dict(state["layer"])
    for name, parameter in full(seed=seed).named_parameters():
        check_equal(layer.get_parameter(name), parameter, name)


def load_of_other_classes(group, folder):
    with pytest.raises(dcp.CheckpointException, match="Size mismatch"):
        load(group, folder, 3, V=12)


def test_checkpoint_of_three_ranks_loads_on_others(pool, tmp_path):
    folder = str(tmp_path / "checkpoint")
    pool.run(save, 3, folder, 3)
    for ranks in (3, 2, 1):
        pool.run(load, ranks, folder, 3)
    pool.run(load_of_other_classes, 3, folder)


def layers_differ(group):
    rank = group.rank()
    for message, layer in {
        "num_classes differs: rank 0 has 11, rank 1 has 12": full(V=11 + (rank == 1)),
        "weight differs": full(seed=rank),
        "label_smoothing differs": full(label_smoothing=0.1 * rank),
        "rank 2 has torch.float32": full(dtype=torch.float32 if rank == 2 else torch.float64),
        "type differs": full() if rank else SampledSoftmax(5, 11, Uniform(11), 3),
    }.items():
        with pytest.raises(ValueError, match=f"same layer, but .*{message}"):
            shard(layer, group)


def inputs_differ(group):
    rank = group.rank()
    layer = full()
    hidden, targets = batch(layer, 6)
    for name, arguments in {
        "hidden": (hidden[: 6 - rank], targets[: 6 - rank]),
        "hidden, in its values": (hidden + rank, targets),
        "targets": (hidden, (targets + rank) % 11),
        "hidden, in its gradient": (hidden.clone().requires_grad_(rank == 1), targets),
    }.items():
        with pytest.raises(ValueError, match=f"same input, but {name.split(',')[0]} differs"):
            make_sharded(layer, group)(*arguments)
    sharded = make_sharded(layer, group)
    with pytest.raises(ValueError, match="call differs"):
        sharded(hidden, targets) if rank else sharded.topk(hidden, 2)


def test_ranks_that_differ(pool):
    pool.run(layers_differ, 3)
    pool.run(inputs_differ, 3)


def bad_input(group):
    layer = make_sharded(full(), group)
    hidden, targets = batch(layer, 6)
    for error, argument, call in [
        (ValueError, "hidden", lambda: layer(hidden[:, :-1], targets)),
        (IndexError, "targets", lambda: layer(hidden, targets + 11)),
        (ValueError, "k", lambda: layer.topk(hidden, 12)),
        (ValueError, "num_samples", lambda: layer.sample(hidden, 0)),
        (IndexError, "ids", lambda: layer.score(hidden, targets[:, None] + 11)),
        (ValueError, "finite logits", lambda: layer.sample(hidden * torch.nan, 1)),
        (TypeError, "sharded already", lambda: shard(layer, group)),
        (TypeError, "mesh_or_group", lambda: shard(full(), "world")),
        (TypeError, "OutputLayer", lambda: shard(torch.nn.Linear(2, 3), group)),
        (ValueError, "dimension", lambda: shard(full(), DeviceMesh("cpu", [[[0], [1], [2]]]))),
    ]:
        with pytest.raises(error, match=argument):
            call()


def test_bad_input(pool):
    pool.run(bad_input, 3)


def test_without_a_group():
    with pytest.raises(RuntimeError, match="torchrun"):
        shard(full())


def group_of_one(group):
    layer = full()
    sharded = shard(layer, group)
    hidden, targets = batch(layer, 6)
    check_equal(sharded(hidden, targets), layer(hidden, targets), "a group of one")
    assert sharded.weight.to_local().shape == (11, 5)


def test_group_of_one(pool):
    pool.run(group_of_one, 1)


def copies_average(group):
    """A mesh of 2 x 1: each of two processes has its own data, and the gradients are the means."""
    mesh = DeviceMesh("cpu", [[0], [1]])
    layer = full()
    sharded = shard(copy.deepcopy(layer), mesh)
    hidden, targets = batch(layer, 6)
    mine = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3)
    sharded(hidden[mine], targets[mine]).backward()
    layer(hidden, targets).backward()
    for name, parameter in layer.named_parameters():
        check_equal(sharded.get_parameter(name).grad, parameter.grad, name)


def test_two_dimensions(pool):
    pool.run(copies_average, 2)
