"""`linear_statistics` against `log_softmax` of all the logits: values and gradients."""

import importlib

import pytest
import torch

from lastlayer import PLIF, SoftCap
from lastlayer.functional import ReferenceHead, linear_chunks, linear_statistics
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


def other_head():
    """A reference of another width, with a bias of its own."""
    generator = torch.Generator().manual_seed(4)
    shapes = (7, 6), (13, 6), (13,)
    return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)


def with_reference(hidden, weight, bias, targets, *, logit_map, temperature, ids, reference, reference_map=None):
    """The results that a reference, ids and a temperature add, by PyTorch's own operations."""

    def log_prob(hidden, weight, bias, logit_map):
        logits = hidden @ weight.T + bias
        return ((logits if logit_map is None else logit_map(logits)) / temperature).log_softmax(-1)

    own, other = log_prob(hidden, weight, bias, logit_map), log_prob(*reference, reference_map)
    kl = torch.nn.functional.kl_div(other, own, log_target=True, reduction="none").sum(-1)
    entropy = -(own.exp() * own).sum(-1)
    carrying = own.gather(1, targets[:, None])[:, 0], entropy, own.gather(1, ids), kl
    return carrying, (other.gather(1, targets[:, None])[:, 0], other.gather(1, ids))


def parts_of(result):
    carrying = result.target_log_prob, result.entropy, result.ids_log_prob, result.kl
    return carrying, (result.reference_target_log_prob, result.reference_ids_log_prob)


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


