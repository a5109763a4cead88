"""`FactoredOutput` with its rows divided among 1, 2 and 3 ranks trains and answers as the layer of one process."""

import copy
import dataclasses
from unittest.mock import patch

import pytest
import torch
from same_answers import batch, check_calls, check_equal, check_indices, gradients, make_sharded, queries
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode

from lastlayer import FactoredOutput, FactoredSGD, SphericalSoftmax, SquaredError, TaylorSoftmax, ZLoss
from lastlayer.distributed import count_bytes, shard
from lastlayer.layers.factored import conditioning
from lastlayer.layers.factored import optimizer as optimizers

D = 5
LOSSES = {"squared": SquaredError(), "spherical": SphericalSoftmax(), "taylor": TaylorSoftmax(), "z": ZLoss()}
RATES = {"squared": 0.02, "spherical": 0.1, "taylor": 0.1, "z": 0.1}


def make(loss="squared", V=11, bias=False, dtype=torch.float64, seed=1, **options):
    torch.manual_seed(seed)
    return FactoredOutput(D, V, loss=LOSSES[loss], bias=bias, dtype=dtype, **options)


def some_batches(V, steps=6):
    """Several targets a row with repeats and padding, one of a row, all on one rank, none, ignored, no rows."""
    generator = torch.Generator().manual_seed(3)
    for step in range(steps):
        hidden = torch.randn(7, D, generator=generator, dtype=torch.float64)
        ids = torch.randint(V, (7, 3), generator=generator)
        weights = torch.rand(7, 3, generator=generator, dtype=torch.float64)
        ids[1], ids[2, 1:], ids[3] = ids[0], -100, -100
        kind = step % 6
        yield {
            0: (hidden, ids, weights),
            1: (hidden, ids[:, 0].masked_fill(ids[:, 0] == -100, 0)),
            2: (hidden, torch.full_like(ids, V - 1), weights),
            3: (hidden, torch.full_like(ids, -100), weights),
            4: (hidden[:0], ids[:0], weights[:0]),
            5: (hidden, torch.sparse_coo_tensor(torch.tensor([[0, 0, 5], [0, V - 1, 0]]), weights[0], (7, V))),
        }[kind]


def steps_are_equal(group, loss, V, bias, reduction):
    layer = make(loss, V, bias, reduction=reduction)
    sharded = make_sharded(layer, group)
    settings = {"lr": RATES[loss], "weight_decay": 0.01, "max_norm": 20.0}
    own = [(each, FactoredSGD(each, **settings)) for each in (layer, sharded)]
    for step, (hidden, *targets) in enumerate(some_batches(V)):
        found = [gradients(each, hidden, lambda each, h, t=targets: each(h, *t)) for each, _ in own]
        for name, value in found[0].items():
            check_equal(found[1][name], value, f"{loss}, V={V}, step {step}, {name}")
        for _, optimizer in own:
            optimizer.step()
            optimizer.zero_grad()
        check_equal(sharded.weight, layer.weight, f"{loss}, V={V}, the weight after step {step}", times=10)
        if bias:
            check_equal(sharded.bias, layer.bias, f"{loss}, V={V}, the bias after step {step}", times=10)
    drift = sharded.consistency()
    assert max(drift.inverse, drift.gram, drift.total) < 1e-11


def all_steps_are_equal(group, losses, V):
    for loss in losses:
        for bias, reduction in ((False, "sum"), (True, "mean")):
            steps_are_equal(group, loss, V, bias, reduction)
    if V == 11:
        steps_are_equal(group, losses[0], V, True, "none")


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_steps(pool, ranks):
    pool.run(all_steps_are_equal, ranks, list(LOSSES) if ranks == 3 else ["spherical"], 11)


def test_ranks_without_classes(pool):
    """V = 1 leaves two of three ranks without a class, V = 4 one."""
    for V in (1, 4):
        pool.run(all_steps_are_equal, 3, ["spherical", "taylor"], V)


def answers_are_equal(group, loss, V, dtype):
    """In training too, where the loss of a pass is recorded; after steps, so that U is not I."""
    layer = make(loss, V, bias=True, dtype=dtype)
    optimizer = FactoredSGD(layer, RATES[loss])
    for hidden, *targets in some_batches(V, 2):
        layer(hidden.to(dtype), *[t.to(dtype) if t.is_floating_point() else t for t in targets]).backward()
        optimizer.step()
        optimizer.zero_grad()
    layer.eval()
    sharded = make_sharded(layer, group)
    for rows in (6, 0):
        hidden, targets = batch(layer, rows, dtype=dtype)
        calls = {"scores": lambda layer, h: layer.scores(h), "loss": lambda layer, h, t=targets: layer(h, t)}
        if loss in ("squared", "z"):
            calls["topk"] = lambda layer, h, t=targets: layer.topk(h, min(3, V), exclude=t[:, None]).scores
            for call in (sharded.log_prob, sharded.sample, lambda h, t=targets: sharded.score(h, t[:, None])):
                with pytest.raises(TypeError, match="no probabilities"):
                    call(hidden)
        else:
            calls |= queries(layer, hidden, targets)
            check_indices(layer, sharded, hidden, loss)
        check_calls(layer, sharded, hidden, targets, calls, f"{loss}, V={V}, {rows} rows")
    with pytest.raises(TypeError, match="linear_head"):
        sharded.linear_head()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_answers(pool, ranks):
    for loss in LOSSES if ranks == 3 else ["squared"]:
        pool.run(answers_are_equal, ranks, loss, 11, torch.float64)
    pool.run(answers_are_equal, ranks, "taylor", 4, torch.float64)
    pool.run(answers_are_equal, ranks, "spherical", 1, torch.float32)


