"""What is specific to `TreeSoftmax`: Huffman's tree, its lengths, other trees, paths computed in two ways."""

import math

import pytest
import torch

from lastlayer import TreeSoftmax
from lastlayer.functional.trees import Tree, huffman
from lastlayer.kernels import engine

ZIPF = 1e5 / torch.arange(1, 1001, dtype=torch.float64)


def make(counts, in_features=6, **options):
    layer = TreeSoftmax(in_features, len(counts), counts=counts, dtype=torch.float64, **options)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0)))
    return layer


def batch(num_classes, rows=50, in_features=6):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, in_features, generator=generator, dtype=torch.float64)
    return hidden, torch.randint(num_classes, (rows,), generator=generator)


def test_huffman_obeys_the_source_coding_theorem():
    """Law T1: the mean length lies between the entropy and one more, and it is that of the literature."""
    layer = TreeSoftmax(3, 1000, counts=ZIPF)
    p = ZIPF / ZIPF.sum()
    entropy = float(-(p * p.log2()).sum())
    length = float((p * layer.path_lengths).sum())
    assert entropy <= length < entropy + 1
    assert (entropy, length) == (pytest.approx(7.489, abs=1e-3), pytest.approx(7.515, abs=1e-3))
    assert int(layer.path_lengths.max()) == 13
    assert len(layer.weight) == 999
    assert math.fsum(2.0 ** -layer.path_lengths.double()) == 1


@pytest.mark.parametrize("counts", [torch.zeros(9), torch.ones(9), torch.tensor([7.0]), torch.tensor([0, 0, 1e9])])
def test_degenerate_counts_give_a_tree(counts):
    layer = make(counts)
    hidden, _ = batch(len(counts), 3)
    torch.testing.assert_close(layer.log_prob(hidden).exp().sum(-1), torch.ones(3, dtype=torch.float64))
    if len(counts) == 9:
        assert sorted(layer.path_lengths.tolist()) == [3] * 7 + [4] * 2


def test_fresh_layer_knows_the_counts():
    layer = TreeSoftmax(3, 1000, counts=ZIPF, dtype=torch.float64)
    log_prob = layer.log_prob(torch.randn(1, 3, dtype=torch.float64))[0]
    torch.testing.assert_close(log_prob, -layer.path_lengths * math.log(2.0), check_dtype=False)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_loops_agree_with_plain_operations(sparse, dtype, isa):
    answers = []
    for kind in (isa, None):
        layer = make(ZIPF, sparse=sparse).to(dtype)
        hidden, targets = batch(1000)
        hidden = hidden.to(dtype).requires_grad_()
        with engine.forced(kind):
            (layer.target_log_prob(hidden, targets) * torch.linspace(-1, 2, 50)).sum().backward()
            assert layer.weight.grad.is_sparse == sparse
            answers.append((layer.target_log_prob(hidden, targets), hidden.grad, layer.weight.grad.to_dense()))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(answers[0], answers[1], rtol=tolerance, atol=tolerance)


def test_threads_agree(isa):
    """A batch large enough to be shared."""
    layer, results = TreeSoftmax(300, 1000, counts=ZIPF), []
    with torch.no_grad():
        layer.weight.normal_(std=0.1)
    hidden, targets = torch.randn(300, 300), torch.randint(1000, (300,))
    for threads in (1, 3):
        leaf = hidden.clone().requires_grad_()
        layer.zero_grad()
        torch.set_num_threads(threads)
        try:
            log_prob = layer.target_log_prob(leaf, targets)
            log_prob.sum().backward()
        finally:
            torch.set_num_threads(1)
        results.append((log_prob.detach(), leaf.grad, layer.weight.grad.clone()))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.SparseAdam])
