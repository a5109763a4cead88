"""`linear_statistics` against `log_softmax` of all the logits: values and gradients."""

import importlib

import pytest
import torch

from lastlayer import SoftCap
from lastlayer.functional import linear_chunks, linear_statistics
from lastlayer.functional.selection import make_selection

module = importlib.import_module("lastlayer.functional.linear_statistics")  # the name is the function's too


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of a few rows, the last one not full."""
    monkeypatch.setattr(linear_chunks, "CHUNK_BYTES", 3 * 13 * 8)


def leaves():
    generator = torch.Generator().manual_seed(2)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((7, 4), (13, 4), (13,))
    )
    return hidden, weight, bias, torch.randint(13, (7,), generator=generator)


def reference(hidden, weight, targets, bias, logit_map, k):
    logits = hidden @ weight.T + bias
    mapped = logits if logit_map is None else logit_map(logits)
    log_prob = mapped.log_softmax(-1)
    indices = logits.topk(k).indices
    entropy = -(log_prob.exp() * log_prob).sum(-1)
    target = log_prob.gather(1, targets[:, None])[:, 0]
    return target, mapped.logsumexp(-1), entropy, log_prob.gather(1, indices), indices


@pytest.mark.parametrize("logit_map", [None, SoftCap(1.5)], ids=["plain", "soft-cap"])
def test_equals_log_softmax(logit_map):
    hidden, weight, bias, targets = leaves()
    answer = linear_statistics(hidden, weight, targets, bias=bias, logit_map=logit_map, k=4)
    ours = (answer.target_log_prob, answer.log_normalizer, answer.entropy, answer.topk.log_prob)
    *theirs, indices = reference(hidden, weight, targets, bias, logit_map, 4)
    assert torch.equal(answer.topk.indices, indices)
    torch.testing.assert_close(ours, tuple(theirs), rtol=1e-12, atol=1e-12)
    generator = torch.Generator().manual_seed(3)
    upstream = [torch.randn(part.shape, generator=generator, dtype=torch.float64) for part in ours]
    for used in (slice(0, 4), *(slice(i, i + 1) for i in range(4))):  # all together, and each alone
        gradients = [
            torch.autograd.grad(parts[used], (hidden, weight, bias), upstream[used], retain_graph=True)
            for parts in (ours, tuple(theirs))
        ]
        torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


def test_gradcheck():
    hidden, weight, bias, targets = leaves()

    def parts(*inputs):
        answer = linear_statistics(inputs[0], inputs[1], targets, bias=inputs[2], k=2)
        return answer.target_log_prob, answer.log_normalizer, answer.entropy, answer.topk.log_prob

    assert torch.autograd.gradcheck(parts, (hidden, weight, bias))


def test_only_what_is_asked():
    hidden, weight, bias, _ = leaves()
    answer = linear_statistics(hidden[:0], weight, bias=bias)
    assert answer.target_log_prob is None
    assert answer.topk is None
    assert answer.entropy.shape == (0,)
    answer = linear_statistics(hidden[0], weight, k=13)
    assert answer.entropy.shape == ()
    assert sorted(answer.topk.indices.tolist()) == list(range(13))


def test_certain_rows_have_no_entropy():
    """Probabilities that underflow add nothing to the entropy, and no nan to its gradient."""
    hidden, weight, _, _ = leaves()
    hidden = (1e4 * hidden.detach().float()).requires_grad_()
    entropy = linear_statistics(hidden, weight.detach().float()).entropy
    torch.testing.assert_close(entropy, torch.zeros(7))
    (slope,) = torch.autograd.grad(entropy.sum(), hidden)
    assert slope.isfinite().all()


@pytest.mark.parametrize("rows", [[], [0, 3], list(range(7))], ids=str)
@pytest.mark.parametrize("ignore_index", [-100, 5])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_ignored_targets(monkeypatch, rows, ignore_index, elsewhere):
    """Ignored rows answer 0, and -1 as indices; so they do where rows cannot be picked."""
    if elsewhere:
        monkeypatch.setattr(module, "eager_on_cpu", lambda _: False)
    hidden, weight, bias, targets = leaves()
    targets[targets == ignore_index] = 6
    kept = torch.ones(7, dtype=torch.bool)
    kept[rows] = False
    selection = make_selection(torch.arange(7)[:, None], None, hidden.shape[:1], 13, ignore_index, hidden.device)
    options = {"bias": bias, "k": 2, "selection": selection}
    expected = linear_statistics(hidden, weight, targets, **options)
    answer = linear_statistics(
        hidden, weight, targets.masked_fill(~kept, ignore_index), ignore_index=ignore_index, **options
    )
    upstream = torch.linspace(1, 2, 7, dtype=torch.float64)
    totals = []
    for ours, theirs in zip(
        (*answer[:3], answer.topk.log_prob), (*expected[:3], expected.topk.log_prob), strict=True
    ):
        mask, weights = (t.reshape(-1, *(1,) * (ours.dim() - 1)) for t in (kept, upstream))
        torch.testing.assert_close(ours, theirs * mask, rtol=1e-12, atol=1e-12)
        totals.append([(ours * weights).sum(), (theirs * mask * weights).sum()])
    assert torch.equal(answer.topk.indices, expected.topk.indices.masked_fill(~kept[:, None], -1))
    for total in totals:
        slopes = (torch.autograd.grad(part, (hidden, weight, bias), retain_graph=True) for part in total)
        torch.testing.assert_close(*slopes, rtol=1e-11, atol=1e-12)


def test_ignored_rows_of_any_shape():
    hidden, weight, _, targets = leaves()
    targets[3] = -100
    flat = linear_statistics(hidden, weight, targets, k=2)
    answer = linear_statistics(hidden.reshape(1, 7, 4), weight, targets.reshape(1, 7).int(), k=2)
    torch.testing.assert_close(answer.entropy[0], flat.entropy)
    torch.testing.assert_close(answer.topk.indices[0], flat.topk.indices)


def test_refusals():
    hidden, weight, _, targets = leaves()
    with pytest.raises(ValueError, match="k must be between 1 and 13"):
        linear_statistics(hidden, weight, k=14)
    with pytest.raises(IndexError, match="targets"):
        linear_statistics(hidden, weight, targets + 13)
