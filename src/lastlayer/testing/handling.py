"""The laws of shapes, targets, copies and bad input."""

import copy
import io
import pickle
from collections.abc import Callable
from itertools import product

import torch

from lastlayer.testing.cases import REDUCTIONS, LayerCase, assert_equal, rows_for


def law_any_shape(case: LayerCase) -> None:
    """5. Leading shapes, no rows, every target ignored, non-contiguous input, huge logits."""
    layer = case.build(reduction="none")
    hidden, targets = rows_for(layer, 6)
    log_prob, loss = layer.log_prob(hidden), layer(hidden, targets)
    k = min(2, layer.num_classes)
    for shape in ((6,), (2, 3), (1, 6, 1)):
        shaped, ids = hidden.reshape(*shape, -1), targets.reshape(shape)
        assert_equal(layer.log_prob(shaped), log_prob.reshape(*shape, -1))
        if case.likelihood:
            assert_equal(layer(shaped, ids), loss.reshape(shape))
        assert layer.target_log_prob(shaped, ids).shape == shape
        assert layer.topk(shaped, k).indices.shape == (*shape, k)
        assert layer.sample(shaped, 4).shape == (*shape, 4)
    assert layer.log_prob(hidden[0]).shape == (layer.num_classes,)
    assert layer(hidden[0], targets[0]).shape == ()

    strided = hidden.T.contiguous().T
    assert_equal(layer.log_prob(strided), log_prob)
    spaced = torch.stack([targets, targets], 1)[:, 0]
    assert_equal(layer.target_log_prob(strided, spaced), layer.target_log_prob(hidden, targets))
    if case.likelihood:
        assert_equal(layer(strided, spaced), loss)

    _check_nothing_to_learn(case)
    extreme = (1e4 * hidden).requires_grad_()
    total = layer(extreme, targets).sum()
    (slope,) = torch.autograd.grad(total, extreme)
    assert total.isfinite(), "a huge logit makes the loss infinite or NaN"
    assert slope.isfinite().all(), "a huge logit makes the gradient infinite or NaN"


def _check_nothing_to_learn(case: LayerCase) -> None:
    """No rows, or none that counts: "mean" is nan as in `F.cross_entropy`, else 0; gradients are 0."""
    for dtype, rows, reduction in product((torch.float64, torch.bfloat16, torch.float16), (0, 3), REDUCTIONS):
        layer = case.build(dtype, reduction=reduction)
        hidden, targets = rows_for(layer, rows)
        hidden.requires_grad_()
        loss = layer(hidden, torch.full_like(targets, layer.ignore_index))
        assert_equal(loss, torch.full_like(loss, torch.nan if reduction == "mean" else 0.0))
        loss.sum().backward()
        for leaf in (hidden, *layer.parameters()):
            assert leaf.grad is None or not leaf.grad.to_dense().any(), "a gradient from nothing"
    layer = case.build()
    empty = rows_for(layer, 0)[0]
    assert layer.log_prob(empty).shape == (0, layer.num_classes)
    assert layer.topk(empty, 1).indices.shape == (0, 1)
    assert layer.sample(empty, 2).shape == (0, 2)


def law_any_integer_targets(case: LayerCase) -> None:
    """5b. Targets and ids of any integer dtype; `ignore_index` among them where the dtype has it."""
    layer = case.build(reduction="none", ignore_index=100)
    hidden, targets = rows_for(layer)
    targets[2] = layer.ignore_index
    expected = layer.target_log_prob(hidden, targets)
    loss = layer(hidden, targets) if case.likelihood else None
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16):
        narrow = targets.to(dtype)
        assert_equal(layer.target_log_prob(hidden, narrow), expected)
        assert_equal(layer.score(hidden, narrow[:, None])[:, 0], expected)
        if loss is not None:
            assert_equal(layer(hidden, narrow), loss)
    if case.likelihood:
        layer.reduction = "mean"
        assert_equal(layer(hidden, targets.int()), layer(hidden, targets))


