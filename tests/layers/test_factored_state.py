"""The state of a FactoredOutput: what does not change it, other dtypes, state dicts, and other readers."""

import copy
import math

import pytest
import torch
from factored_twins import RATES, D, Twins, V, batches, snapshot, worst
from torch import nn

from lastlayer import (
    FactoredOutput,
    FactoredSGD,
    Int8Preview,
    ScoreTopK,
    ScreenedSoftmax,
    SphericalSoftmax,
    SquaredError,
    SVDPreview,
    SVDSoftmax,
    TaylorSoftmax,
    ZLoss,
)
from lastlayer.functional import spherical_loss
from lastlayer.functional.gram import principal_rotation
from lastlayer.screening import calibration


def test_nothing_changes_without_a_gradient():
    """L6: a zero rate, `eval()`, no rows, and nothing but ignored rows leave the state as it was."""
    twins = Twins(TaylorSoftmax(), reduction="mean")
    twins.train(batches(5))
    hidden, ids, _ = next(batches(1))
    before = snapshot(twins.layer)
    for rows, targets in ((hidden[:0], ids[:0, 0]), (hidden, torch.full_like(ids, -100))):
        loss = twins.layer(rows, targets)
        assert loss.isnan()
        loss.backward()
        twins.optimizer.step()
        twins.optimizer.zero_grad()
    twins.layer.eval()
    leaf = hidden.clone().requires_grad_()
    loss = twins.layer(leaf, ids)
    loss.backward(retain_graph=True)
    loss.backward()
    assert leaf.grad.any()
    twins.layer.train()
    with torch.no_grad():
        twins.layer(hidden, ids)
    twins.optimizer.param_groups[0]["lr"] = 0.0
    twins.layer(hidden, ids).backward()
    twins.optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(twins.layer), strict=True))


def test_weight_is_an_ordinary_one():
    """It loads into `nn.Linear` and back, and training goes on from it like the uninterrupted run."""
    twins = Twins(SphericalSoftmax(), bias=True)
    twins.train(batches(50))
    linear = nn.Linear(D, V, dtype=torch.float64)
    linear.load_state_dict(twins.layer.state_dict())
    hidden = next(batches(1))[0]
    assert worst(linear(hidden).detach(), twins.layer.scores(hidden)) < 1e-12
    resumed = FactoredOutput(D, V, bias=True, dtype=torch.float64, reduction="sum")
    resumed.load_state_dict(linear.state_dict())
    twins.layer = resumed
    twins.optimizer = FactoredSGD(resumed, RATES[twins.loss])
    twins.train(batches(50, seed=8))

    with pytest.raises(RuntimeError, match=r"size|shape"):
        resumed.load_state_dict(nn.Linear(D, V + 1, dtype=torch.float64).state_dict())
    with pytest.raises(RuntimeError, match="Missing"):
        resumed.load_state_dict({})
    with pytest.raises(RuntimeError, match="Unexpected"):
        FactoredOutput(D, V).load_state_dict(linear.state_dict())


def test_scores_without_probabilities():
    for loss in (SquaredError(), ZLoss()):
        layer = FactoredOutput(D, V, loss=loss, bias=True)
        hidden = torch.randn(2, 3, D)
        answer = layer.topk(hidden, 4)
        expected = (hidden @ layer.weight.T + layer.bias).topk(4)
        assert isinstance(answer, ScoreTopK)
        torch.testing.assert_close(answer.scores, expected.values)
        assert torch.equal(answer.indices, expected.indices)
        weight, bias, logit_map = layer.linear_head()
        assert (weight.shape, bias.shape, logit_map) == ((V, D), (V,), None)
        with pytest.raises(TypeError, match="no probabilities"):
            layer.log_prob(hidden)
        with pytest.raises(TypeError, match="no probabilities"):
            layer.target_log_prob(hidden, torch.zeros(2, 3, dtype=torch.int64))
        with pytest.raises(TypeError, match="no probabilities"):
            layer.sample(hidden)
    with pytest.raises(TypeError, match="linear_head"):
        FactoredOutput(D, V).linear_head()


def test_a_screen_notices_training():
    torch.manual_seed(0)
    layer, hidden = FactoredOutput(D, V, loss=SquaredError(), bias=True), torch.randn(6, D)
    optimizer = FactoredSGD(layer, lr=0.1)
    screen = ScreenedSoftmax.from_layer(layer, preview=Int8Preview(), candidates=10, exact=True, use="screen")
    screen.topk(hidden, 3)
    layer(hidden, torch.arange(6)).backward()
    screen.topk(hidden, 3)  # the gradient alone changes nothing

    def changes():
        yield optimizer.step
        yield lambda: layer.set_weight(torch.randn(V, D))
        yield layer.double

    for change in changes():
        change()
        with pytest.raises(RuntimeError, match="refresh"):
            screen.topk(hidden, 3)
        with pytest.raises(RuntimeError, match="refresh"):
            copy.deepcopy(screen).topk(hidden, 3)
        screen.refresh()
        hidden = hidden.to(layer.anchor.dtype)
        assert torch.equal(screen.topk(hidden, 3).indices, layer.topk(hidden, 3).indices)
        copy.deepcopy(screen).topk(hidden, 3)


def test_loaded_factors_drop_what_was_read_from_others():
    """The products that a forward pass kept are of the factors before."""
    layer = FactoredOutput(D, V)
    optimizer = FactoredSGD(layer, lr=0.1)
    layer(torch.randn(3, D), torch.arange(3)).backward()
    loss = layer(torch.randn(3, D), torch.arange(3))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises(RuntimeError, match="run forward again"):
        loss.backward()
    with pytest.raises(RuntimeError, match="no gradient"):
        optimizer.step()


