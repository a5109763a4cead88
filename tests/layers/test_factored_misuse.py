"""Misuse of FactoredOutput is a clear error, or changes nothing."""

import copy
import math
import pickle

import pytest
import torch
from factored_twins import Twins, batches, snapshot
from torch import nn

from lastlayer import FactoredOutput, FactoredSGD, SphericalSoftmax, ZLoss
from lastlayer.functional import spherical_loss


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": "a"}, "lr must be a number, got 'a'"),
        ({"lr": None}, "lr must be a number, got None"),
        ({"lr": 0.1, "weight_decay": "b"}, "weight_decay must be a number, got 'b'"),
        ({"lr": 0.1, "max_norm": "c"}, "max_norm must be a number, got 'c'"),
    ],
)
def test_settings_that_are_no_numbers(settings, words):
    with pytest.raises(TypeError, match=words):
        FactoredSGD(FactoredOutput(4, 20), **settings)


def test_misuse_of_the_optimizer():
    layer = FactoredOutput(4, 20)
    hidden, targets = torch.ones(3, 4), torch.arange(3)
    model = nn.Sequential(nn.Linear(4, 4), layer)
    ordinary = torch.optim.AdamW(model.parameters())
    before = snapshot(layer)
    loss = layer(model[0](hidden), targets)
    with pytest.raises(RuntimeError, match="no FactoredSGD owns"):
        loss.backward()
    ordinary.step()
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(layer), strict=True))

    optimizer = FactoredSGD(layer, 0.1)
    with pytest.raises(RuntimeError, match="without a backward"):
        optimizer.step()
    layer(hidden, targets).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="without a backward"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="without zero_grad"):
        layer(hidden, targets).backward()
    optimizer.zero_grad()
    stale = layer(hidden, targets)
    layer(hidden, targets).backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="changed by a step"):
        stale.backward()

    second = FactoredSGD(layer, 0.1)
    layer(hidden, targets).backward()
    with pytest.raises(RuntimeError, match="another FactoredSGD"):
        optimizer.step()
    second.step()
    del second, optimizer
    with pytest.raises(RuntimeError, match="no FactoredSGD owns"):
        layer(hidden, targets).backward()


@pytest.mark.parametrize(
    ("settings", "error", "name"),
    [
        ({"momentum": 0.9}, TypeError, "momentum"),
        ({"betas": (0.9, 0.99)}, TypeError, "betas"),
        ({"lr": -1.0}, ValueError, "lr"),
        ({"lr": math.nan}, ValueError, "lr"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay"),
        ({"max_norm": 0.0}, ValueError, "max_norm"),
    ],
)
def test_bad_settings(settings, error, name):
    with pytest.raises(error, match=name):
        FactoredSGD(FactoredOutput(4, 20), **{"lr": 0.1, **settings})


def test_bad_layers_and_losses():
    with pytest.raises(TypeError, match="layers"):
        FactoredSGD([nn.Linear(3, 4)], 0.1)
    with pytest.raises(TypeError, match="loss"):
        FactoredOutput(4, 20, loss=nn.MSELoss())
    with pytest.raises(ValueError, match="epsilon"):
        SphericalSoftmax(epsilon=0.0)
    with pytest.raises(ValueError, match="alpha"):
        ZLoss(alpha=-1.0)
    optimizer = FactoredSGD(layer := FactoredOutput(4, 20), 0.5, weight_decay=2.0)
    layer(torch.ones(2, 4), torch.arange(2)).backward()
    with pytest.raises(ValueError, match="weight_decay"):
        optimizer.step()


def test_bad_targets():
    layer = FactoredOutput(4, 20)
    hidden, ids = torch.ones(3, 4), torch.zeros(3, 2, dtype=torch.int64)
    for error, name, targets, weights in [
        (TypeError, "to_sparse", torch.ones(3, 20), None),
        (IndexError, "targets", ids + 20, None),
        (IndexError, "targets", ids - 1, None),
        (ValueError, "targets", ids[:2], None),
        (ValueError, "target_weights", ids, torch.ones(3)),
        (TypeError, "target_weights", ids, ids),
        (TypeError, "target_weights", ids, torch.ones(3, 2, requires_grad=True)),
        (ValueError, "sparse", torch.ones(3, 19).to_sparse(), None),
        (ValueError, "target_weights", torch.ones(3, 20).to_sparse(), torch.ones(3)),
        (TypeError, "targets", torch.ones(3, 20).to_sparse().requires_grad_(), None),
    ]:
        with pytest.raises(error, match=name):
            layer(hidden, targets, weights)
    with pytest.raises(ValueError, match="weight"):
        layer.set_weight(torch.ones(4, 20))
    with pytest.raises(ValueError, match="bias"):
        layer.set_weight(torch.ones(20, 4), torch.ones(20))
    with pytest.raises(TypeError, match="weight must be a tensor, got list"):
        layer.set_weight([[1.0] * 4] * 20)


def test_copies_start_afresh():
    """A copy has the weight, no optimizer, and no recorded step; a new weight forgets what was recorded."""
    layer = FactoredOutput(4, 20)
    optimizer = FactoredSGD(layer, 0.1)
    hidden, targets = torch.ones(3, 4), torch.arange(3)
    layer(hidden, targets).backward()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin.weight, layer.weight)
        with pytest.raises(RuntimeError, match="no FactoredSGD owns"):
            twin(hidden, targets).backward()
    layer.set_weight(torch.zeros(20, 4))
    with pytest.raises(RuntimeError, match="without a backward"):
        optimizer.step()
    assert not layer.weight.any()


