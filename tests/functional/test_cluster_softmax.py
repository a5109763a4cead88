"""Two levels by compiled loops, by compiled products, and by PyTorch, agree on every instruction set."""

import pytest
import torch

from lastlayer.functional.cluster_softmax import cluster_log_prob, group_by_cluster, touched_rows
from lastlayer.kernels import backends, engine

WAYS = {"compiled": 1 << 40, "both": 200, "products": 0, "plain": 0}  # from how many multiply-adds products
SIZES = torch.tensor([5, 1, 9, 2, 7])


def run(way, monkeypatch, dtype=torch.float64, rows=23, bias=True, sparse=False, frozen=()):
    """The log-probabilities and all gradients, by one way."""
    monkeypatch.setattr(backends, "GROUP_WORK", WAYS[way])
    generator = torch.Generator().manual_seed(5)

    def leaf(name, *shape):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        return values.requires_grad_(name not in frozen)

    leaves = {
        "hidden": leaf("hidden", rows, 6),
        "head_weight": leaf("head_weight", 5, 6),
        "head_bias": leaf("head_bias", 5) if bias else None,
        "weight": leaf("weight", 24, 6),
        "bias": leaf("bias", 24) if bias else None,
    }
    offsets = torch.nn.functional.pad(SIZES.cumsum(0), (1, 0))
    slots = torch.randint(24, (rows,), generator=generator)
    clusters = torch.bucketize(slots, offsets, right=True) - 1
    hidden, *parameters = leaves.values()
    with engine.forced(None if way == "plain" else engine.current().isa):
        head_weight, head_bias, weight, bias = parameters
        head = cluster_log_prob(hidden, head_weight, head_bias, clusters)
        log_prob = head + cluster_log_prob(hidden, weight, bias, slots, clusters, offsets, sparse=sparse)
        (log_prob * torch.linspace(-1, 2, rows, dtype=dtype)).sum().backward()
    gradients = {n: None if t is None or t.grad is None else t.grad.to_dense() for n, t in leaves.items()}
    return {"log_prob": log_prob.detach(), **gradients}


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 23, 60])
def test_ways_agree(rows, bias, sparse, isa, monkeypatch):
    expected = run("plain", monkeypatch, rows=rows, bias=bias, sparse=sparse)
    for way in WAYS:
        actual = run(way, monkeypatch, rows=rows, bias=bias, sparse=sparse)
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11, msg=lambda m, way=way: f"{way}: {m}")


def test_ways_agree_in_single_precision(isa, monkeypatch):
    exact = run("plain", monkeypatch)
    for way in WAYS:
        actual = run(way, monkeypatch, dtype=torch.float32)
        for name, value in exact.items():
            torch.testing.assert_close(actual[name].double(), value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [0, 1, 200])
def test_rows_are_grouped_by_cluster(rows):
    offsets = torch.nn.functional.pad(SIZES.cumsum(0), (1, 0))
    clusters = torch.randint(5, (2 * rows,), generator=torch.Generator().manual_seed(1))[::2]
    groups = group_by_cluster(clusters, offsets)
    seen, expected_rows = [], []
    for at, start, size in groups.each():
        (cluster,) = clusters[at].unique()
        assert (start, size) == (int(offsets[cluster]), int(SIZES[cluster]))
        assert (at.diff() > 0).all()
        seen.append(at)
        expected_rows.append(torch.arange(start, start + size))
    nothing = torch.empty(0, dtype=torch.int64)
    assert torch.equal(torch.cat([nothing, *seen]).sort().values, torch.arange(rows))
    assert torch.equal(touched_rows(groups), torch.cat([nothing, *expected_rows]))


def test_a_class_ruled_out_has_no_part(isa):
    """A bias of -inf: probability 0, no gradient."""
    offsets, weight = torch.tensor([0, 3, 6]), torch.randn(6, 4, requires_grad=True)
    bias = torch.tensor([0.0, float("-inf"), 0, 0, 0, 0])
    hidden = torch.randn(3, 4, requires_grad=True)
    slots = torch.tensor([0, 2, 2])
    log_prob = cluster_log_prob(hidden, weight, bias, slots, torch.zeros_like(slots), offsets)
    log_prob.sum().backward()
    inner = torch.nn.functional.linear(hidden, weight[[0, 2]]).log_softmax(1)
    torch.testing.assert_close(log_prob, inner[[0, 1, 2], [0, 1, 1]])
    assert not weight.grad[1].any()
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("frozen", [["hidden"], ["weight"], ["weight", "bias"], ["head_weight"], ["bias"]])
def test_frozen_tensors_get_no_gradient(way, frozen, isa, monkeypatch):
    expected = run("plain", monkeypatch, sparse=True)
    actual = run(way, monkeypatch, sparse=True, frozen=frozen)
    for name, value in actual.items():
        if name in frozen:
            assert value is None
        else:
            torch.testing.assert_close(value, expected[name], rtol=1e-11, atol=1e-11)
