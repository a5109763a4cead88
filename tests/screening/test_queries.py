"""Queries of one row, the most frequent kind: other memory layouts, changed layers, threads."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from lastlayer import FullSoftmax, Int4Preview, Int8Preview, ScreenedSoftmax, SVDPreview

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


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(
    "preview", [Int8Preview(), Int4Preview(), SVDPreview(D), SVDPreview(D, storage="int8")], ids=repr
)
def test_a_row_is_answered_as_by_the_full_layer(preview, hidden):
    layer = linear()
    screen = screened(layer, preview)
    for row in hidden.split(1):
        values, indices = layer(row).log_softmax(-1).topk(5)
        answer = screen.topk(row, 5)
        assert torch.equal(answer.indices, indices)
        assert answer.certified.tolist() == [True]
        torch.testing.assert_close(answer.log_prob, values, rtol=0, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_layout_of_a_hidden_state(dtype, hidden):
    layer, hidden = linear(dtype), hidden.to(dtype)
    screen = screened(layer)
    expected = screen.topk(hidden[:1], 5)
    column = hidden.T.contiguous()[:, :1].T  # (1, d), but d numbers apart
    negated = torch.complex(torch.zeros_like(hidden), -hidden).conj().imag if dtype != torch.bfloat16 else hidden
    assert negated.is_neg() == (dtype != torch.bfloat16)
    for row in (hidden[0], hidden[:1][None], column, nn.Parameter(hidden[:1].clone()), negated[:1]):
        assert torch.equal(screen.topk(row, 5).indices.flatten(), expected.indices[0])
        torch.testing.assert_close(screen(row).flatten(), screen(hidden[0]))
    with pytest.raises(TypeError, match="dtype"):
        screen.topk(hidden[:1].half(), 5)
    with pytest.raises(ValueError, match="in_features"):
        screen.topk(hidden[:1, :-1], 5)


@pytest.mark.parametrize("layout", ["transposed", "negated", "every other row"])
def test_any_layout_of_a_weight(layout, hidden):
    weight = linear().weight.detach()
    other = {
        "transposed": weight.T.contiguous().T,
        "negated": torch.complex(weight, -weight).conj().imag,
        "every other row": weight.repeat_interleave(2, 0)[::2],
    }[layout]
    for preview in (Int8Preview(), Int4Preview(), SVDPreview(4)):
        screen = ScreenedSoftmax(other, preview=preview, candidates=20, exact=True)
        assert torch.equal(screen.topk(hidden, 3).indices, (hidden @ weight.T).topk(3).indices)


@pytest.mark.parametrize("change", ["weight", "bias", "another weight", "moved"])
def test_a_changed_layer_is_noticed(change, hidden):
    layer = linear()
    screen = screened(layer)
    screen.topk(hidden[:1], 5)
    with torch.no_grad():
        if change == "another weight":
            screen.weight = nn.Parameter(layer.weight * 2)
            layer.weight = screen.weight
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


@pytest.mark.parametrize("which", ["weight", "bias"])
@pytest.mark.parametrize("kind", [nn.Linear, FullSoftmax])
def test_a_parameter_replaced_in_the_layer_is_noticed(kind, which, hidden):
    """The screen holds the old one, which nothing changed."""
    torch.manual_seed(0)
    layer = kind(D, V)
    make = ScreenedSoftmax.from_linear if kind is nn.Linear else ScreenedSoftmax.from_layer
    screen = make(layer, preview=Int8Preview(), candidates=20, exact=True)
    screen.topk(hidden, 3)
    setattr(layer, which, nn.Parameter(torch.randn_like(getattr(layer, which))))
    with pytest.raises(RuntimeError, match=r"replaced .* refresh\(\)"):
        screen.topk(hidden, 3)
    screen.refresh()
    assert screen.weight is layer.weight
    logits = nn.functional.linear(hidden, layer.weight, layer.bias)
    assert torch.equal(screen.topk(hidden, 3).indices, logits.topk(3).indices)


def test_a_parameter_replaced_by_one_of_another_length(hidden):
    layer = nn.Linear(D, V, bias=False)
    screen = ScreenedSoftmax.from_linear(layer, preview=Int8Preview(), candidates=20, exact=True)
    layer.weight = nn.Parameter(torch.randn(2 * V, D))
    with pytest.raises(RuntimeError, match="refresh"):
        screen.topk(hidden, 3)
    screen.refresh()
    assert screen.out_features == 2 * V
    assert torch.equal(screen.topk(hidden, 3).indices, layer(hidden).topk(3).indices)


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


def test_eight_threads_answer_as_one(hidden):
    """Neither the next query nor another thread writes into an answer that was returned."""
    for preview in (Int8Preview(), Int4Preview(), SVDPreview(6)):
        screen = screened(linear(), preview)
        first = screen.topk(hidden[:1], 5)
        before = [part.clone() for part in first]
        expected = [screen.topk(row, 5) for row in hidden.split(1)]
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, before, strict=True))
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda row, screen=screen: screen.topk(row, 5), hidden.split(1) * 20))
        for answer, theirs in zip(found, expected * 20, strict=True):
            assert all(torch.equal(mine, part) for mine, part in zip(answer, theirs, strict=True))
