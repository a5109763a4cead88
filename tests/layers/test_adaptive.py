"""What is specific to `AdaptiveSoftmax`: PyTorch's weights, permuted classes, untouched clusters, cut-offs."""

import pytest
import torch
from torch import nn

from lastlayer import AdaptiveSoftmax

COUNTS = 1000.0 / torch.arange(1, 31)
SHUFFLE = torch.randperm(30, generator=torch.Generator().manual_seed(4))


def batch(rows=40, in_features=8, num_classes=30):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, in_features, generator=generator, dtype=torch.float64)
    return hidden, torch.randint(num_classes, (rows,), generator=generator)


def make(cutoffs=(5, 12), **options):
    torch.manual_seed(0)
    return AdaptiveSoftmax(8, 30, cutoffs, dtype=torch.float64, div_value=2.0, **options)


def theirs(cutoffs=(5, 12), **options):
    return nn.AdaptiveLogSoftmaxWithLoss(8, 30, list(cutoffs), div_value=2.0, dtype=torch.float64, **options)


@pytest.mark.parametrize("cutoffs", [(1,), (29,), (5, 12), (3, 4, 20)])
@pytest.mark.parametrize("head_bias", [False, True])
def test_equals_pytorch_with_its_weights_both_ways(cutoffs, head_bias):
    """Law A1."""
    hidden, targets = batch()
    reference = theirs(cutoffs, head_bias=head_bias)
    layer = make(cutoffs, head_bias=head_bias)
    layer.load_state_dict(reference.state_dict())
    back = theirs(cutoffs, head_bias=head_bias)
    back.load_state_dict(layer.state_dict())
    for module, loss in ((layer, layer(hidden, targets)), (reference, reference(hidden, targets).loss)):
        module.zero_grad()
        loss.backward()
    for one, other in ((layer(hidden, targets), reference(hidden, targets).loss),
                       (layer.log_prob(hidden), reference.log_prob(hidden)),
                       (back.log_prob(hidden), reference.log_prob(hidden))):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert torch.equal(layer.topk(hidden, 1).indices[:, 0], reference.predict(hidden))
    for p, q in zip(layer.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tied", [False, True])
def test_classes_in_any_order_are_a_relabelling(tied):
    """Class y of the shuffled layer is the class of its rank in the sorted one."""
    counts = COUNTS[SHUFFLE]
    rank = counts.argsort(descending=True).argsort()
    rows = torch.randn(30, 8, dtype=torch.float64)
    plain = make(weight=nn.Parameter(rows) if tied else None)
    shuffled = make(counts=counts, weight=nn.Parameter(rows[rank]) if tied else None)
    shuffled.load_state_dict({k: v for k, v in plain.state_dict().items() if k != "weight"}, strict=not tied)
    hidden, targets = batch()
    torch.testing.assert_close(shuffled.log_prob(hidden), plain.log_prob(hidden)[:, rank])
    torch.testing.assert_close(shuffled(hidden, targets), plain(hidden, rank[targets]))


def test_state_dict_carries_the_order():
    layer, other = make(counts=COUNTS[SHUFFLE]), make(counts=COUNTS)
    other.load_state_dict(layer.state_dict())
    hidden, _ = batch()
    assert torch.equal(other.log_prob(hidden), layer.log_prob(hidden))


def test_untouched_cluster_gets_no_gradient():
    layer = make()
    hidden, _ = batch(3)
    layer(hidden, torch.tensor([0, 20, 4])).backward()
    assert all(p.grad is None for p in layer.tail[0].parameters())
    assert all(p.grad is not None for p in layer.tail[1].parameters())
    touched = [p.grad is not None for p in layer.head.parameters()]
    assert all(touched)


def test_tied_head_learns_the_embedding():
    embedding = nn.Embedding(30, 8, dtype=torch.float64)
    layer = make(weight=embedding.weight)
    assert layer.weight is embedding.weight
    hidden, _ = batch(4)
    layer(hidden, torch.tensor([0, 4, 5, 29])).backward()
    rows = embedding.weight.grad.abs().sum(1) > 0
    assert rows.tolist() == [True] * 5 + [False] * 25


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_compiles_into_one_graph(reduction):
    layer = make(reduction=reduction, counts=COUNTS[SHUFFLE])
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    hidden, targets = batch()
    targets[::5] = layer.ignore_index
    answers = []
    for call in (layer, compiled):
        layer.zero_grad()
        loss = call(hidden, targets)
        loss.sum().backward()
        answers.append((loss.detach(), [p.grad.clone() for p in layer.parameters()]))
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-12, atol=1e-12)


def test_float32_memory_of_a_step_holds_no_logits_of_all_rows():
    """A tail with many classes goes in chunks: its logits for all rows are never there at once."""
    layer = AdaptiveSoftmax(16, 200_000, [100, 1000])
    largest = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: largest.append(t.numel()) or t, lambda t: t):
        layer(torch.randn(600, 16, requires_grad=True), torch.randint(1000, 200_000, (600,)))
    assert max(largest) <= 200_000 * 16


