"""Queries with excluded and allowed classes, scores of given candidates, and classes that a bias of -inf bars."""

import pytest
import torch
from test_overflow import PREVIEWS, both_ways, every_preview, normal, way
from torch import nn

from lastlayer import MixtureOfSoftmaxes, ScreenedSoftmax, Sigsoftmax, SoftCap

__all__ = ["way"]  # a fixture
V, D, ROWS = 700, 16, 6


def head(barred=False):
    weight, bias, hidden = normal(V, D), normal(V, seed=1), normal(ROWS, D, seed=2)
    if barred:
        bias[::3] = -torch.inf
    return weight, bias, hidden


def excluded(hidden, weight, bias, count):
    """The best classes of every row, which a query would return, and padding."""
    best = nn.functional.linear(hidden, weight, bias).topk(count).indices
    best[0, -2:] = -100
    return best


def expected_topk(log_prob, k, exclude=None, allowed=None):
    log_prob = log_prob.clone()
    if exclude is not None:
        for row, ids in zip(log_prob, exclude, strict=True):
            row[ids[ids >= 0]] = -torch.inf
    if allowed is not None:
        log_prob[:, ~allowed] = -torch.inf
    values, indices = log_prob.topk(k)
    return values, indices.masked_fill(values == -torch.inf, -1)


@both_ways
@every_preview
@pytest.mark.parametrize("barred", [False, True])
@pytest.mark.parametrize("use", ["screen", "full"])
def test_excluded_and_allowed(way, preview, barred, use):
    weight, bias, hidden = head(barred)
    layer = ScreenedSoftmax(weight, bias, preview=preview, candidates=20, exact=True, use=use)
    loose = ScreenedSoftmax(
        weight, bias, preview=preview, candidates=20
    )  # its candidates have exact logits, no more
    log_prob = nn.functional.linear(hidden, weight, bias).log_softmax(-1)
    mask = torch.rand(V, generator=torch.Generator().manual_seed(3)) < 0.3
    few = torch.zeros(V, dtype=torch.bool)
    few[[4, 5, 300]] = True
    some = excluded(hidden, weight, bias, 40)  # more than candidates
    fewer = torch.cat([some[:, :9], some[:, 4:11]], 1)  # fewer, and some of them twice
    for exclude in (None, some, fewer, some[:, :0], torch.arange(V).expand(ROWS, V)):
        for allowed in (None, mask, mask.nonzero()[:, 0], few):
            as_mask = allowed if allowed is None or allowed.dtype == torch.bool else mask
            values, indices = expected_topk(log_prob, 5, exclude, as_mask)
            for rows in (slice(None), slice(0, 1)):
                own = None if exclude is None else exclude[rows]
                answer = layer.topk(hidden[rows], 5, exclude=own, allowed=allowed)
                assert torch.equal(answer.indices, indices[rows])
                assert answer.certified.all()
                there = indices[rows] >= 0
                assert torch.equal(answer.log_prob == -torch.inf, ~there)
                error = loose.log_normalizer_error(hidden[rows])[:, None].expand_as(there)[there]
                off = (answer.log_prob - values[rows])[there].abs()
                assert (off <= error + 1e-4).all()


@both_ways
@pytest.mark.parametrize("preview", [PREVIEWS["int8"], PREVIEWS["svd"]], ids=["int8", "svd"])
def test_certificates_are_for_the_classes_left(way, preview):
    weight, bias, hidden = head()
    layer = ScreenedSoftmax(weight, bias, preview=preview, candidates=20)
    exclude = excluded(hidden, weight, bias, 40)
    log_prob = nn.functional.linear(hidden, weight, bias).log_softmax(-1)
    answer = layer.topk(hidden, 5, exclude=exclude)
    right = (answer.indices == expected_topk(log_prob, 5, exclude)[1]).all(-1)
    assert right[answer.certified].all()
    assert answer.certified.any() or preview is not PREVIEWS["int8"]