@pytest.mark.parametrize(
    ("number", "place", "what"),
    [(-math.inf, "bias", "exclude"), (math.nan, "weight", "finite"), (1e30, "weight", "squares")],
)
def test_a_weight_that_has_no_norm_is_refused(number, place, what):
    """A class cannot be barred by its bias, as the norm of the outputs would be infinite."""
    layer = FactoredOutput(D, V, bias=True)
    before, parts = layer.state.weight(), {"weight": torch.randn(V, D), "bias": torch.randn(V)}
    parts[place][V - 1] = number
    with pytest.raises(ValueError, match=what):
        layer.set_weight(**parts)
    with pytest.raises(RuntimeError, match=what):
        layer.load_state_dict(layer.state_dict() | parts)
    assert torch.equal(layer.state.weight(), before)


def test_half_precision_computes_in_single():
    twins = Twins(SphericalSoftmax(), dtype=torch.bfloat16, reduction="mean", lr=0.2)
    twins.weight = twins.weight.detach().float().requires_grad_()
    dense = torch.optim.SGD([twins.weight], 0.2)
    for hidden, ids, _ in batches(30, k=1, dtype=torch.bfloat16):
        loss = twins.layer(hidden, ids)
        expected = spherical_loss(hidden.float(), twins.weight, ids, loss=twins.loss)
        assert loss.dtype == torch.float32
        assert worst(loss.detach(), expected.detach()) < 1e-5
        for value, optimizer in ((loss, twins.optimizer), (expected, dense)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    assert worst(twins.layer.state.weight(), twins.weight.detach()) < 1e-5

    layer = FactoredOutput(D, V)
    FactoredSGD(layer, 0.1)
    hidden, ids, _ = next(batches(1, dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = layer(hidden, ids)
    assert torch.equal(inside, layer(hidden, ids))
    with pytest.raises(TypeError, match="float16"):
        layer.half()(hidden.half(), ids)


def test_moves_between_dtypes():
    twins = Twins(ZLoss(), lr=0.05, bias=True)
    twins.train(batches(20))
    weight = twins.layer.weight
    single = twins.layer.to(torch.float32)
    assert torch.equal(single.weight, weight.float())
    assert max(single.consistency()[:3]) < 1e-6
    before = snapshot(single)
    single.to("cpu")
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(single), strict=True))


@pytest.mark.parametrize("make", [ScreenedSoftmax, SVDSoftmax])
def test_a_screen_gets_its_rotation_for_nothing(make, monkeypatch):
    """The kept Q has the eigenvectors that an `SVDPreview` makes from the weight at O(V d^2)."""
    twins = Twins(SquaredError(), bias=True)
    twins.train(batches(40))
    layer = twins.layer
    made = []
    monkeypatch.setattr(calibration, "gram_matrix", lambda weight: made.append(weight) or weight.T @ weight)
    settings = {"window": 6} if make is SVDSoftmax else {"preview": SVDPreview(6)}
    screen = make.from_layer(layer, **settings, candidates=30, exact=True)
    assert not made
    hidden = next(batches(1))[0]
    assert torch.equal(screen.topk(hidden, 5).indices, layer.topk(hidden, 5).indices)
    kept = principal_rotation(layer.gram()).weight_side
    from_weight = calibration.rotation_of(layer.weight, None).weight_side
    assert worst((kept.T @ from_weight).abs(), torch.eye(D, dtype=torch.float64)) < 1e-8
    screen.refresh()  # the weight may have changed since: now Q is made
    assert len(made) == 2
    with pytest.raises(ValueError, match="gram"):
        ScreenedSoftmax(layer.weight, preview=SVDPreview(6), candidates=30, gram=torch.eye(3))
    ScreenedSoftmax.from_layer(layer, preview=Int8Preview(), candidates=30)  # has no use for it


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_training_goes_on_bit_for_bit(dtype):
    """From the state dicts of layer and optimizer, in whatever condition the factors are."""

    def train(twins, some):
        for hidden, ids, _ in some:
            twins.layer(hidden, ids).backward()
            twins.optimizer.step()
            twins.optimizer.zero_grad()

    settings = {"dtype": dtype, "lr": 0.01, "bias": True, "weight_decay": 0.01}
    steps = list(batches(120, k=1, dtype=dtype))
    straight, killed, resumed = (Twins(SquaredError(), **settings) for _ in range(3))
    train(straight, steps)
    train(killed, steps[:70])
    resumed.layer.load_state_dict(killed.layer.state_dict())
    resumed.optimizer.load_state_dict(killed.optimizer.state_dict())
    train(resumed, steps[70:])
    assert all(torch.equal(a, b) for a, b in zip(snapshot(straight.layer), snapshot(resumed.layer), strict=True))
    assert straight.layer._stabilizer.counters() == resumed.layer._stabilizer.counters()


def test_factors_of_another_weight_are_left_out():
    one, two = Twins(SquaredError()), Twins(SquaredError())
    one.train(batches(5))
    before = snapshot(two.layer)
    with pytest.warns(UserWarning, match="load the model before its optimizer"):
        two.optimizer.load_state_dict(one.optimizer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(two.layer), strict=True))
    smaller = FactoredSGD(FactoredOutput(D, V - 1, dtype=torch.float64), 0.1)
    with pytest.raises(ValueError, match="shapes"):
        two.optimizer.load_state_dict(smaller.state_dict())
    without = {name: part for name, part in one.optimizer.state_dict().items() if name != "factors"}
    two.optimizer.load_state_dict(without)
    assert two.optimizer.param_groups[0]["lr"] == one.optimizer.param_groups[0]["lr"]
