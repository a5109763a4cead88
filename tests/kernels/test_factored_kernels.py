"""The compiled pass and step of `FactoredOutput` equal their plain twins, under every instruction set."""

import dataclasses

import pytest
import torch
from torch import nn

from engines import isa  # noqa: F401 (a fixture)
from lastlayer import FactoredOutput, FactoredSGD, SphericalSoftmax, SquaredError, TaylorSoftmax, ZLoss
from lastlayer.functional.spherical import RowDerivatives
from lastlayer.kernels import engine
from lastlayer.kernels import factored as kernel
from lastlayer.layers.factored import step
from lastlayer.layers.factored.record import Ledger, Pass
from lastlayer.layers.factored.state import FactoredState

V, RATE = 50, 0.01
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}
pytestmark = pytest.mark.usefixtures("isa")


def a_state(d, dtype):
    """Of which U is not I, and the offset not 0."""
    generator = torch.Generator().manual_seed(d)
    state = FactoredState(torch.randn(V, d, generator=generator, dtype=torch.float64).to(dtype))
    state.map.add_(0.2 / d**0.5 * torch.randn(d, d, generator=generator, dtype=torch.float64))
    state.offset.copy_(torch.randn(d, generator=generator, dtype=torch.float64))
    state.refresh_inverse()
    state.refresh_gram()
    return state


def a_gradient(state, rows, width, with_total):
    """Of classes that repeat within and across rows, and derivatives of the norm of both signs."""
    generator = torch.Generator().manual_seed(rows)
    d, dtype = state.features, state.factor.dtype

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, ids = normal(rows, d) / d**0.5, torch.randint(V, (rows, width), generator=generator)
    ids[:2] = ids[0, 0]
    by_score, by_norm, by_total = normal(rows, width), normal(rows), normal(rows) if with_total else None
    with engine.forced(None), torch.no_grad():
        own = Pass(state, Ledger(), nn.Parameter(torch.zeros(())))
        own.forward(SquaredError(), hidden, ids, by_score.double())
        own.loss = RowDerivatives(own.loss.row_loss, by_score, by_norm, by_total)
        own.backward(torch.ones(rows, dtype=dtype))
    assert own.gradient is not None
    return own.gradient


def same(ours, theirs, dtype):
    for one, other in zip(ours, theirs, strict=True):
        scale = float(other.abs().max())
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_total", [True, False])
@pytest.mark.parametrize(("rows", "width", "d"), [(1, 1, 1), (5, 1, 7), (24, 3, 70), (129, 2, 301)])
def test_pass_and_step(rows, width, d, with_total, dtype):
    state = a_state(d, dtype)
    g = a_gradient(state, rows, width, with_total)
    given = state.reading, state.factor, g.ids
    same(kernel.read(g.hidden, *given), state.read(g.hidden, g.ids), dtype)
    ours = kernel.hidden_gradient(g.products, *given, g.by_score, g.by_norm, g.by_total)
    same(ours, (g.by_hidden, g.sparse), dtype)
    ours, theirs = state.factor.clone(), state.factor.clone()
    kernel.move_targets(ours, g.ids, g.by_score, g.hidden, RATE)
    for ids, by_score in zip(g.ids.T, g.by_score.T, strict=True):
        theirs.index_add_(0, ids, by_score[:, None] * g.hidden, alpha=-RATE)
    same([ours], [theirs], dtype)

    norms = (torch.ones_like(g.by_norm), g.by_norm, 40 * torch.ones_like(g.by_norm))  # the last: a long series
    for by_norm in norms if rows < 2 * d else ():
        by_norm = by_norm * min(1.0, 30 / rows)  # else of many rows the sum is too large for either
        own = dataclasses.replace(g, by_norm=by_norm)
        spread = 2 * RATE * by_norm * g.hidden.square().sum(1)
        ours, theirs = step._plan_compiled(state, own, RATE), step._plan_by_rows(state, own, RATE)
        if ours is None:
            assert float(spread.abs().sum()) > 0.9
            continue
        same((ours.solution, ours.reading, ours.inverse), (theirs.solution, theirs.reading, theirs.inverse), dtype)
        assert torch.equal(ours.reading[:d], ours.reading[:d].T)
        assert ours.growth >= 0


def test_what_is_left_to_the_plain_form():
    """A step that is not easy, an inverse that has drifted, and whatever is not finite."""
    state = a_state(20, torch.float32)
    g = a_gradient(state, 6, 2, True)
    positive = dataclasses.replace(g, by_norm=g.by_norm.abs())
    before = [part.clone() for part in state.tensors().values()]
    assert step._plan_compiled(state, positive, RATE) is not None
    assert step._plan_compiled(state, positive, 1e3 * RATE) is None
    for name in ("hidden", "by_norm"):
        for value in (torch.nan, torch.inf):
            wrong = getattr(positive, name).clone()
            wrong.view(-1)[3] = value
            assert step._plan_compiled(state, dataclasses.replace(positive, **{name: wrong}), RATE) is None
    assert all(torch.equal(a, b) for a, b in zip(before, state.tensors().values(), strict=True))
    state.inverse.mul_(1.01)
    assert step._plan_compiled(state, positive, RATE) is None


@pytest.mark.parametrize("loss", [SphericalSoftmax(), TaylorSoftmax(), ZLoss()], ids=repr)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_training_is_the_same_either_way(loss, reduction, isa):  # noqa: F811
    weights = []
    for which in (isa, None):
        with engine.forced(which):
            torch.manual_seed(0)
            layer = FactoredOutput(30, V, loss=loss, bias=True, dtype=torch.float64, reduction=reduction)
            optimizer = FactoredSGD(layer, 0.1, weight_decay=0.01)
            for hidden in torch.randn(20, 12, 30, dtype=torch.float64):
                optimizer.zero_grad()
                ids, counts = torch.randint(V, (12, 4)), torch.rand(2, 12, dtype=torch.float64)
                layer(hidden.T.contiguous().T / 4, ids[:, ::2], counts.T).sum().backward()  # none is contiguous
                optimizer.step()
            weights.append(layer.weight)
    torch.testing.assert_close(*weights, rtol=1e-11, atol=1e-11)