def what_a_step_sends(group):
    N, K, d, V, R = 40, 3, 16, 3000, group.size()
    layer = FactoredOutput(d, V, dtype=torch.float32)
    sharded = make_sharded(layer, group)
    optimizer = FactoredSGD(sharded, 0.1)
    hidden, _ = batch(layer, N, dtype=torch.float32)
    hidden.requires_grad_()
    targets = torch.arange(N * K).view(N, K) * 24
    sharded(hidden, targets)  # the first call compares the inputs
    with CommDebugMode() as mode, count_bytes() as sent:
        sharded(hidden, targets).backward()
        optimizer.step()
    assert mode.get_total_counts() == 3, mode.get_comm_counts()
    expected = 2 * (R - 1) / R * (4 * N * (d + K) + 8 * 2)
    assert abs(sent.total() - expected) <= 3, (sent, expected)  # each is rounded to whole bytes
    assert sharded.state.factor.shape[0] == sharded.weight.to_local().shape[0] == len(range(V)[: -(-V // R)])
    assert sharded.state.factor.untyped_storage().nbytes() == 4 * d * len(sharded.state.factor)


def test_what_a_step_sends(pool):
    for ranks in (2, 3):
        pool.run(what_a_step_sends, ranks)


# Steps of all ranks or of none.


def a_refusal_is_one_of_all(group):
    """Of two layers the second's plan fails, on one rank: no rank changes a layer, and the gradients are kept."""
    layers = [make_sharded(make(seed=seed), group) for seed in (1, 2)]
    optimizer = FactoredSGD(layers, 0.02)
    hidden, targets = batch(layers[0], 6)
    for layer in layers:
        layer(hidden, targets).backward()
    before = [part.clone() for layer in layers for part in layer.state.tensors().values()]
    plan, calls = optimizers.plan_step, []

    def fails(*arguments, **settings):
        calls.append(1)
        if len(calls) == 2 and group.rank() == group.size() - 1:
            raise ValueError("of this rank alone")
        return plan(*arguments, **settings)

    with patch.object(optimizers, "plan_step", fails), pytest.raises(ValueError, match="of this rank alone"):
        optimizer.step()
    after = [part for layer in layers for part in layer.state.tensors().values()]
    assert all(torch.equal(*map(local, pair)) for pair in zip(before, after, strict=True))
    optimizer.step()  # the gradients are kept
    assert not torch.equal(local(before[0]), layers[0].state.factor)
    with pytest.raises(RuntimeError, match="without a backward"):
        optimizer.step()


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def refusals(group):
    layer = make_sharded(make(), group)
    hidden, targets = batch(layer, 6)
    before = layer.weight.full_tensor()
    optimizer = FactoredSGD(layer, 1 / (2 * float(torch.linalg.eigvalsh(hidden.T @ hidden)[-1] / 6)))
    layer(hidden, targets).backward()
    with pytest.raises(ValueError, match="singular"):
        optimizer.step()
    optimizer.zero_grad()
    layer(hidden * torch.nan, targets).backward()
    with pytest.raises(ValueError, match="not finite"):
        optimizer.step()
    wrong = before.clone()
    wrong[-1, 0] = torch.nan  # of one rank's rows
    with pytest.raises(ValueError, match="finite"):
        layer.set_weight(layer._divided(layer.state.own_rows(wrong)))  # a DTensor
    with pytest.raises(ValueError, match="shape"):
        layer.set_weight(wrong[1:])
    assert torch.equal(layer.weight.full_tensor(), before)
    with pytest.raises(ValueError, match="process_group must be None"):
        FactoredSGD(layer, 0.1, process_group=group)
    with pytest.raises(ValueError, match="loss differs"):
        shard(make("squared" if group.rank() else "z"), group)


def test_refusals(pool):
    for ranks in (2, 3):
        pool.run(a_refusal_is_one_of_all, ranks)
    pool.run(refusals, 3)


# Repairs, over hundreds of steps.


def stays_exact(group, dtype, cyclic, steps):
    """Hidden states of low rank, which shrink directions until rows of U are repaired; Q is recomputed, too."""
    V, N, lr = 41, 6, 0.02
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    layer = FactoredOutput(D, V, loss=SquaredError(), bias=True, reduction="sum", dtype=dtype)
    sharded, calls = make_sharded(layer, group), {"repair": 0, "refresh_gram": 0}
    stabilizer = sharded._stabilizer
    for name in calls:
        setattr(stabilizer, name, counted(calls, name, getattr(stabilizer, name)))
    weight = torch.cat([layer.weight, layer.bias[:, None]], 1).double()
    optimizer = FactoredSGD(sharded, lr)
    generator = torch.Generator().manual_seed(4)
    low = torch.randn(3, N, 2, generator=generator, dtype=torch.float64)
    batches = (low @ torch.randn(2, D, generator=generator, dtype=torch.float64) / 2).to(dtype)
    ids = torch.randint(V, (3, N), generator=generator)
    for step in range(steps):
        at = step % 3 if cyclic else 0
        sharded(batches[at], ids[at]).backward()
        optimizer.step()
        optimizer.zero_grad()
        hidden = torch.cat([batches[at].double(), torch.ones(N, 1, dtype=torch.float64)], 1)
        error = hidden @ weight.T
        error[torch.arange(N), ids[at]] -= 1
        weight -= 2 * lr * error.T @ hidden
    assert min(calls.values()) > 0, calls
    found = torch.cat([sharded.weight.full_tensor(), sharded.bias.full_tensor()[:, None]], 1)
    assert (found - weight).norm() < tolerance * weight.norm()
    drift = sharded.consistency()
    assert max(drift.gram, drift.total) < tolerance
    for part in (sharded.state.reading, sharded.state.inverse):
        assert torch.equal(sharded.state.first(part), part), "the ranks' small states differ"
    sharded.stabilize()
    rebuilt = torch.cat([sharded.weight.full_tensor(), sharded.bias.full_tensor()[:, None]], 1)
    assert (rebuilt - weight).norm() < tolerance * weight.norm()


def counted(calls, name, function):
    def call(*arguments):
        calls[name] += 1
        return function(*arguments)

    return call


def test_many_steps(pool):
    pool.run(stays_exact, 3, torch.float64, False, 120)
    pool.run(stays_exact, 2, torch.float32, True, 80)


def decisions_are_the_first_ranks(group):
    """Where the last rank alone would measure, and would multiply the product out, all do as the first one."""
    V, last = 2500, group.rank() == group.size() - 1
    layer = make(V=V)
    sharded = make_sharded(layer, group)
    weight, measured, state = sharded.weight.full_tensor(), [], sharded.state
    state.map[1] += 0.999 * (state.map[2] - state.map[1])  # two rows of U that are nearly the same
    state.refresh_inverse()
    state.factor.copy_(state.factor @ state.inverse.T)
    found, plan = conditioning.independent_rows, optimizers.plan_step
    measure = sharded._stabilizer._measure
    sharded._stabilizer._measure = lambda state: (measured.append(1), measure(state))
    if last:
        conditioning.independent_rows = lambda *_: None
        optimizers.plan_step = lambda *a, **k: dataclasses.replace(plan(*a, **k), growth=1e9)
    try:
        optimizer = FactoredSGD(sharded, 1e-9)
        hidden, targets = batch(layer, 3)
        sharded(hidden, targets).backward()
        optimizer.step()
    finally:
        conditioning.independent_rows, optimizers.plan_step = found, plan
    assert len(measured) == 2, "all measure, and repair"
    check_equal(sharded.weight.full_tensor(), weight, "the weight", times=1e4)
    assert torch.equal(state.first(state.map), state.map)
    assert not torch.equal(state.map, torch.eye(D, dtype=torch.float64)), "the first rank did not multiply it out"


def test_decisions(pool):
    pool.run(decisions_are_the_first_ranks, 3)


# Copies, of a mesh of two dimensions.


def copies_step_as_one(group):
    """A mesh of 2 x 1: each of two processes has its own rows, and one of them has no backward in a step."""
    layer = make("taylor", reduction="mean")
    sharded = shard(copy.deepcopy(layer), DeviceMesh("cpu", [[0], [1]]))
    optimizers = [FactoredSGD(each, 0.1, weight_decay=0.01) for each in (layer, sharded)]
    for step in range(3):
        hidden, targets = batch(layer, 6)
        mine = slice(3 * group.rank(), 3 * group.rank() + 3)
        if step < 2 or group.rank():
            sharded(hidden[mine], targets[mine]).backward()
        (layer(hidden, targets) if step < 2 else layer(hidden[3:], targets[3:]) / 2).backward()
        for each in optimizers:
            each.step()
            each.zero_grad()
        check_equal(sharded.weight, layer.weight, f"step {step}")
    assert sharded.weight.placements[-1] == Shard(0)
    before = sharded.weight.full_tensor()
    sharded(hidden[mine] * (torch.nan if group.rank() else 1), targets[mine]).backward()
    with pytest.raises(ValueError, match="not finite"):
        optimizers[1].step()
    assert torch.equal(sharded.weight.full_tensor(), before)


def test_copies(pool):
    pool.run(copies_step_as_one, 2)
