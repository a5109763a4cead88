"""Log-sum-exps of all clusters at once."""

import pytest
import torch
from torch.nn import functional as F

from lastlayer.functional.segments import cluster_sums, row_clusters

SIZES = {
    "even": [3, 3, 2, 3, 3],
    "ragged": [1, 7, 2, 1, 1],
    "one": [5],
    "singles": [1] * 6,
    "giant": [1] * 9 + [40] + [1] * 9,
}


def log_sum_exp(logits, offsets):
    peak, log_sum = cluster_sums(logits, offsets)
    return peak + log_sum


def by_hand(logits, sizes):
    return torch.stack([own.logsumexp(1) for own in logits.split(sizes, 1)], 1)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_it_is_the_loop_and_has_its_gradient(sizes, rows):
    offsets = F.pad(torch.tensor(sizes).cumsum(0), (1, 0))
    generator = torch.Generator().manual_seed(0)
    logits = 50 * torch.randn(rows, sum(sizes), generator=generator, dtype=torch.float64)
    upstream = torch.randn(rows, len(sizes), generator=generator, dtype=torch.float64)
    found = []
    for call in (lambda x: log_sum_exp(x, offsets), lambda x: by_hand(x, sizes)):
        leaf = logits.clone().requires_grad_()
        sums = call(leaf)
        found.append((sums.detach(), *torch.autograd.grad((sums * upstream).sum(), leaf)))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_a_cluster_without_mass_is_minus_infinity():
    offsets = torch.tensor([0, 2, 4])
    logits = torch.tensor([[-torch.inf, -torch.inf, 1.0, -torch.inf]], requires_grad=True)
    sums = log_sum_exp(logits, offsets)
    assert sums.tolist() == [[-torch.inf, 1.0]]
    (slope,) = torch.autograd.grad(sums[0, 1], logits)
    assert slope.tolist() == [[0.0, 0.0, 1.0, 0.0]]


def test_what_is_small_beside_a_large_logit_is_kept():
    offsets = torch.tensor([0, 2, 5])
    peak, log_sum = cluster_sums(torch.full((1, 5), 2.0**24), offsets)
    assert peak.tolist() == [[2.0**24, 2.0**24]]
    torch.testing.assert_close(log_sum, torch.tensor([[2.0, 3.0]]).log())


def test_the_cluster_of_each_row():
    assert row_clusters(torch.tensor([0, 3, 5]), 5).tolist() == [0, 0, 0, 1, 1]
