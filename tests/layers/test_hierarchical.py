"""What is specific to `HierarchicalSoftmax`: clusters of any sizes, sparse gradients, the exact search."""

import copy

import pytest
import torch
from torch import nn

from lastlayer import FullSoftmax, HierarchicalSoftmax, SoftCap
from lastlayer.functional import two_level_queries
from lastlayer.functional.row_sparse import GradientMemory
from lastlayer.layers import search

RAGGED = torch.tensor([2, 0, 1, 1, 0, 1, 3, 1, 1, 0, 1, 3, 1])


def make(num_classes=13, in_features=5, ids=RAGGED, **options):
    torch.manual_seed(0)
    return HierarchicalSoftmax(in_features, num_classes, clusters=ids, dtype=torch.float64, **options)


def batch(layer, rows=40):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, layer.in_features, generator=generator, dtype=torch.float64)
    return hidden, torch.randint(layer.num_classes, (rows,), generator=generator)


@pytest.mark.parametrize("num_classes", [1, 2, 3, 12, 20, 23, 1000, 5000])
def test_class_order_is_a_bijection_used_by_training_and_query(num_classes):
    """Law H2: the class that training made certain is the class that a query finds."""
    layer = HierarchicalSoftmax(3, num_classes)
    assert torch.equal(layer.order.sort().values, torch.arange(num_classes))
    probed = torch.tensor([0, num_classes // 2, num_classes - 1]).unique()
    hidden = 4 * torch.eye(3)[: len(probed)]
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    for _ in range(30):
        optimizer.zero_grad()
        layer(hidden, probed).backward()
        optimizer.step()
    assert torch.equal(layer.topk(hidden, 1).indices[:, 0], probed)
    assert torch.equal(layer.log_prob(hidden).argmax(-1), probed)


@pytest.mark.parametrize("targets", [[3, 3, 3, 3], [0, 1, 2, 6], [6, 0, 3, 11], [1]])
def test_grouped_batch_is_row_by_row(targets):
    """Law H3: all of one cluster, all distinct, unsorted, one row."""
    layer = make(reduction="none")
    targets = torch.tensor(targets)
    hidden, _ = batch(layer, len(targets))
    alone = torch.stack([layer(h, t) for h, t in zip(hidden, targets, strict=True)])
    torch.testing.assert_close(layer(hidden, targets), alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, 0.3, 2.0, 8.0])
def test_best_first_topk_is_the_sort(scale, monkeypatch):
    """Law H4, at every k, from all ties broken by nothing to one certain class."""
    monkeypatch.setattr(search, "worth_searching", lambda *sizes: True)
    monkeypatch.setattr(two_level_queries, "LARGEST_SHARE", 1)
    layer = make(97, ids=torch.arange(97) ** 2 % 97 % 11)
    layer = make(97, ids=layer._clusters.unique(return_inverse=True)[1])
    hidden = scale * batch(layer)[0]
    log_prob = layer.log_prob(hidden).detach()
    for k in (1, 3, 7, 97):
        answer = layer.topk(hidden, k)
        torch.testing.assert_close(answer.log_prob, log_prob.topk(k).values, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(log_prob.gather(1, answer.indices), answer.log_prob, rtol=1e-12, atol=1e-12)
        if scale:
            assert torch.equal(answer.indices, log_prob.topk(k).indices)


@pytest.mark.parametrize("bias", [True, False])
def test_sparse_gradients_equal_dense(bias):
    dense, sparse = make(bias=bias), make(bias=bias, sparse=True)
    sparse.load_state_dict(dense.state_dict())
    hidden, targets = batch(dense, 6)
    targets = targets.clamp(max=5)
    for layer in (dense, sparse):
        layer(hidden, targets).backward()
    for (name, p), q in zip(dense.named_parameters(), sparse.parameters(), strict=True):
        assert q.grad.is_sparse == (not name.startswith("head"))
        torch.testing.assert_close(q.grad.to_dense(), p.grad, rtol=1e-13, atol=0)
    assert (sparse.weight.grad._indices()[0].diff() > 0).all(), "coalescing would have to sort"
    touched = sparse._clusters[targets].unique()
    assert sparse.weight.grad._nnz() == int(sparse.offsets.diff()[touched].sum())
    assert {id(p) for p in sparse.sparse_parameters()} == {id(p) for p in sparse.parameters() if p.grad.is_sparse}
    assert dense.sparse_parameters() == []


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.3),
        lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9),
        lambda p: torch.optim.Adagrad(p, lr=0.3),
    ],
)
def test_optimizers_take_sparse_gradients(optimizer):
    dense, sparse = make(), make(sparse=True)
    sparse.load_state_dict(dense.state_dict())
    hidden, targets = batch(dense)
    for layer in (dense, sparse):
        stepper = optimizer(layer.parameters())
        for rows in range(1, 30, 5):
            stepper.zero_grad()
            layer(hidden[:rows], targets[:rows]).backward()
            stepper.step()
    for p, q in zip(dense.parameters(), sparse.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


def test_sparse_parameters_split_groups_for_sparse_adam():
    layer = make(sparse=True)
    sparse = layer.sparse_parameters()
    dense = [p for p in layer.parameters() if not any(p is q for q in sparse)]
    before = [p.detach().clone() for p in layer.parameters()]
    hidden, targets = batch(layer)
    layer(hidden, targets).backward()
    torch.optim.SparseAdam(sparse).step()
    torch.optim.AdamW(dense).step()
    assert not any(torch.equal(p, b) for p, b in zip(layer.parameters(), before, strict=True))


def test_sparse_gradients_are_made_coalesced():
    layer = make(sparse=True)
    loss = layer(*batch(layer))
    assert all(gradient.is_coalesced() for gradient in torch.autograd.grad(loss, layer.sparse_parameters()))


def test_gradients_add_up_over_backwards():
    layer = make(sparse=True)
    hidden, targets = batch(layer)
    for part in (slice(0, 5), slice(5, 40)):
        (layer(hidden[part], targets[part]) * len(targets[part]) / 40).backward()
    whole = copy.deepcopy(layer)
    whole.zero_grad()
    whole(hidden, targets).backward()
    torch.testing.assert_close(layer.weight.grad.to_dense(), whole.weight.grad.to_dense())


def test_gradients_add_up_after_an_empty_batch():
    layer = make(sparse=True)
    hidden, targets = batch(layer, 4)
    layer.reduction = "sum"
    for rows in (0, 4):
        layer(hidden[:rows], targets[:rows]).backward()
    expected = torch.autograd.grad(layer(hidden, targets), layer.weight)[0]
    assert torch.equal(layer.weight.grad.to_dense(), expected.to_dense())


def test_gradients_that_were_added_up_are_not_wrongly_marked_as_coalesced():
    """A mark on rows that occur twice would make optimizers drop half of them."""
    layer = make(sparse=True)
    hidden, targets = batch(layer)
    wanted = make()
    wanted.load_state_dict(layer.state_dict())
    for part in (hidden, 2 * hidden):
        layer(part, targets).backward()
        wanted(part, targets).backward()
        grad = layer.weight.grad
        assert not grad.is_coalesced() or (grad._indices()[0].diff() > 0).all()
    torch.testing.assert_close(layer.weight.grad.to_dense(), wanted.weight.grad)


def test_held_gradient_survives_the_next_step():
    """A gradient that the user keeps is theirs."""
    layer = HierarchicalSoftmax(64, 20_000, sparse=True)
    hidden, targets = torch.randn(300, 64), torch.randint(20_000, (300,))
    layer(hidden, targets).backward()
    kept = layer.weight.grad
    values = kept._values().clone()
    layer.zero_grad()
    layer(2 * hidden, targets).backward()
    assert torch.equal(kept._values(), values)
    assert layer.weight.grad._values().data_ptr() != kept._values().data_ptr()


def test_memory_of_a_gradient_serves_again_only_when_no_tensor_uses_it():
    memory, like, shape = GradientMemory(), torch.empty(0), (1000, 300)
    first = memory.allocate(shape, like)
    address = first.data_ptr()
    assert memory.allocate(shape, like).data_ptr() != address
    first = memory.allocate(shape, like)
    address = first.data_ptr()
    view = first[3:].view(-1)[7:]
    del first
    assert memory.allocate(shape, like).data_ptr() != address, "although a view of it lives"
    del view
    assert memory.allocate(shape, like).data_ptr() == address
    assert memory.allocate((2000, 300), like).shape == (2000, 300)


def test_class_weight_is_in_class_order():
    layer = make()
    for y in range(13):
        assert torch.equal(layer.class_weight()[y], layer.weight[(layer.order == y).nonzero().item()])


def test_state_dict_carries_the_clusters():
    layer = make()
    other = make(ids=torch.tensor([0, 1, 2, 3] * 3 + [0]))
    other.load_state_dict(layer.state_dict())
    hidden, _ = batch(layer)
    assert torch.equal(other.log_prob(hidden), layer.log_prob(hidden))
    state = layer.state_dict()
    for name, bad in (("order", torch.zeros(13, dtype=torch.int64)), ("offsets", torch.tensor([0, 5, 5, 9, 13]))):
        with pytest.raises(ValueError, match=name):
            other.load_state_dict({**state, name: bad})
    assert torch.equal(other.log_prob(hidden), layer.log_prob(hidden))


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([0, 1, 3, 1], ValueError, "no class is in cluster 2"),
        ([0, -1, 1, 0], ValueError, r"clusters\[1\] is -1"),
        ([0, 1, 0], ValueError, "one id for each of the 4 classes"),
        ([0, 1, 9, 0], ValueError, "highest is 9"),
        ([0.0, 1.0, 0.0, 1.0], TypeError, "int64"),
        ([[0, 1], [0, 1]], ValueError, "shape"),
    ],
)
def test_bad_clusters_are_refused(ids, error, message):
    with pytest.raises(error, match=message):
        HierarchicalSoftmax(3, 4, clusters=torch.tensor(ids))


