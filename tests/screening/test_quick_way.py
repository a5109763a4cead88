"""One float32 row, the most frequent query, goes straight to a bound kernel: as careful as the long way."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from lastlayer import Int4Preview, Int8Preview, ScreenedSoftmax, SoftCap, SVDPreview
from lastlayer.screening.summary import kernels

pytestmark = pytest.mark.skipif(kernels() is None, reason="numba does not serve here")
V, D = 1500, 24


def linear(dtype=torch.float32):
    torch.manual_seed(5)
    return nn.Linear(D, V, dtype=dtype)


def screened(layer, preview=None, **settings):
    with torch.no_grad():
        return ScreenedSoftmax.from_linear(
            layer, preview=preview or Int8Preview(), candidates=20, **{"exact": True, **settings}
        )


@pytest.fixture
def hidden():
    return torch.randn(40, D, generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize(
    "preview", [Int8Preview(), Int4Preview(), SVDPreview(D), SVDPreview(D, storage="int8")], ids=repr
)
def test_it_is_taken_and_says_what_the_full_layer_says(preview, hidden):
    layer = linear()
    screen = screened(layer, preview)
    assert screen._quick_way(hidden[:1]) is None  # the kernels are made by the first query
    screen.topk(hidden[:2], 5)
    for row in hidden.split(1):
        assert screen._quick_way(row) is not None
        values, indices = layer(row).log_softmax(-1).topk(5)
        answer = screen.topk(row, 5)
        assert torch.equal(answer.indices, indices)
        assert answer.certified.tolist() == [True]
        torch.testing.assert_close(answer.log_prob, values, rtol=0, atol=1e-2)


def test_what_is_not_an_ordinary_row_goes_the_long_way(hidden):
    layer = linear()
    screen = screened(layer)
    expected = screen.topk(hidden[:1], 5)
    column = hidden.T.contiguous()[:, :1].T  # (1, d), but d numbers apart
    rows = [hidden[0], hidden[:1][None], column, nn.Parameter(hidden[:1].clone())]
    for row in rows:
        assert screen._quick_way(row) is None
        assert torch.equal(screen.topk(row, 5).indices.flatten(), expected.indices[0])
    assert torch.equal(screen.topk(hidden[:1].clone().requires_grad_(), 5).indices, expected.indices)
    with pytest.raises(TypeError, match="dtype"):
        screen.topk(hidden[:1].double(), 5)
    with pytest.raises(ValueError, match="in_features"):
        screen.topk(hidden[:1, :-1], 5)


def test_a_logit_map_and_other_dtypes_go_the_long_way(hidden):
    mapped = screened(linear(), logit_map=SoftCap(2.0))
    mapped.topk(hidden[:1], 5)
    assert mapped._quick_way(hidden[:1]) is None
    half = screened(linear(torch.bfloat16))
    half.topk(hidden[:1].bfloat16(), 5)
    assert half._quick_way(hidden[:1]) is None
    with pytest.raises(TypeError, match="dtype"):
        half.topk(hidden[:1], 5)


@pytest.mark.parametrize("change", ["weight", "bias", "another weight", "moved"])
def test_a_changed_layer_is_noticed(change, hidden):
    layer = linear()
    screen = screened(layer)
    screen.topk(hidden[:1], 5)
    with torch.no_grad():
        if change == "another weight":
            screen.weight = nn.Parameter(layer.weight * 2)
        elif change == "moved":
            screen.double()
            screen.float()
        else:
            getattr(layer, change).mul_(2)
    with pytest.raises(RuntimeError, match="refresh"):
        screen.topk(hidden[:1], 5)
    screen.refresh()
    logits = nn.functional.linear(hidden[:1], screen.weight, screen.bias)
    assert torch.equal(screen.topk(hidden[:1], 5).indices, logits.topk(5).indices)


@pytest.mark.parametrize("candidates", [3, 400, V])
def test_candidates_may_change_between_queries(candidates, hidden):
    layer = linear()
    screen = screened(layer, SVDPreview(4), exact=False)
    screen.topk(hidden[:1], 3)
    screen.candidates = candidates
    answer = screen.topk(hidden[:1], min(candidates, 50))
    fresh = ScreenedSoftmax.from_linear(layer, preview=SVDPreview(4), candidates=candidates)
    expected = fresh.topk(hidden[:1], min(candidates, 50))
    assert torch.equal(answer.indices, expected.indices)
    assert torch.equal(answer.log_prob, expected.log_prob)


def test_hidden_states_that_the_kernels_do_not_take(hidden):
    screen = screened(linear())
    screen.topk(hidden[:1], 5)
    for bad in (float("nan"), float("inf"), 1e38):
        row = hidden[:1].clone()
        row[0, 3] = bad
        assert screen._quick_way(row) is not None
        assert torch.equal(screen.topk(row, 5).certified, screen.topk(row.repeat(2, 1), 5).certified[:1])
    assert screen.topk(hidden[:1], 5).certified


def test_answers_are_nobody_elses(hidden):
    """Neither the next query nor another thread writes into an answer that was given."""
    screen = screened(linear())
    first = screen.topk(hidden[:1], 5)
    before = [part.clone() for part in first]
    expected = [screen.topk(row, 5) for row in hidden.split(1)]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, before, strict=True))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda row: screen.topk(row, 5), hidden.split(1) * 20))
    for answer, theirs in zip(found, expected * 20, strict=True):
        assert all(torch.equal(mine, part) for mine, part in zip(answer, theirs, strict=True))
