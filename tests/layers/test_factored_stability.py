"""The repairs of a FactoredOutput's state: none changes the weight, and together they keep training exact."""

import math

import pytest
import torch
from factored_twins import Twins, batches, worst

from lastlayer import SquaredError, TaylorSoftmax, ZLoss
from lastlayer.layers.factored.conditioning import FAR, Stabilizer, growth_limit, independent_rows
from lastlayer.layers.factored.state import FactoredState

D, V = 10, 400


def ill_conditioned(dtype=torch.float64, shrunk=1e-5, d=D, v=V):
    """A state in which two directions of U have shrunk, of which one is a row of its own and another is not."""
    generator = torch.Generator().manual_seed(0)
    state = FactoredState(torch.randn(v, d, generator=generator, dtype=torch.float64).to(dtype))
    direction = torch.nn.functional.normalize(torch.randn(d, generator=generator, dtype=torch.float64), dim=0)
    exact = torch.eye(d, dtype=torch.float64) - (1 - shrunk) * torch.outer(direction, direction)
    exact[3] *= 1e-6
    state.map.copy_(exact)
    state.inverse.copy_(torch.linalg.inv(exact).T)
    state.refresh_gram()
    return state


def dependence(state):
    exact = state.map.double()
    return exact.norm(dim=1) * torch.linalg.inv(exact).T.norm(dim=1)


@pytest.mark.parametrize(("dtype", "shrunk"), [(torch.float64, 1e-5), (torch.float32, 1e-3)])
@pytest.mark.parametrize("v", [V, 6])
def test_repair_leaves_the_weight(dtype, shrunk, v):
    state, stabilizer = ill_conditioned(dtype, shrunk, v=v), Stabilizer()
    before = state.weight()
    assert dependence(state).max() > 3
    assert stabilizer.repair(state) > 0
    assert dependence(state).norm() < math.exp(growth_limit(state)) / 2
    assert stabilizer.growth == pytest.approx(math.log(dependence(state).norm()), abs=1e-3)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    assert worst(state.weight(), before) < tolerance
    assert state.consistency().inverse < tolerance
    assert state.consistency().gram < tolerance
    assert stabilizer.repair(state) == 0


def test_what_independent_rows_promises():
    rows = torch.nn.functional.normalize(ill_conditioned().map, dim=1)
    found = independent_rows(rows, torch.ones(D, dtype=torch.float64), 100.0)
    assert found is not None
    assert (found.norm(dim=1) * torch.linalg.inv(found).T.norm(dim=1)).max() < 3
    assert 0 < int((found != rows).any(1).sum()) < D
    assert independent_rows(rows, torch.ones(D, dtype=torch.float64), 1.0) is None  # below sqrt(d)


def test_the_shrunken_row_is_freed_and_rows_without_it_are_left_alone():
    state = ill_conditioned(torch.float64, 1.0)
    scale = torch.ones(D, dtype=torch.float64)
    scale[3] = 2e-18
    state.map.copy_(torch.diag(scale))
    state.map[3, :3] = 1e-16  # the direction itself is a hundredth of what the row holds
    state.inverse.copy_(torch.linalg.inv(state.map).T)
    state.factor[:, 3] *= 1e-3
    state.factor[7, 3] = 1e17  # a target of late
    before, weight = state.factor.clone(), state.weight()
    Stabilizer().repair(state)
    same = (state.factor == before)[:, :3].all(1)
    assert not same[7]
    assert int(same.sum()) == V - 1
    assert worst(state.weight(), weight) < 1e-14
    assert state.map[3, :3].abs().max() < 1e-28


@pytest.mark.parametrize("power", [-70, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_come_back_into_range(power, dtype):
    state = ill_conditioned(dtype, 0.5)
    state.map[2] *= 2.0**power
    state.inverse[2] /= 2.0**power
    state.factor[:, 2] /= 2.0**power
    weight = state.weight()
    Stabilizer()._measure(state)
    scale = state.map.double().norm(dim=1)
    assert 2.0**-FAR < scale.min() <= scale.max() < 2.0**FAR
    assert torch.equal(state.weight(), weight)
    assert state.factor.abs().max() < 1e9


def test_an_offset_that_cancels_moves_into_the_factor():
    state = ill_conditioned(shrunk=0.5)
    weight = state.weight()
    shared = torch.randn(D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for size in (1.0, 1e4):
        state.offset.add_(size * shared)
        state.factor.sub_(size * shared @ state.inverse.T)
        assert state.consistency().gram < 1e-11
        state.inverse *= 1.001  # as after drift
        Stabilizer()._measure(state)
        assert state.offset.any() == (size == 1)
        assert state.inverse_drift() < 1e-13
        assert worst(state.weight(), weight) < 1e-10  # five digits cancelled


def test_beyond_repair_is_multiplied_out(monkeypatch):
    monkeypatch.setattr("lastlayer.layers.factored.conditioning.independent_rows", lambda *_: None)
    state = ill_conditioned()
    weight = state.weight()
    assert Stabilizer().repair(state) == D
    assert torch.equal(state.map, torch.eye(D, dtype=torch.float64))
    assert worst(state.weight(), weight) < 1e-12


@pytest.mark.parametrize(
    ("loss", "settings", "v"),
    [
        (SquaredError(), {}, 300),
        (SquaredError(), {"weight_decay": 0.02}, 7),
        (TaylorSoftmax(), {"weight_decay": 0.02}, 7),
        (ZLoss(alpha=1.5), {}, 300),
    ],
    ids=repr,
)
def test_directions_that_vanish(loss, settings, v):
    """Two directions shrink by far more than a float's range, while targets go on; bias, decay, V below d."""
    rates = {SquaredError(): 0.05, TaylorSoftmax(): 0.02 * v, ZLoss(alpha=1.5): 0.3}
    twins = Twins(loss, lr=rates[loss], bias=True, reduction="mean", v=v, d=D, **settings)
    repairs = []
    repair = Stabilizer.repair
    twins.layer._stabilizer.repair = lambda state: repairs.append(repair(twins.layer._stabilizer, state))
    drift = torch.zeros(D, dtype=torch.float64)
    drift[:2] = torch.tensor([1.5, 1.0])
    steps = ((h + drift, ids[:, 0].clamp(min=0)) for h, ids, _ in batches(400, k=1, d=D, v=v, scale=0.2))
    tolerance = 1e-8 if v > D else 1e-6  # outputs of few classes come close to being alike
    twins.train(steps, tolerance)
    assert repairs or loss != SquaredError()
    hidden = next(batches(1, d=D, v=v))[0]
    outputs = hidden @ twins.weight.detach().T + twins.bias.detach()
    assert worst(twins.layer.scores(hidden), outputs) < tolerance
    twins.layer.load_state_dict(twins.layer.state_dict())
    twins.compare(tolerance)
