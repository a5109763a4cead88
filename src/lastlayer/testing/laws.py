"""The laws of `OutputLayer`, each a function of one `LayerCase` that raises where the law is broken."""

import copy
import io
import pickle
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from lastlayer.layers.base import OutputLayer
from lastlayer.testing.cases import LayerCase
from lastlayer.testing.derivatives import law_functional_transforms, law_second_derivatives
from lastlayer.testing.rows import ROWS, assert_equal, rows_for
from lastlayer.testing.without_values import law_without_values


def law_normalised(case: LayerCase) -> None:
    """1. Probabilities sum to one, and equal the oracle's."""
    layer = case.build()
    hidden, _ = rows_for(layer)
    log_prob = layer.log_prob(hidden)
    assert_equal(log_prob.exp().sum(-1), torch.ones(ROWS, dtype=torch.float64))
    assert_equal(log_prob, case.oracle(layer, hidden))


def law_target_is_gathered(case: LayerCase) -> None:
    """2. The log-probability of one class is that entry of all of them; 0 where ignored."""
    layer = case.build()
    everything = torch.arange(layer.num_classes)
    hidden, _ = rows_for(layer, layer.num_classes)
    expected = case.oracle(layer, hidden).diagonal().clone()
    assert_equal(layer.target_log_prob(hidden, everything), expected)
    ignored = everything.clone()
    ignored[::2] = layer.ignore_index
    expected[::2] = 0
    assert_equal(layer.target_log_prob(hidden, ignored), expected)


def law_topk_is_sorted(case: LayerCase) -> None:
    """3. Top-k equals the top-k of all log-probabilities, for one class, a few, and all."""
    layer = case.build()
    for scale in (0.1, 3.0):
        hidden, _ = rows_for(layer, scale=scale)
        log_prob = case.oracle(layer, hidden)
        for k in {1, min(3, layer.num_classes), layer.num_classes}:
            answer = layer.topk(hidden, k)
            assert_equal(answer.log_prob, log_prob.topk(k).values)
            assert_equal(log_prob.gather(-1, answer.indices), answer.log_prob)
            assert all(len(set(row)) == k for row in answer.indices.tolist()), "topk repeats a class"


def law_score_is_gathered(case: LayerCase) -> None:
    """2b. The scores of candidates are those entries of all log-probabilities; 0 where padded."""
    layer = case.build()
    V = layer.num_classes
    generator = torch.Generator().manual_seed(11)
    hidden, _ = rows_for(layer)
    log_prob = case.oracle(layer, hidden)
    for count in (0, 1, 3, 2 * V):
        ids = torch.randint(V, (ROWS, count), generator=generator)
        expected = log_prob.gather(-1, ids)
        assert_equal(layer.score(hidden, ids), expected)
        ids[:, ::2], expected[:, ::2] = layer.ignore_index, 0
        assert_equal(layer.score(hidden, ids), expected)
    assert_equal(layer.score(hidden, ids.int()), expected)
    assert_equal(layer.score(hidden[0], ids[0]), expected[0])
    assert layer.score(hidden[:0], ids[:0]).shape == (0, ids.shape[1])
    weights = torch.linspace(-1, 2, ids.numel(), dtype=torch.float64).reshape(ids.shape)
    leaf = hidden.clone().requires_grad_()
    slopes = []
    for values in (layer.score(leaf, ids), case.oracle(layer, leaf).gather(-1, ids.clamp(min=0))):
        total = (values * weights)[:, 1::2].sum() + 0 * leaf.sum()  # one class: no logit depends on hidden
        slopes.append(torch.autograd.grad(total, leaf)[0])
    assert_equal(slopes[0], slopes[1])


