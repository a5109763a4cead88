"""InBatch: the batch's targets, and their frequencies."""

import copy
import math

import pytest
import torch

from lastlayer import InBatch, Mixed, Uniform


def test_all_targets_of_the_batch_or_some_of_them():
    torch.manual_seed(0)
    sampler = InBatch(10)
    targets = torch.tensor([1, 4, 4, 9, 0])
    sampler.observe(targets)
    assert torch.equal(sampler.sample(5).ids, targets)
    assert torch.equal(sampler.sample(99).ids, targets)
    some = sampler.sample(3).ids
    assert len(some) == 3
    assert set(some.tolist()) <= set(targets.tolist())


def test_counts_are_estimated_as_they_stream():
    """Over many batches the estimated expected count is the true one of the other rows' targets."""
    torch.manual_seed(0)
    prob = torch.tensor([0.5, 0.2, 0.2, 0.1])
    sampler = InBatch(4)
    for _ in range(300):
        sampler.observe(torch.multinomial(prob, 64, replacement=True))
    found = sampler.log_expected_counts(torch.arange(4), 64).exp()
    assert torch.allclose(found, 63 * prob, rtol=0.05)
    assert torch.allclose(
        sampler.log_inclusion(torch.arange(4), 2).exp(), 1 - (1 - prob) ** (2 * 63 / 64), rtol=0.05
    )


def test_given_counts_stay():
    sampler = InBatch(3, counts=torch.tensor([1, 2, 1]))
    sampler.observe(torch.tensor([0, 0, 0]))
    assert torch.allclose(sampler.log_prob(torch.arange(3)).exp(), torch.tensor([0.25, 0.5, 0.25]))
    assert not sampler.state_dict()


def test_streamed_counts_are_state():
    sampler = InBatch(3)
    sampler.observe(torch.tensor([0, 1, 1]))
    other = InBatch(3)
    other.load_state_dict(sampler.state_dict())
    for twin in (other, copy.deepcopy(sampler).to(torch.bfloat16)):
        assert torch.equal(twin.log_prob(torch.arange(3)), sampler.log_prob(torch.arange(3)))
    assert sampler.log_prob(torch.tensor(2)) == -math.inf


def test_mixed_with_a_uniform_part():
    torch.manual_seed(0)
    sampler = Mixed(InBatch(4), Uniform(4), 0.5)
    sampler.observe(torch.tensor([2, 2]))
    ids, log_counts = sampler.sample(8)
    assert ids[:2].tolist() == [2, 2]
    assert len(ids) == 6  # all of the batch, and half of the set from the other
    expected = torch.where(ids == 2, 1.0 + 1.0, 1.0)  # one target of another row; four draws from four classes
    assert torch.allclose(log_counts.exp(), expected)


def test_bad_input_is_refused():
    with pytest.raises(RuntimeError, match=r"observe\(targets\) first"):
        InBatch(3).sample(2)
    with pytest.raises(ValueError, match="counts must have shape"):
        InBatch(3, counts=torch.ones(4))
    with pytest.raises(ValueError, match="positive"):
        InBatch(3, counts=torch.zeros(3))
    with pytest.raises(ValueError, match=r"counts\[2\] is -1"):
        InBatch(3, counts=torch.tensor([1, 2, -1]))