class TestCutoffs:
    def test_are_the_best_of_all_by_exhaustion(self):
        counts = COUNTS[SHUFFLE]
        p = (COUNTS / COUNTS.sum()).double()
        fixed, rate = 2e-5, 1e-9 * 64

        def cost(a, b):
            tails = ((a, b, 32), (b, 30, 8))
            inner = sum(fixed + rate * float(p[s:e].sum()) * w * (128 + e - s) for s, e, w in tails)
            return fixed + rate * 128 * (a + 2) + inner

        best = min(((a, b) for a in range(1, 29) for b in range(a + 1, 30)), key=lambda cut: cost(*cut))
        found = AdaptiveSoftmax.cutoffs_for(counts, 2, in_features=128, batch_size=64, costs=(fixed, 1e-9))
        assert tuple(found) == best

    @pytest.mark.parametrize("num_clusters", [1, 2, 3, 4])
    def test_are_valid_with_constants_measured_here(self, num_clusters):
        counts = 1e7 / torch.arange(1, 50_001)
        cutoffs = AdaptiveSoftmax.cutoffs_for(counts, num_clusters, in_features=256)
        assert len(cutoffs) == num_clusters
        AdaptiveSoftmax(256, 50_000, cutoffs)
        assert cutoffs[0] < 20_000, "the head holds the frequent classes only"

    @pytest.mark.parametrize("counts", [torch.zeros(50), torch.ones(50), torch.arange(50) % 2])
    def test_of_counts_that_tell_little(self, counts):
        cutoffs = AdaptiveSoftmax.cutoffs_for(counts, 2, in_features=16, costs=(1e-5, 1e-10))
        AdaptiveSoftmax(16, 50, cutoffs, counts=counts)

    @pytest.mark.parametrize("counts", [torch.tensor([3, -1, 2]), torch.tensor([1.0, torch.inf, 2.0])])
    def test_of_counts_that_are_none(self, counts):
        with pytest.raises(ValueError, match=r"counts\[1\]"):
            AdaptiveSoftmax.cutoffs_for(counts, 1)

    @pytest.mark.parametrize("seen", [0, 1, 20, 1000])
    def test_zero_counts_bound_the_cost(self, seen):
        """Classes that never occurred weigh as the rarest that did: they are not put into the head for nothing."""
        counts = (1e4 / torch.arange(1, 3001)).floor()
        counts[seen:] = 0
        cutoffs = AdaptiveSoftmax.cutoffs_for(counts, 2, in_features=64, costs=(1e-5, 1e-10))
        expected = counts.clamp(min=float(counts[seen - 1])) if seen else torch.ones(3000)
        assert cutoffs == AdaptiveSoftmax.cutoffs_for(expected, 2, in_features=64, costs=(1e-5, 1e-10))
        AdaptiveSoftmax(64, 3000, cutoffs, counts=counts)

    @pytest.mark.parametrize("V", [2, 3, 20, 1000, 100_000])
    def test_by_default_are_those_of_zipf(self, V):
        layer = AdaptiveSoftmax(16, V)
        assert layer.cutoffs == sorted({max(1, V // 20), max(1, V // 4)})
        shuffle = torch.randperm(V, generator=torch.Generator().manual_seed(0))
        of_counts = AdaptiveSoftmax(16, V, counts=(1.0 / torch.arange(1, V + 1, dtype=torch.float64))[shuffle])
        assert of_counts.cutoffs == layer.cutoffs
        assert AdaptiveSoftmax(8, V).cutoffs == [max(1, V // 20)], "no width for a second tail"

    @pytest.mark.parametrize("counts", [torch.ones(4000), torch.zeros(4000), torch.arange(4000) == 7])
    def test_by_default_the_head_is_bounded(self, counts):
        layer = AdaptiveSoftmax(16, 4000, counts=counts.long())
        assert layer.cutoffs[0] <= 1000
        assert layer.cutoffs[-1] <= 2000

    def test_follow_counts_by_default(self):
        """Of classes that a tenth of all ever were, the head takes fewer than of classes by Zipf's law."""
        counts = 1e6 / torch.arange(1, 10_001)
        counts[1000:] = 0
        layer = AdaptiveSoftmax(16, 10_000, counts=counts)
        assert 50 < layer.cutoffs[0] < 500
        assert layer.cutoffs[1] < 1000

    def test_one_class_has_no_tail(self):
        with pytest.raises(ValueError, match="num_classes"):
            AdaptiveSoftmax(16, 1)

    def test_more_expensive_calls_do_not_split_further_for_nothing(self):
        flat = AdaptiveSoftmax.cutoffs_for(torch.ones(100), 1, in_features=4, costs=(1.0, 1e-12))
        assert 1 <= flat[0] < 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cutoffs": []}, "cutoffs"),
        ({"cutoffs": [9, 4]}, "cutoffs"),
        ({"cutoffs": [4, 4]}, "cutoffs"),
        ({"cutoffs": [0, 4]}, "cutoffs"),
        ({"cutoffs": [4, 30]}, "cutoffs"),
        ({"cutoffs": [4, 99]}, "cutoffs"),
        ({"cutoffs": [-1, 4]}, "cutoffs"),
        ({"cutoffs": [2, 4, 6, 8]}, "no width for tail 4"),
        ({"cutoffs": [4], "counts": torch.ones(29)}, "counts"),
        ({"cutoffs": [4], "counts": -torch.ones(30)}, "counts"),
        ({"cutoffs": [4], "weight": nn.Parameter(torch.ones(30, 7))}, "weight"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_wrong_kinds_are_named():
    with pytest.raises(TypeError, match="cutoffs"):
        make([1.5])
    with pytest.raises(TypeError, match="weight"):
        make([4], weight=torch.ones(30, 8))
    with pytest.raises(ValueError, match="div_value"):
        AdaptiveSoftmax(8, 30, [4], div_value=0.0)
    with pytest.raises(ValueError, match="num_clusters"):
        AdaptiveSoftmax.cutoffs_for(torch.ones(5), 5)


@pytest.mark.parametrize("counts", [torch.zeros(30), torch.ones(30)])
def test_equal_counts_leave_the_ids_as_ranks(counts):
    assert torch.equal(make([4, 9], counts=counts).order, torch.arange(30))