def test_clusters_that_are_no_tensor_are_refused():
    with pytest.raises(TypeError, match="clusters must be a Tensor"):
        HierarchicalSoftmax(3, 4, clusters=[0, 1, 0, 1])


def test_learns_to_tell_classes_of_one_cluster_apart():
    """The Keras layer's second level was shared by all clusters, so it could not."""
    layer = HierarchicalSoftmax(6, 6, clusters=torch.tensor([0, 0, 0, 1, 1, 1]))
    hidden, targets = torch.eye(6), torch.arange(6)
    optimizer = torch.optim.SGD(layer.parameters(), lr=2.0)
    for _ in range(100):
        optimizer.zero_grad()
        loss = layer(hidden, targets)
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_autocast_trains():
    layer = nn.Sequential(nn.Linear(4, 8)), HierarchicalSoftmax(8, 50, sparse=True)
    hidden, targets = torch.randn(9, 4), torch.randint(50, (9,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = layer[1](layer[0](hidden), targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert layer[1].weight.grad.dtype == torch.float32
    exact = layer[1](layer[0](hidden), targets)
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("bias", [True, False])
def test_starts_from_a_full_layer(bias):
    full = FullSoftmax(5, 13, bias=bias, dtype=torch.float64, reduction="sum")
    layer = HierarchicalSoftmax.from_full(full, clusters=RAGGED, sparse=True)
    zero = torch.zeros(1, 5, dtype=torch.float64)
    torch.testing.assert_close(layer.log_prob(zero), full.log_prob(zero))
    assert torch.equal(layer.class_weight(), full.weight)
    torch.testing.assert_close(layer.head_weight[3], full.weight[RAGGED == 3].mean(0))
    assert (layer.reduction, layer.sparse) == ("sum", True)
    for wrong in (torch.nn.Linear(5, 13), FullSoftmax(5, 13, logit_map=SoftCap(2.0))):
        with pytest.raises(TypeError, match="FullSoftmax"):
            HierarchicalSoftmax.from_full(wrong)


@pytest.mark.parametrize("bias", [True, False])
def test_full_layer_touches_it_where_asked(bias):
    """Log-probabilities and their slopes agree at the point of expansion."""
    layer = make(bias=bias)
    at = batch(layer, 1)[0][0]
    full = layer.to_full(at)
    torch.testing.assert_close(full.log_prob(at), layer.log_prob(at))
    of_full, of_layer = (torch.autograd.functional.jacobian(m.log_prob, at) for m in (full, layer))
    torch.testing.assert_close(of_full, of_layer)
    origin = torch.zeros_like(at)
    torch.testing.assert_close(layer.to_full().log_prob(origin), layer.log_prob(origin))
    for wrong, error in ((at[None], ValueError), (at.long(), TypeError), (at.tolist(), TypeError)):
        with pytest.raises(error, match="at must"):
            layer.to_full(wrong)