def law_topk_of_a_selection(case: LayerCase) -> None:
    """3b. With `exclude` or `allowed`, top-k is that of the log-probabilities with -inf at all other classes."""
    layer = case.build()
    V = layer.num_classes
    generator = torch.Generator().manual_seed(12)
    mask = torch.rand(V, generator=generator) < 0.6
    mask[V // 2] = True
    everything = torch.arange(V).expand(ROWS, V)
    for scale in (0.1, 3.0):
        hidden, _ = rows_for(layer, scale=scale)
        log_prob = case.oracle(layer, hidden)
        some = torch.randint(V, (ROWS, max(1, V // 3)), generator=generator)
        some[:, ::2] = log_prob.argsort(-1, descending=True)[:, : some.shape[1]][:, ::2]  # the very best
        some[1] = layer.ignore_index
        for exclude in (None, some, some[:, :0], everything):
            for allowed in (None, mask, mask.nonzero()[:, 0]):
                expected = log_prob.detach().clone()
                if exclude is not None:
                    for row, ids in zip(expected, exclude, strict=True):
                        row[ids[ids != layer.ignore_index]] = -torch.inf
                if allowed is not None:
                    expected[:, ~mask] = -torch.inf
                for k in {1, min(3, V), V}:
                    best = layer.topk(hidden, k, exclude=exclude, allowed=allowed)
                    values = expected.topk(k).values
                    assert_equal(best.log_prob, values)
                    assert torch.equal(best.indices == -1, values == -torch.inf)
                    assert_equal(
                        expected.gather(-1, best.indices.clamp(min=0))[values > -torch.inf],
                        best.log_prob[values > -torch.inf],
                    )
    shaped = layer.topk(hidden.reshape(1, ROWS, -1), 1, exclude=some[None], allowed=mask)
    assert_equal(shaped.log_prob[0], layer.topk(hidden, 1, exclude=some, allowed=mask).log_prob)
    assert layer.topk(hidden[0], 1, exclude=some[0]).indices.shape == (1,)
    assert layer.topk(hidden[:0], 1, exclude=some[:0]).indices.shape == (0, 1)


def law_a_bias_of_minus_infinity_bars(case: LayerCase) -> None:
    """A class with a bias of -inf has no probability and no gradient, and no query returns it."""
    layer = case.build(reduction="sum")
    bias = layer._parameters.get("bias")
    if bias is None or bias.shape != (layer.num_classes,) or layer.num_classes < 3:
        return
    V, order = layer.num_classes, getattr(layer, "order", None)
    places = torch.arange(V // 2 + 1)  # of the first clusters all, where there are clusters
    with torch.no_grad():
        bias[places] = -torch.inf
    barred = torch.zeros(V, dtype=torch.bool)
    barred[places if order is None else order[places]] = True
    left = (~barred).nonzero()[:, 0]
    hidden, _ = rows_for(layer)
    targets = left[torch.arange(ROWS) % len(left)]

    log_prob = layer.log_prob(hidden)
    assert bool((log_prob[:, barred] == -torch.inf).all() and log_prob[:, ~barred].isfinite().all())
    assert_equal(log_prob.exp().sum(-1), torch.ones(ROWS, dtype=torch.float64))
    assert_equal(layer.target_log_prob(hidden, targets), log_prob.gather(1, targets[:, None])[:, 0])
    everything = torch.arange(V).expand(ROWS, V)
    for ids in (everything, everything[:, :2]):
        assert_equal(layer.score(hidden, ids), log_prob.gather(1, ids))
    best = layer.topk(hidden, V)
    assert_equal(best.log_prob, log_prob.topk(V).values)
    assert bool(((best.indices == -1) == (best.log_prob == -torch.inf)).all())
    assert not bool(barred[layer.sample(hidden, 50)].any()), "a barred class was drawn"

    losses = [layer.target_log_prob(hidden, targets).sum(), log_prob.exp()[:, ::2].sum()]
    losses += [best.log_prob[:, 0].sum(), layer.score(hidden, targets[:, None]).sum()]
    if case.likelihood and not getattr(layer, "label_smoothing", 0):  # which gives every class a share
        losses.append(layer(hidden, targets))
    for loss in losses:
        assert loss.isfinite()
        for name, slope in _slopes(layer, loss).items():
            assert slope.isfinite().all(), f"the gradient of {name} is infinite or NaN"
            assert name != "bias" or not slope[places].any(), "a barred class has a gradient"
    lost = layer.target_log_prob(hidden[:1], barred.nonzero()[:1, 0])
    assert lost.item() == -torch.inf
    assert not any(slope.isnan().any() for slope in _slopes(layer, lost.sum()).values())


def _slopes(layer: OutputLayer, loss: Tensor) -> dict[str, Tensor]:
    """The gradients of all parameters, dense."""
    names, parameters = zip(*layer.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
    return {name: slope.to_dense() for name, slope in zip(names, found, strict=True)}


def law_loss_is_likelihood(case: LayerCase) -> None:
    """4. The loss and all its gradients are the oracle's, for every reduction and a non-uniform upstream."""
    if not case.likelihood:
        return
    for reduction in ("mean", "sum", "none"):
        layer = case.build(reduction=reduction)
        hidden, targets = rows_for(layer)
        targets[2] = layer.ignore_index
        upstream = torch.linspace(-1.5, 2.0, ROWS, dtype=torch.float64) if reduction == "none" else 0.7
        answers = []
        for loss_of in (layer, lambda h, t, layer=layer: case.loss(layer, h, t)):
            layer.zero_grad()
            leaf = hidden.clone().requires_grad_()
            loss = loss_of(leaf, targets)
            (loss * upstream).sum().backward()
            gradients = {
                name: torch.zeros_like(p) if p.grad is None else p.grad.to_dense().clone()
                for name, p in layer.named_parameters()
            }
            answers.append({"loss": loss.detach(), "hidden": leaf.grad, **gradients})
        assert_equal(answers[0], answers[1])


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
    """No rows, or none that counts: "mean" is nan as `F.cross_entropy` answers, else 0; gradients are 0."""
    for dtype, rows, reduction in product(
        (torch.float64, torch.bfloat16, torch.float16), (0, 3), ("mean", "sum", "none")
    ):
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


def law_gradcheck(case: LayerCase) -> None:
    """6a. First derivatives of every differentiable call, by finite differences in float64."""
    for reduction in ("mean", "sum", "none"):
        layer = case.build(reduction=reduction)
        hidden, targets = rows_for(layer, 4)
        targets[1] = layer.ignore_index
        if case.likelihood:
            _check_gradients(layer, hidden, lambda layer, h, t=targets: layer(h, t))
    targets = targets.clamp(min=0)
    _check_gradients(layer, hidden, lambda layer, h: layer.target_log_prob(h, targets))
    _check_gradients(layer, hidden, lambda layer, h: layer.log_prob(h))
    _check_gradients(layer, hidden, lambda layer, h: layer.topk(h, 1).log_prob)
    best = layer.topk(hidden, 1).indices
    _check_gradients(layer, hidden, lambda layer, h: layer.score(h, torch.cat([best, targets[:, None]], 1)))
    if layer.num_classes > 1:
        _check_gradients(layer, hidden, lambda layer, h: layer.topk(h, 1, exclude=best).log_prob)


def _check_gradients(layer: OutputLayer, hidden: Tensor, call: Callable[[OutputLayer, Tensor], Tensor]) -> None:
    """`gradcheck` of `call(layer, hidden)` in hidden and parameters, whose gradients may be sparse."""
    names = [name for name, _ in layer.named_parameters()]
    caller = _Caller(layer, call)

    def of_inputs(hidden: Tensor, *parameters: Tensor) -> Tensor:
        dense = {f"layer.{n}": _DenseGradient.apply(p) for n, p in zip(names, parameters, strict=True)}
        return torch.func.functional_call(caller, dense, (hidden,))  # pyright: ignore[reportArgumentType]

    assert gradcheck(of_inputs, [hidden.detach().requires_grad_(), *layer.parameters()], masked=False)


class _Caller(nn.Module):
    """Any call of a layer as a `forward`, for `functional_call`."""

    def __init__(self, layer: OutputLayer, call: Callable[[OutputLayer, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.call = call

    def forward(self, hidden: Tensor) -> Tensor:
        return self.call(self.layer, hidden)


class _DenseGradient(torch.autograd.Function):
    """The identity; its gradient is dense, since `gradcheck` takes no sparse gradient of a dense input."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        return upstream[0].to_dense()


def law_low_precision(case: LayerCase) -> None:
    """6b. In bfloat16, and under autocast, no further from float64 than plain PyTorch operations are."""
    for dtype in (torch.bfloat16, torch.float32):
        layer = case.build(dtype=dtype, reduction="sum")
        hidden, targets = rows_for(layer, 64)
        exact = copy.deepcopy(layer).double()
        truth = case.oracle(exact, hidden.double())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
            plain = case.oracle(layer, hidden)
            ours = layer.log_prob(hidden)
            loss = layer(hidden, targets)
            target = layer.target_log_prob(hidden, targets)
        assert ours.dtype == loss.dtype == target.dtype == torch.float32
        allowed = 1.2 * _rms(plain.double() - truth) + 1e-6
        assert _rms(ours.double() - truth) <= allowed, "less accurate than plain PyTorch in this dtype"
        picked = truth.gather(-1, targets[:, None])[:, 0]
        assert _rms(target.double() - picked) <= 2 * allowed, "target_log_prob is less accurate than log_prob"


def _rms(error: Tensor) -> float:
    return float(error.detach().square().mean().sqrt())


# Of hidden states and parameters: their logits, d times the square, are exact in the dtype, and so large that the
# steps between its numbers (in half precision: those of float32) are far above the tolerance.
COMMON = {torch.float16: 8.0, torch.bfloat16: 4096.0, torch.float32: 4096.0, torch.float64: 2.0**20}


def law_large_common_logits(case: LayerCase) -> None:
    """6c. A large number that all logits share costs no digits: of no call, and of no gradient."""
    for dtype, size in COMMON.items():
        layer = case.build(dtype=dtype, reduction="sum")
        case.fill(layer, size)
        hidden, targets = rows_for(layer)
        hidden = torch.full_like(hidden, size)
        exact = copy.deepcopy(layer).double()
        log_prob = case.oracle(exact, hidden.double())
        tolerance = 1e-9 if dtype == torch.float64 else 1e-5

        def close(
            name: str, actual: Tensor, expected: Tensor, scale: float = 1.0, tolerance: float = tolerance
        ) -> None:
            allowed = tolerance * (scale + expected.abs())
            assert ((actual.double() - expected).abs() <= allowed).all(), f"large logits cost {name} its digits"

        at_targets = log_prob.gather(-1, targets[:, None])
        close("log_prob", layer.log_prob(hidden), log_prob)
        close("target_log_prob", layer.target_log_prob(hidden, targets), at_targets[:, 0])
        close("score", layer.score(hidden, targets[:, None]), at_targets)
        best = layer.topk(hidden, layer.num_classes)
        close("topk", best.log_prob, log_prob.gather(-1, best.indices))
        if not case.likelihood:
            continue
        leaf, twin = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
        loss, true_loss = layer(leaf, targets), case.loss(exact, twin, targets)
        close("the loss", loss, true_loss)
        if dtype in (torch.float32, torch.float64):
            loss.backward()
            true_loss.backward()
            rounding = 32 * torch.finfo(dtype).eps
            for ours, true in [(leaf, twin), *zip(layer.parameters(), exact.parameters(), strict=True)]:
                if true.grad is not None and ours.grad is not None:
                    close("a gradient", ours.grad.to_dense(), true.grad, ROWS * size**2, rounding)


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


def law_samples_follow_the_model(case: LayerCase) -> None:
    """Samples have the model's frequencies: chi-squared within five standard deviations of its mean."""
    layer = case.build()
    hidden, _ = rows_for(layer, 2)
    draws = 20_000
    torch.manual_seed(0)
    ids = layer.sample(hidden, draws)
    for row, log_prob in zip(ids, case.oracle(layer, hidden), strict=True):
        expected = draws * log_prob.exp()
        count = torch.bincount(row, minlength=layer.num_classes)
        common = expected >= 5
        chi2 = ((count - expected)[common].square() / expected[common]).sum()
        freedom = max(int(common.sum()) - 1, 1)
        assert chi2 <= freedom + 5 * (2 * freedom) ** 0.5, f"chi-squared {chi2:.1f} at {freedom} degrees"
        rare = expected[~common].sum()
        assert abs(count[~common].sum() - rare) <= 5 * rare.sqrt() + 5


LAWS: tuple[Callable[[LayerCase], None], ...] = (
    law_normalised,
    law_target_is_gathered,
    law_score_is_gathered,
    law_topk_is_sorted,
    law_topk_of_a_selection,
    law_a_bias_of_minus_infinity_bars,
    law_loss_is_likelihood,
    law_any_shape,
    law_any_integer_targets,
    law_gradcheck,
    law_second_derivatives,
    law_functional_transforms,
    law_without_values,
    law_low_precision,
    law_large_common_logits,
    law_survives_copies,
    law_refuses_bad_input,
    law_samples_follow_the_model,
)


def certify(case: LayerCase) -> None:
    """Runs every law on one case; the first that is broken raises."""
    for law in LAWS:
        law(case)
