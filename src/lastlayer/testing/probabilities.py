"""The laws of log-probabilities and of queries."""

import torch
from torch import Tensor

from lastlayer.layers.base import OutputLayer, TopK
from lastlayer.testing.cases import ROWS, LayerCase, assert_equal, gathered, rows_for, without


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
    targets = torch.arange(layer.num_classes)
    hidden, _ = rows_for(layer, layer.num_classes)
    log_prob = case.oracle(layer, hidden)
    for _ in range(2):
        expected = gathered(log_prob, targets[:, None], layer.ignore_index)[:, 0]
        assert_equal(layer.target_log_prob(hidden, targets), expected)
        targets[::2] = layer.ignore_index


def law_score_is_gathered(case: LayerCase) -> None:
    """2b. The scores of candidates are those entries of all log-probabilities; 0 where padded."""
    layer = case.build()
    generator = torch.Generator().manual_seed(11)
    hidden, _ = rows_for(layer)
    log_prob = case.oracle(layer, hidden)
    for count in (0, 1, 3, 2 * layer.num_classes):
        ids = torch.randint(layer.num_classes, (ROWS, count), generator=generator)
        assert_equal(layer.score(hidden, ids), log_prob.gather(-1, ids))
        ids[:, ::2] = layer.ignore_index
        expected = gathered(log_prob, ids, layer.ignore_index)
        assert_equal(layer.score(hidden, ids), expected)
    assert_equal(layer.score(hidden, ids.int()), expected)
    assert_equal(layer.score(hidden[0], ids[0]), expected[0])
    assert layer.score(hidden[:0], ids[:0]).shape == (0, ids.shape[1])


def law_topk_is_sorted(case: LayerCase) -> None:
    """3. Top-k equals the top-k of all log-probabilities, for one class, a few, and all."""
    layer = case.build()
    for scale in (0.1, 3.0):
        hidden, _ = rows_for(layer, scale=scale)
        log_prob = case.oracle(layer, hidden)
        for k in {1, min(3, layer.num_classes), layer.num_classes}:
            _check_topk(layer.topk(hidden, k), log_prob)


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
            left = log_prob if exclude is None else without(log_prob, exclude)
            for allowed in (None, mask):
                expected = left if allowed is None else left.masked_fill(~mask, -torch.inf)
                for k in {1, min(3, V), V} if exclude is some else {min(3, V)}:
                    _check_topk(layer.topk(hidden, k, exclude=exclude, allowed=allowed), expected)
    best = layer.topk(hidden, 1, exclude=some, allowed=mask)
    assert_equal(layer.topk(hidden, 1, exclude=some, allowed=mask.nonzero()[:, 0]), best)
    shaped = layer.topk(hidden.reshape(1, ROWS, -1), 1, exclude=some[None], allowed=mask)
    assert_equal(shaped.log_prob[0], best.log_prob)
    assert layer.topk(hidden[0], 1, exclude=some[0]).indices.shape == (1,)
    assert layer.topk(hidden[:0], 1, exclude=some[:0]).indices.shape == (0, 1)


def _check_topk(best: TopK, log_prob: Tensor) -> None:
    """The largest of `log_prob (N, V)`, each with its class; -1 where no class with probability is left."""
    values = log_prob.topk(best.indices.shape[-1]).values
    assert_equal(best.log_prob, values)
    found = values > -torch.inf
    assert torch.equal(best.indices >= 0, found)
    assert_equal(log_prob.gather(-1, best.indices.clamp(min=0))[found], values[found])
    repeated = best.indices.sort(-1).values.diff() == 0
    assert int(repeated.sum()) == int((~found).sum(-1).sub(1).clamp(min=0).sum()), "topk repeats a class"


def law_a_bias_of_minus_infinity_bars(case: LayerCase) -> None:
    """A class with a bias of -inf has no probability and no gradient, and no query returns it."""
    layer = case.build(reduction="sum")
    bias = dict(layer.named_parameters(recurse=False)).get("bias")
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
    _check_topk(best, log_prob)
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