def test_stabilizing_between_backward_and_step():
    """The step's record is of the state before the repairs."""
    layer = FactoredOutput(4, 20)
    optimizer = FactoredSGD(layer, 0.1)
    layer(torch.ones(3, 4), torch.arange(3)).backward()
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match="between backward and step"):
        layer.stabilize()
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(layer), strict=True))
    optimizer.step()
    layer.stabilize()
    layer(torch.ones(3, 4), torch.arange(3))
    optimizer.zero_grad()
    layer(torch.ones(3, 4), torch.arange(3)).backward()
    optimizer.zero_grad()
    layer.stabilize()


def test_frozen_layers_record_nothing():
    layer = FactoredOutput(4, 20).requires_grad_(False)
    hidden = torch.ones(3, 4, requires_grad=True)
    layer(hidden, torch.arange(3)).backward()
    assert hidden.grad is not None


def test_a_refilled_input_buffer_does_not_change_the_step():
    twins = Twins(SphericalSoftmax())
    buffer = torch.empty(9, 12, dtype=torch.float64)
    for hidden, ids, weights in batches(10):
        buffer.copy_(hidden)
        loss = twins.layer(buffer, ids, weights)
        loss.backward()
        buffer.fill_(1e6)
        twins.optimizer.step()
        twins.optimizer.zero_grad()
    other = Twins(SphericalSoftmax())
    other.train(batches(10))
    assert torch.equal(twins.layer.weight, other.layer.weight)


def test_hidden_states_with_the_negative_bit():
    twins = Twins(SphericalSoftmax())
    for hidden, ids, weights in batches(3):
        twins.train([(torch.complex(hidden, -hidden).conj().imag, ids, weights)])


def test_clipping_entries_has_no_effect():
    """Those of the weight's gradient are never made, so `clip_grad_value_` over a model passes the layer by."""
    layers = []
    for clips in (False, True):
        twins = Twins(SphericalSoftmax())
        for hidden, ids, weights in batches(5):
            twins.layer(hidden, ids, weights).backward()
            if clips:
                nn.utils.clip_grad_value_(twins.layer.parameters(), 1e-6)
            twins.optimizer.step()
            twins.optimizer.zero_grad()
        layers.append(twins.layer)
    assert torch.equal(layers[0].weight, layers[1].weight)


def test_hooks_of_the_optimizer_are_called():
    layer = FactoredOutput(4, 20)
    optimizer = FactoredSGD(layer, 0.1)
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    before = layer.weight
    layer(torch.ones(3, 4), torch.arange(3)).backward()
    optimizer.step()
    assert called == ["before", "after"]
    assert not torch.equal(layer.weight, before)


@pytest.mark.parametrize("ask", ["backward", "grad", "inputs", "hvp"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_are_refused(ask, reduction):
    """Also where other terms of the same graph have them."""
    layer = FactoredOutput(4, 20, reduction=reduction, dtype=torch.float64)
    optimizer = FactoredSGD(layer, 0.1)
    hidden = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def loss(rows):
        return (rows.square().sum() * layer(rows, torch.arange(3))).sum()

    (gradient,) = torch.autograd.grad(loss(hidden), hidden, create_graph=True)
    ways = {
        "backward": lambda: gradient.sum().backward(),
        "grad": lambda: torch.autograd.grad(gradient.square().sum(), hidden),
        "inputs": lambda: gradient.sum().backward(inputs=[hidden]),
        "hvp": lambda: torch.autograd.functional.hvp(loss, hidden.detach(), torch.ones_like(hidden)),
    }
    with pytest.raises(RuntimeError, match="differentiated twice"):
        ways[ask]()
    del optimizer


def test_what_autograd_grad_leaves_is_not_recorded():
    """Neither by itself, nor with the next backward; nor what `zero_grad` took back."""
    twins = Twins(SphericalSoftmax())
    for hidden, ids, weights in batches(10):
        leaf = hidden.clone().requires_grad_()
        loss = twins.layer(leaf, ids, weights)
        torch.autograd.grad(loss, leaf, retain_graph=True)
        torch.autograd.grad(twins.layer(2 * leaf, ids, weights), leaf)
        twins.layer(leaf, ids, weights).backward()
        twins.optimizer.zero_grad()
        twins.backward(hidden, ids, weights)
        torch.autograd.grad(loss, leaf)
        twins.step()
    twins.compare()


def test_a_backward_that_failed_can_be_run_again():
    """After `zero_grad`, which the error wants; of two layers in one graph only the other was recorded."""
    layers = [FactoredOutput(4, 20, dtype=torch.float64) for _ in range(2)]
    optimizers = [FactoredSGD(layer, 0.1) for layer in layers]
    hidden, targets = torch.randn(3, 4, dtype=torch.float64), torch.arange(3)
    layers[1](hidden, targets).backward()
    optimizers[1].step()
    with pytest.raises(RuntimeError, match="without zero_grad"):
        (layers[0](hidden, targets) + layers[1](hidden, targets)).backward()
    for optimizer in optimizers:
        optimizer.zero_grad()
    before = [layer.weight for layer in layers]
    (layers[0](hidden, targets) + layers[1](hidden, targets)).backward()
    for optimizer in optimizers:
        optimizer.step()
    for layer, weight in zip(layers, before, strict=True):
        dense = weight.clone().requires_grad_()
        spherical_loss(hidden, dense, targets, loss=layer.loss).backward()
        torch.testing.assert_close(layer.weight, weight - 0.1 * dense.grad)