@pytest.mark.parametrize(
    ("logit_map", "reference_map"),
    [(None, None), (SoftCap(1.5), SoftCap(2.0)), (PLIF(7, 2.0, init_std=1.0).double(), None)],
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_candidates_temperature_and_reference(logit_map, reference_map, temperature):
    hidden, weight, bias, targets = leaves()
    ids = torch.randint(13, (7, 3), generator=torch.Generator().manual_seed(5))
    options = {"logit_map": logit_map, "temperature": temperature, "ids": ids}
    theirs, fixed = with_reference(
        hidden, weight, bias, targets, **options, reference=other_head(), reference_map=reference_map
    )
    reference = ReferenceHead(*other_head(), reference_map)
    ours, also = parts_of(linear_statistics(hidden, weight, targets, bias=bias, **options, reference=reference))
    torch.testing.assert_close((*ours, *also), (*theirs, *fixed), rtol=1e-12, atol=1e-12)
    assert not any(part.requires_grad for part in also)
    inputs = hidden, weight, bias, *(() if logit_map is None else logit_map.parameters())
    generator = torch.Generator().manual_seed(3)
    upstream = [torch.randn(part.shape, generator=generator, dtype=torch.float64) for part in ours]
    for used in (slice(0, 4), *(slice(i, i + 1) for i in range(4))):  # all together, and each alone
        gradients = [
            torch.autograd.grad(parts[used], inputs, upstream[used], retain_graph=True) for parts in (ours, theirs)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


def test_second_derivatives_and_transforms_with_a_reference():
    hidden, weight, bias, targets = leaves()
    ids = torch.randint(13, (7, 2), generator=torch.Generator().manual_seed(5))

    def ours(hidden, weight, bias):
        options = {"ids": ids, "temperature": 0.8, "reference": other_head()}
        return parts_of(linear_statistics(hidden, weight, targets, bias=bias, **options))[0]

    def total(hidden):
        return sum(part.square().sum() for part in ours(hidden, weight.detach(), bias.detach()))

    assert torch.autograd.gradgradcheck(ours, (hidden, weight, bias))
    (slope,) = torch.autograd.grad(total(hidden), hidden)
    torch.testing.assert_close(torch.func.grad(total)(hidden.detach()), slope)

    _, *fixed = other_head()

    def one(hidden, target, other_hidden):
        reference = (other_hidden, *fixed)
        return linear_statistics(hidden, weight.detach(), target, bias=bias.detach(), reference=reference).kl

    kl = linear_statistics(hidden, weight, targets, bias=bias, reference=other_head()).kl
    torch.testing.assert_close(torch.func.vmap(one)(hidden.detach(), targets, other_head()[0]), kl)


def test_ignored_targets_and_padded_candidates():
    hidden, weight, bias, targets = leaves()
    ids = torch.randint(13, (7, 3), generator=torch.Generator().manual_seed(5))
    options = {"bias": bias, "reference": other_head()}
    expected = linear_statistics(hidden, weight, targets, ids=ids, **options)
    absent = torch.tensor([False, True, False, False, True, False, False])
    padded = torch.zeros(7, 3, dtype=torch.bool)
    padded[0, 1] = padded[3] = True
    result = linear_statistics(
        hidden, weight, targets.masked_fill(absent, -100), ids=ids.int().masked_fill(padded, -100), **options
    )
    for ours, theirs in zip(sum(parts_of(result), ()), sum(parts_of(expected), ()), strict=True):
        if ours.dim() == 2:
            theirs = theirs.masked_fill(padded, 0)
        torch.testing.assert_close(ours, theirs * ~absent.view(-1, *(1,) * (theirs.dim() - 1)))


@pytest.mark.parametrize("count", [0, 2])
def test_candidates_without_targets_in_any_shape(count):
    hidden, weight, _, _ = leaves()
    ids = torch.randint(13, (1, 7, count), generator=torch.Generator().manual_seed(5))
    other_hidden, other_weight, _ = other_head()
    reference = (other_hidden.reshape(1, 7, 6), other_weight)
    result = linear_statistics(hidden.reshape(1, 7, 4), weight, ids=ids, reference=reference)
    assert result.target_log_prob is None
    assert result.reference_target_log_prob is None
    expected = (hidden @ weight.T).log_softmax(1).gather(1, ids[0])
    torch.testing.assert_close(result.ids_log_prob, expected[None])
    assert result.reference_ids_log_prob.shape == (1, 7, count)
    assert result.kl.shape == (1, 7)


def test_classes_that_a_bias_bars():
    """Barred by both: no part of the divergence. By the reference alone: the divergence is infinite."""
    hidden, weight, bias, _ = leaves()
    other = other_head()
    bias, other[2][3] = bias.detach().clone(), -torch.inf
    infinite = linear_statistics(hidden, weight, bias=bias, reference=other).kl
    assert bool((infinite == torch.inf).all())
    bias[3] = -torch.inf
    bias.requires_grad_()
    kl = linear_statistics(hidden, weight, bias=bias, reference=other).kl
    keep = [c for c in range(13) if c != 3]
    few = tuple(part if part is other[0] else part[keep] for part in other)
    expected = linear_statistics(hidden, weight[keep], bias=bias[keep], reference=few).kl
    torch.testing.assert_close(kl, expected)
    slopes = [torch.autograd.grad(part.sum(), (hidden, weight), retain_graph=True) for part in (kl, expected)]
    torch.testing.assert_close(*slopes)


def test_the_divergence_from_itself_is_zero_and_flat():
    hidden, weight, bias, _ = leaves()
    kl = linear_statistics(hidden, weight, bias=bias, reference=(hidden, weight, bias)).kl
    torch.testing.assert_close(kl, torch.zeros_like(kl), rtol=0, atol=1e-14)
    for slope in torch.autograd.grad(kl.sum(), (hidden, weight, bias)):
        torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-13)


def test_autocast():
    """Products in bfloat16, the reference's too; results in float32."""
    hidden, weight, bias, targets = (
        part.detach().float() if part.is_floating_point() else part for part in leaves()
    )
    other = tuple(part.float() for part in other_head())
    exact = linear_statistics(hidden, weight, targets, bias=bias, reference=other)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = linear_statistics(hidden, weight, targets, bias=bias, reference=other)
    for ours, theirs in zip(sum(parts_of(result), ()), sum(parts_of(exact), ()), strict=True):
        if ours is not None:
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be positive"),
        ({"ids": torch.zeros(7, dtype=torch.int64)}, ValueError, "ids must have hidden's leading shape"),
        ({"ids": torch.full((7, 1), 13)}, IndexError, "ids must be class ids from 0 to 12"),
        ({"ids": torch.zeros(7, 1)}, TypeError, "ids must be class ids of an integer dtype"),
        ({"reference": torch.zeros(7, 4)}, TypeError, "reference must be a tuple"),
        ({"reference": (torch.zeros(7, 4),)}, TypeError, "reference must be a tuple .* got 1 values"),
        ({"reference": (torch.zeros(7, 4), torch.zeros(12, 4))}, ValueError, "reference must have the rows"),
        ({"reference": (torch.zeros(6, 4), torch.zeros(13, 4))}, ValueError, "reference must have the rows"),
        ({"reference": (torch.zeros(7, 4), torch.zeros(13, 5))}, ValueError, "reference: hidden must have shape"),
        ({"reference": (torch.zeros(7, 4), torch.zeros(13, 4), None, abs)}, TypeError, "reference: logit_map"),
    ],
)
def test_refusals_of_options(options, error, message):
    hidden, weight, _, targets = leaves()
    with pytest.raises(error, match=message):
        linear_statistics(hidden, weight, targets, **options)