@both_ways
@every_preview
@pytest.mark.parametrize("logit_map", [None, SoftCap(3.0)])
@pytest.mark.parametrize("barred", [False, True])
def test_scores_of_candidates(way, preview, logit_map, barred):
    weight, bias, hidden = head(barred)
    layer = ScreenedSoftmax(weight, bias, preview=preview, candidates=V // 8, logit_map=logit_map)
    logits = nn.functional.linear(hidden, weight, bias)
    if logit_map is not None:
        logits = logit_map(logits).masked_fill(logits == -torch.inf, -torch.inf)
    ids = torch.randint(V, (ROWS, 9), generator=torch.Generator().manual_seed(4))
    true, found = logits.log_softmax(-1).gather(-1, ids), layer.score(hidden, ids)
    assert torch.equal(found == -torch.inf, true == -torch.inf)
    there = true > -torch.inf
    error = layer.log_normalizer_error(hidden)[:, None].expand_as(true)[there]
    assert ((found - true)[there].abs() <= error + 1e-4).all()
    ids[1, 3] = -100
    assert layer.score(hidden, ids)[1, 3] == 0
    torch.testing.assert_close(layer.score(hidden[0], ids[0].int()), layer.score(hidden, ids)[0])


def test_the_gradient_of_scores_is_the_full_layers():
    weight, bias, hidden = (part.double() for part in head())
    layer = ScreenedSoftmax(weight, bias, preview=PREVIEWS["int8"], candidates=V)
    ids, leaf = torch.arange(ROWS * 3).view(ROWS, 3), hidden.requires_grad_()
    assert torch.autograd.gradcheck(lambda h: layer.score(h, ids), (leaf,))


@both_ways
@every_preview
@pytest.mark.parametrize("logit_map", [None, SoftCap(3.0)])
def test_barred_classes_have_no_probability(way, preview, logit_map):
    """Also zero rows, which would win where all real logits are negative."""
    weight, bias, hidden = head(barred=True)
    weight[::3] = 0
    bias -= 100
    layer = ScreenedSoftmax(weight, bias, preview=preview, candidates=20, exact=True, logit_map=logit_map)
    answer = layer.topk(hidden, 5)
    assert (answer.indices % 3 != 0).all()
    assert answer.certified.all()
    log_prob = layer.log_prob(hidden)
    assert (log_prob[:, ::3] == -torch.inf).all()
    torch.testing.assert_close(log_prob.exp().sum(-1), torch.ones(ROWS))
    assert (layer.sample(hidden, 50) % 3 != 0).all()
    assert not layer.log_normalizer_error(hidden).isnan().any()


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_bias_that_is_not_finite(bad):
    weight, bias, _ = head()
    bias[5] = bad
    with pytest.raises(ValueError, match="bias must be finite, or -inf to bar a class"):
        ScreenedSoftmax(weight, bias, preview=PREVIEWS["int8"], candidates=20)
    with pytest.raises(ValueError, match="bias must leave at least one class"):
        ScreenedSoftmax(weight, torch.full((V,), -torch.inf), preview=PREVIEWS["int8"], candidates=20)


@pytest.mark.parametrize("logit_map", [None, Sigsoftmax])
@pytest.mark.parametrize("preview", [PREVIEWS["int8"], PREVIEWS["svd"]], ids=["int8", "svd"])
def test_mixtures(logit_map, preview):
    torch.manual_seed(0)
    layer = MixtureOfSoftmaxes(D, V, 3, logit_map=None if logit_map is None else logit_map())
    with torch.no_grad():
        layer.weight.mul_(8)
        layer.bias[::5] = -torch.inf
    hidden = normal(ROWS, D, seed=2)
    screen = ScreenedSoftmax.from_layer(layer, preview=preview, candidates=30, exact=True)
    log_prob = layer.log_prob(hidden).detach()
    exclude = log_prob.topk(20).indices
    mask = torch.arange(V) % 2 == 0
    for given, allowed in ((None, mask), (exclude, None), (exclude, mask)):
        values, indices = expected_topk(log_prob, 4, given, allowed)
        answer = screen.topk(hidden, 4, exclude=given, allowed=allowed)
        assert torch.equal(answer.indices, indices)
        assert answer.certified.all()
        torch.testing.assert_close(answer.log_prob, values, rtol=0, atol=0.1)
    ids = exclude[:, :5]
    error = screen.log_normalizer_error(hidden)[:, None]
    assert ((screen.score(hidden, ids) - log_prob.gather(-1, ids)).abs() <= error + 1e-4).all()


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (
            IndexError,
            "exclude must be class ids from 0 to 699",
            lambda s, h: s.topk(h, 1, exclude=torch.full((6, 1), V)),
        ),
        (
            ValueError,
            "exclude must have hidden's leading shape",
            lambda s, h: s.topk(h, 1, exclude=torch.zeros(5, 1).long()),
        ),
        (TypeError, "exclude must be", lambda s, h: s.topk(h, 1, exclude=torch.zeros(6, 1))),
        (IndexError, "allowed must be class ids", lambda s, h: s.topk(h, 1, allowed=torch.tensor([-1]))),
        (ValueError, "allowed must permit", lambda s, h: s.topk(h, 1, allowed=torch.zeros(V, dtype=torch.bool))),
        (IndexError, "ids must be class ids", lambda s, h: s.score(h, torch.full((6, 1), V))),
        (ValueError, "ids must have", lambda s, h: s.score(h, torch.zeros(6).long())),
    ],
)
def test_bad_input(error, message, call):
    weight, bias, hidden = head()
    layer = ScreenedSoftmax(weight, bias, preview=PREVIEWS["int8"], candidates=20)
    with pytest.raises(error, match=message):
        call(layer, hidden)
