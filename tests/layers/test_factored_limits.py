"""FactoredOutput at its limits: near-singular steps, long runs, hostile sizes."""

import math
import re
import warnings

import pytest
import torch
from factored_twins import LOSSES, Twins, batches, snapshot, worst

from lastlayer import FactoredOutput, FactoredSGD, SquaredError, TaylorSoftmax, ZLoss


def favoured(rows, d, seed=0, dtype=torch.float64):
    """Hidden states as after a relu: all share a direction, so U shrinks along it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, d, generator=generator, dtype=torch.float64).relu().to(dtype)


def trained(loss=None, dtype=torch.float64, steps=60, d=8, v=300, lr=0.005, automatic=True):
    """A layer whose U has been driven towards singular, and its optimizer."""
    torch.manual_seed(0)
    layer = FactoredOutput(d, v, loss=loss or SquaredError(), reduction="sum", bias=True).to(dtype)
    layer._stabilizer.automatic = automatic
    optimizer = FactoredSGD(layer, lr)
    for step in range(steps):
        hidden = favoured(4, d, step, dtype)
        optimizer.zero_grad()
        layer(hidden, torch.arange(step, step + 4) % v).backward()
        optimizer.step()
    return layer, optimizer


@pytest.mark.parametrize("loss", [SquaredError(), TaylorSoftmax()], ids=repr)
def test_stabilizing_keeps_the_weight(loss):
    """L4."""
    layer, _ = trained(loss, lr=0.002 if loss == SquaredError() else 3.0, steps=100, automatic=False)
    weight, gram = layer.weight, layer.gram()
    assert layer.consistency().condition > 5
    assert layer._stabilizer.stabilize(layer.state) > 0
    singular = torch.linalg.svdvals(layer.state.map)
    assert 0.5 <= singular.min() <= singular.max() <= 2
    assert worst(layer.weight, weight) < 1e-12
    assert worst(layer.gram(), gram) < 1e-12
    assert layer.consistency().inverse < 1e-12
    assert layer.stabilize() == 0


def test_many_bad_directions_are_multiplied_out():
    layer, _ = trained(TaylorSoftmax(), lr=1.0)
    weight = layer.weight
    layer.state.map.mul_(1e-3)
    layer.state.factor.mul_(1e3)
    layer.stabilize()
    assert torch.equal(layer.state.map, torch.eye(9, dtype=torch.float64))
    assert worst(layer.weight, weight) < 1e-12


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_long_run_in_single_precision(loss):
    """L5 at the sizes and steps of a test; `benchmarks/factored_output.py --part exactness` has 10,000 steps."""
    lr = 2e-4 if loss == SquaredError() else 1.0
    torch.manual_seed(0)
    d, v, rows = 32, 500, 16
    layer = FactoredOutput(d, v, loss=loss, reduction="sum")
    optimizer = FactoredSGD(layer, lr)
    exact = FactoredOutput(d, v, loss=loss, reduction="sum", dtype=torch.float64)
    exact.set_weight(layer.weight.double())
    exact_optimizer = FactoredSGD(exact, lr)
    for step in range(200):
        hidden = favoured(rows, d, step)
        targets = torch.randint(v, (rows,), generator=torch.Generator().manual_seed(step))
        for one, its_optimizer, h in ((layer, optimizer, hidden.float()), (exact, exact_optimizer, hidden)):
            its_optimizer.zero_grad()
            one(h, targets).backward()
            its_optimizer.step()
    error = (layer.weight.double() - exact.weight).norm() / exact.weight.norm()
    assert error < 2e-5  # what dense SGD in float32 reaches, too
    assert max(layer.consistency()[:3]) < 1e-4
    exact.stabilize()
    assert exact.consistency().condition <= 4


def test_left_alone_it_is_refused_before_it_is_wrong():
    """Why the repairs exist: without them U becomes singular within a few hundred steps, in float64 too."""
    truth, _ = trained(steps=300)
    for dtype, allowed in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        kept, _ = trained(dtype=dtype, steps=300)
        assert worst(kept.weight.double(), truth.weight) < allowed
        with pytest.raises(ValueError, match="too ill-conditioned"):
            trained(dtype=dtype, steps=300, automatic=False)


def test_a_refused_state_goes_on_after_its_repair():
    layer, optimizer = trained(dtype=torch.float32, steps=20)
    layer._stabilizer.automatic = False
    dense = layer.weight.double(), layer.bias.double()
    weight = torch.cat([dense[0], dense[1][:, None]], 1)
    refused = 0
    for step in range(20, 300):
        hidden, targets = favoured(4, 8, step, torch.float32), torch.arange(step, step + 4) % 300
        optimizer.zero_grad()
        layer(hidden, targets).backward()
        before = snapshot(layer)
        try:
            optimizer.step()
        except ValueError:
            assert all(torch.equal(a, b) for a, b in zip(before, snapshot(layer), strict=True))
            refused += 1
            optimizer.zero_grad()
            layer.stabilize()
            layer(hidden, targets).backward()
            optimizer.step()
        rows = torch.cat([hidden.double(), torch.ones(4, 1, dtype=torch.float64)], 1)
        errors = rows @ weight.T
        errors[torch.arange(4), targets] -= 1
        weight.addmm_(errors.T, rows, alpha=-2 * optimizer.param_groups[0]["lr"])
    assert refused
    assert worst(layer.weight.double(), weight[:, :8]) < 1e-2


@pytest.mark.parametrize("rows", [1, 12, 18, 19, 60])
def test_any_batch_size_near_the_limit_of_the_rate(rows):
    """Both forms of the step, near the rate at which a step is singular: below, and overshooting."""
    for share in (0.5, 0.9, 0.99, 1.3):
        twins = Twins(SquaredError(), lr=0.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for hidden, ids, weights in batches(6, max(rows, 5), k=2):
                hidden, ids, weights = hidden[:rows], ids[:rows], weights[:rows]
                hidden += 0.3
                norm = torch.linalg.eigvalsh(hidden[(ids >= 0).any(1)].T @ hidden[(ids >= 0).any(1)])[-1]
                for optimizer in (twins.optimizer, twins.dense):
                    optimizer.param_groups[0]["lr"] = share / (2 * float(norm))
                twins.train([(hidden, ids, weights)], tolerance=1e-8)


@pytest.mark.parametrize("rows", [3, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_step_is_refused(rows, dtype):
    torch.manual_seed(0)
    layer = FactoredOutput(6, 40, loss=SquaredError(), reduction="sum", dtype=dtype)
    optimizer = FactoredSGD(layer, 1.0)
    hidden = torch.randn(rows, 6, dtype=dtype)
    critical = 0.5 / float(torch.linalg.eigvalsh(hidden.double().T @ hidden.double())[-1])
    optimizer.param_groups[0]["lr"] = critical
    layer(hidden, torch.arange(rows)).backward()
    before = snapshot(layer)
    with pytest.raises(ValueError, match="singular") as refusal:
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(layer), strict=True))
    safe = float(re.search(r"a rate up to (\S+) is safe", str(refusal.value)).group(1))
    assert 0.95 * critical < safe < critical
    optimizer.param_groups[0]["lr"] = safe  # the gradient was kept
    optimizer.step()
    assert max(layer.consistency()[:3]) < (1e-3 if dtype == torch.float32 else 1e-10)


def test_a_refused_step_changes_no_layer():
    layers = [FactoredOutput(4, 20, loss=SquaredError()) for _ in range(2)]
    optimizer = FactoredSGD(layers, 0.01)
    before = [snapshot(layer) for layer in layers]
    layers[0](torch.ones(3, 4), torch.arange(3)).backward()
    layers[1](torch.full((3, 4), math.inf), torch.arange(3)).backward()
    with pytest.raises(ValueError, match="not finite"):
        optimizer.step()
    for layer, state in zip(layers, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(state, snapshot(layer), strict=True))


def test_overshooting_warns_once():
    layer = FactoredOutput(4, 20, loss=SquaredError(), reduction="sum", dtype=torch.float64)
    optimizer = FactoredSGD(layer, 0.2)
    hidden = torch.ones(1, 4, dtype=torch.float64)
    layer(hidden, torch.tensor([1])).backward()
    with pytest.warns(UserWarning, match=r"rates up to 0\.125"):
        optimizer.step()
    optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(hidden, torch.tensor([1])).backward()
        optimizer.step()


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("scale", [1e-6, 1e3])
def test_any_norm_of_hidden(loss, scale):
    twins = Twins(loss, lr=1e-3 / max(scale, 1) ** 2)
    twins.train(batches(20, scale=scale), tolerance=1e-9)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_one_repeated_target(loss):
    """Every row of every batch wants the same class."""
    twins = Twins(loss, lr=0.004)
    twins.train((hidden, torch.full((9,), 7), None) for hidden, _, _ in batches(80))


@pytest.mark.parametrize(("d", "v", "rows"), [(1, 5, 3), (5, 1, 3), (1, 1, 1), (7, 3, 20), (20, 6, 2)])
def test_odd_sizes(d, v, rows):
    for loss in LOSSES:
        twins = Twins(loss, lr=0.01, bias=True, d=d, v=v)
        twins.train(batches(20, max(rows, 5), k=1, d=d, v=v), 1e-8)


@pytest.mark.parametrize("v", [1, 2])
def test_the_z_loss_of_one_or_two_classes_has_no_gradient(v):
    """The z-score is 0 of one output, 1 and -1 of two, whatever they are."""
    twins = Twins(ZLoss(), lr=10.0, d=5, v=v)
    before = snapshot(twins.layer)
    for hidden, ids, weights in batches(5, d=5, v=v):
        loss, expected, *gradients = twins.backward(hidden, ids, weights)
        assert worst(loss, expected) < 1e-12
        assert not any(gradient.any() for gradient in gradients)
        twins.step()
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(twins.layer), strict=True))
    assert worst(twins.layer.weight, twins.weight.detach()) == 0
