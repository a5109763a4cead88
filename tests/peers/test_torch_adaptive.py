"""What PyTorch's own tests check of `nn.AdaptiveLogSoftmaxWithLoss`, applied to `AdaptiveSoftmax`."""

import pytest
import torch
from torch import nn

from lastlayer import AdaptiveSoftmax


def pair(in_features, num_classes, cutoffs, **options):
    """PyTorch's layer, and ours with its parameters, both float64."""
    torch.manual_seed(0)
    theirs = nn.AdaptiveLogSoftmaxWithLoss(in_features, num_classes, cutoffs, **options).double()
    ours = AdaptiveSoftmax(in_features, num_classes, cutoffs, **options, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize(
    "cutoffs", [[5, 10, 15, 15], [5, 15, 10], [5, 10, 25], [-5, 10], [5, 10, 20], [0, 10], [5.5]]
)
def test_cutoffs_must_be_increasing_whole_numbers_inside_the_classes(cutoffs):
    with pytest.raises((TypeError, ValueError), match="cutoffs"):
        AdaptiveSoftmax(16, 20, cutoffs)


def test_rows_of_hidden_and_targets_must_agree():
    layer = AdaptiveSoftmax(16, 20, [5, 10, 15], div_value=2.0)
    with pytest.raises(ValueError, match="targets"):
        layer(torch.randn(2, 16), torch.tensor([0, 5, 10]))


@pytest.mark.parametrize("target", [-1, 20])
def test_target_outside_the_classes_is_an_error(target):
    layer = AdaptiveSoftmax(16, 20, [5, 10, 15], div_value=2.0)
    with pytest.raises(IndexError, match="targets"):
        layer(torch.randn(2, 16), torch.tensor([2, target]))


@pytest.mark.parametrize("head_bias", [False, True])
@pytest.mark.parametrize(("cutoffs", "div_value"), [([5, 10, 15], 2.0), ([4], 2.0), ([5], 4.0), ([1, 2, 3], 1.5)])
def test_output_loss_and_log_prob(cutoffs, div_value, head_bias):
    theirs, ours = pair(16, 20, cutoffs, div_value=div_value, head_bias=head_bias)
    hidden, targets = torch.randn(128, 16, dtype=torch.float64), torch.randint(20, (128,))
    expected = theirs(hidden, targets)
    torch.testing.assert_close(ours.target_log_prob(hidden, targets), expected.output)
    torch.testing.assert_close(ours(hidden, targets), expected.loss)
    log_prob = ours.log_prob(hidden)
    torch.testing.assert_close(log_prob, theirs.log_prob(hidden))
    torch.testing.assert_close(log_prob.exp().sum(1), torch.ones(128, dtype=torch.float64))
    torch.testing.assert_close(log_prob.gather(1, targets[:, None])[:, 0], expected.output)


def test_one_example_without_a_batch():
    theirs, ours = pair(8, 4, [2], div_value=2.0)
    hidden = torch.randn(8, dtype=torch.float64)
    for target in range(4):
        expected = theirs(hidden, torch.tensor(target))
        torch.testing.assert_close(ours.target_log_prob(hidden, torch.tensor(target)), expected.output)
        torch.testing.assert_close(ours(hidden, torch.tensor(target)), expected.loss)


@pytest.mark.parametrize("favoured", ["head", "tail", "both"])
def test_predict_is_the_best_class(favoured):
    theirs, ours = pair(64, 10, [4, 8], div_value=2.0)
    hidden = torch.randn(64, 64, dtype=torch.float64).abs()
    with torch.no_grad():
        for layer in (theirs, ours):  # the shortlist, or the clusters, gain what the others lose
            sign = {"head": 1.0, "tail": -1.0, "both": 0.0}[favoured]
            layer.head.weight.abs_()
            layer.head.weight[:4] *= 1 + sign * 0.9
            layer.head.weight[4:] *= 1 - sign * 0.9
    predicted = theirs.predict(hidden)
    assert torch.equal(ours.topk(hidden, 1).indices[:, 0], predicted)
    if favoured == "head":
        assert (predicted < 4).all()
    if favoured == "tail":
        assert (predicted >= 4).all()


def test_gradients_equal():
    theirs, ours = pair(16, 20, [5, 10, 15], div_value=2.0, head_bias=True)
    hidden, targets = torch.randn(32, 16, dtype=torch.float64), torch.randint(20, (32,))
    own, other = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    ours(own, targets).backward()
    theirs(other, targets).loss.backward()
    torch.testing.assert_close(own.grad, other.grad)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], msg=name)