def test_sparse_optimizers_train_it(optimizer):
    layer = TreeSoftmax(12, 12, sparse=True)
    hidden, targets = torch.eye(12), torch.arange(12)
    stepper = optimizer(layer.sparse_parameters(), lr=0.5)
    for _ in range(200):
        stepper.zero_grad()
        layer(hidden, targets).backward()
        assert (layer.weight.grad._indices()[0].diff() > 0).all()
        stepper.step()
    assert torch.equal(layer.topk(hidden, 1).indices[:, 0], targets)


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_branch_and_bound_is_the_sort(scale):
    layer = make(ZIPF)
    hidden = scale * batch(1000)[0]
    log_prob = layer.log_prob(hidden)
    for k in (1, 7, 1000):
        answer = layer.topk(hidden, k)
        torch.testing.assert_close(answer.log_prob, log_prob.topk(k).values, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(log_prob.gather(1, answer.indices), answer.log_prob, rtol=1e-11, atol=1e-11)


def test_state_dict_carries_the_tree():
    layer, other = make(ZIPF[:50]), make(torch.ones(50))
    other.load_state_dict(layer.state_dict())
    hidden, targets = batch(50)
    assert torch.equal(other.log_prob(hidden), layer.log_prob(hidden))
    assert torch.equal(other(hidden, targets), layer(hidden, targets))


def test_a_state_dict_of_other_sizes_leaves_the_tree():
    layer = TreeSoftmax(8, 6)
    with pytest.raises(RuntimeError, match="size mismatch for nodes"):
        layer.load_state_dict(TreeSoftmax(8, 9).state_dict())
    assert torch.allclose(layer.log_prob(torch.zeros(1, 8)).exp().sum(), torch.ones(()))


def test_huffman_is_the_same_each_time():
    assert torch.equal(huffman(torch.ones(100)), huffman(torch.ones(100)))


@pytest.mark.parametrize(
    ("table", "error"),
    [
        ([[0, 1], [2, 4], [3, 3]], ValueError),  # twice
        ([[0, 1], [2, 9], [3, 4]], ValueError),  # no such node
        ([[0, 1], [2, -1], [3, 4]], ValueError),
        ([[0, 1], [2, 6], [3, 5]], ValueError),  # a ring beside the tree
        ([[0, 1, 2]], ValueError),
        ([[0.0, 1.0]], TypeError),
    ],
)
def test_what_is_no_tree_is_refused(table, error):
    with pytest.raises(error, match="tree"):
        Tree.of(torch.tensor(table))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TreeSoftmax(3, 2, counts=torch.tensor([1.0, -1.0])), r"counts\[1\]"),
        (lambda: TreeSoftmax(3, 1, counts=torch.tensor([])), "counts"),
        (lambda: TreeSoftmax(3, 6, counts=torch.ones(5)), "counts"),
        (lambda: TreeSoftmax(3, 5, tree=huffman(torch.ones(4))), "tree must have shape"),
        (lambda: TreeSoftmax(0, 5), "in_features"),
        (lambda: TreeSoftmax(3, 0), "num_classes"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("counts", [torch.zeros(8), torch.ones(8), torch.full((8,), 7)])
def test_equal_counts_make_an_even_tree(counts):
    assert TreeSoftmax(3, 8, counts=counts).path_lengths.tolist() == [3] * 8


@pytest.mark.parametrize("num_classes", [1, 2, 3, 5, 8, 100, 1000])
def test_without_counts_the_tree_is_balanced(num_classes):
    lengths = TreeSoftmax(3, num_classes).path_lengths
    assert lengths.max() == math.ceil(math.log2(num_classes))
    assert lengths.max() - lengths.min() <= 1
    huffmans = TreeSoftmax(3, num_classes, counts=torch.ones(num_classes)).path_lengths
    assert sorted(huffmans.tolist()) == sorted(lengths.tolist())


@pytest.mark.parametrize("old", [lambda: TreeSoftmax(3, ZIPF), lambda: TreeSoftmax(3, counts=ZIPF)])
def test_the_old_form_warns(old):
    with pytest.warns(DeprecationWarning, match="num_classes"):
        layer = old()
    assert torch.equal(layer.nodes, TreeSoftmax(3, 1000, counts=ZIPF).nodes)


def test_the_number_of_classes_must_be_said():
    with pytest.raises(TypeError, match="num_classes"):
        TreeSoftmax(3)
    with pytest.raises(TypeError, match="num_classes"):
        TreeSoftmax(3, ZIPF, counts=ZIPF)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_zero_counts_bound_the_work(scale):
    """Most classes unseen, as in a recommender: the mean path is at most one longer than the entropy of what is
    counted, unseen classes as the rarest seen; and no path is longer than Huffman's for such a ratio of counts."""
    counts = scale * (1e4 / torch.arange(1, 3001, dtype=torch.float64)).floor()
    counts[1000:] = 0
    lengths = TreeSoftmax(3, 3000, counts=counts).path_lengths
    p = counts.clamp(min=counts[999])
    p /= p.sum()
    assert float((p * lengths).sum()) <= float(-(p * p.log2()).sum()) + 1
    assert int(lengths.max()) <= math.log(1 / float(p.min()), (1 + 5**0.5) / 2) + 1