def law_survives_copies(case: LayerCase) -> None:
    """7. `state_dict`, `deepcopy`, pickle and `.to(dtype)` keep the model."""
    layer = case.build()
    hidden, targets = rows_for(layer)
    expected = layer.log_prob(hidden)

    other = case.make(dtype=torch.float64)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_equal(twin.log_prob(hidden), expected, tolerance=0)
        assert (twin.reduction, twin.ignore_index) == (layer.reduction, layer.ignore_index)
        if case.likelihood:
            assert_equal(twin(hidden, targets), layer(hidden, targets), tolerance=1e-12)

    single = layer.to(torch.float32)
    assert {p.dtype for p in single.parameters()} == {torch.float32}
    assert_equal(single.log_prob(hidden.float()), expected.float(), tolerance=1e-4)


def law_refuses_bad_input(case: LayerCase) -> None:
    """8. Bad input is an error that names the argument; the layer is unchanged afterwards."""
    layer = case.build()
    before = copy.deepcopy(layer.state_dict())
    hidden, targets = rows_for(layer)
    V = layer.num_classes
    refusals: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (ValueError, "hidden", lambda: layer(hidden[:, :-1], targets)),
        (ValueError, "hidden", lambda: layer.log_prob(hidden[:, :-1])),
        (TypeError, "hidden", lambda: layer.log_prob(hidden.long())),
        (TypeError, "hidden", lambda: layer.topk(hidden.tolist(), 1)),  # pyright: ignore[reportArgumentType]
        (TypeError, "hidden", lambda: layer(hidden.to(torch.bfloat16), targets)),
        (TypeError, "targets", lambda: layer(hidden, targets.double())),
        (TypeError, "targets", lambda: layer(hidden, targets > 0)),
        (TypeError, "targets", lambda: layer(hidden, targets.tolist())),
        (ValueError, "targets", lambda: layer(hidden, targets[:-1])),
        (ValueError, "targets", lambda: layer.target_log_prob(hidden, targets[:, None])),
        (IndexError, "targets", lambda: layer(hidden, targets + V)),
        (IndexError, "targets", lambda: layer.target_log_prob(hidden, torch.full_like(targets, -1))),
        (ValueError, "k", lambda: layer.topk(hidden, 0)),
        (ValueError, "k", lambda: layer.topk(hidden, V + 1)),
        (TypeError, "k", lambda: layer.topk(hidden, 1.5)),  # pyright: ignore[reportArgumentType]
        (ValueError, "num_samples", lambda: layer.sample(hidden, 0)),
        (TypeError, "ids", lambda: layer.score(hidden, targets[:, None].double())),
        (ValueError, "ids", lambda: layer.score(hidden, targets)),
        (IndexError, "ids", lambda: layer.score(hidden, targets[:, None] + V)),
        (TypeError, "exclude", lambda: layer.topk(hidden, 1, exclude=targets[:, None] > 0)),
        (ValueError, "exclude", lambda: layer.topk(hidden, 1, exclude=targets)),
        (IndexError, "exclude", lambda: layer.topk(hidden, 1, exclude=targets[:, None] - V - 1)),
        (TypeError, "allowed", lambda: layer.topk(hidden, 1, allowed=hidden[0])),
        (TypeError, "allowed", lambda: layer.topk(hidden, 1, allowed=[0])),  # pyright: ignore[reportArgumentType]
        (ValueError, "allowed", lambda: layer.topk(hidden, 1, allowed=targets[:0])),
        (ValueError, "allowed", lambda: layer.topk(hidden, 1, allowed=torch.zeros(V, dtype=torch.bool))),
        (ValueError, "allowed", lambda: layer.topk(hidden, 1, allowed=torch.ones(V + 1, dtype=torch.bool))),
        (IndexError, "allowed", lambda: layer.topk(hidden, 1, allowed=targets + V)),
        (ValueError, "reduction", lambda: case.make(reduction="average")),
    ]
    for error, argument, call in refusals:
        try:
            call()
        except error as caught:
            assert argument in str(caught), f"the message does not name {argument}: {caught}"
        else:
            raise AssertionError(f"bad {argument} was accepted")
    after = layer.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), "bad input changed the layer"
