"""Law H1: with Theano's parameters the layer equals a plain transcription of `h_softmax`."""

import math

import pytest
import torch

from lastlayer import HierarchicalSoftmax, clusters


def h_softmax(x, W1, b1, W2, b2, num_classes, target=None, mask_padding=True):
    """`theano.tensor.nnet.h_softmax`, line by line; Theano itself has no mask."""
    nC, _, nO = W2.shape
    batch = torch.arange(len(x))
    activations = torch.tensordot(x, W2, ([1], [1])) + b2
    if mask_padding:
        used = torch.arange(nC * nO).reshape(nC, nO) < num_classes
        activations = activations.masked_fill(~used, -torch.inf)
    class_probs = torch.softmax(x @ W1 + b1, 1)
    if target is None:
        output_probs = torch.softmax(activations.reshape(-1, nO), 1).reshape(len(x), nC, -1)
        return (class_probs[:, :, None] * output_probs).reshape(len(x), -1)[:, :num_classes]
    target_classes, target_outputs_in_class = target // nO, target % nO
    output_probs = torch.softmax(activations[batch, target_classes], 1)
    return class_probs[batch, target_classes] * output_probs[batch, target_outputs_in_class]


def parameters(num_classes, width=4):
    """In Theano's default sizes."""
    generator = torch.Generator().manual_seed(num_classes)
    nO = math.ceil(math.sqrt(num_classes))
    nC = math.ceil(num_classes / nO)
    shapes = ((width, nC), (nC,), (nC, width, nO), (nC, nO))
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("num_classes", [1, 2, 3, 12, 16, 20, 23])
def test_both_branches_and_gradients_are_theanos(num_classes):
    theirs = parameters(num_classes)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.randint(num_classes, (9,), generator=generator)
    layer = HierarchicalSoftmax.from_theano(*theirs, num_classes, sparse=True)
    everything = h_softmax(x, *theirs, num_classes)
    torch.testing.assert_close(layer.log_prob(x).exp(), everything, rtol=1e-12, atol=1e-14)
    of_targets = h_softmax(x, *theirs, num_classes, target=y)
    torch.testing.assert_close(layer.target_log_prob(x, y).exp(), of_targets, rtol=1e-12, atol=1e-14)

    (wanted,) = torch.autograd.grad(-of_targets.log().mean(), x, retain_graph=True)
    (-of_targets.log().mean()).backward(inputs=theirs)
    (found,) = torch.autograd.grad(layer(x, y), x)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-13)
    layer(x, y).backward()
    of_layer = HierarchicalSoftmax.from_theano(*(p.grad for p in theirs), num_classes)
    for ours, expected in zip(layer.parameters(), of_layer.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.to_dense(), expected, rtol=1e-11, atol=1e-13)
    nO = theirs[2].shape[2]
    used = torch.arange(theirs[3].numel()).reshape(-1, nO) < num_classes
    assert not theirs[3].grad[~used].any(), "an unused place had a gradient"


def test_there_and_back_is_a_copy():
    theirs = parameters(23)
    back = HierarchicalSoftmax.from_theano(*theirs, 23).to_theano()
    used = torch.arange(25).reshape(5, 5) < 23
    for ours, expected in zip(back[:2], theirs, strict=False):
        assert torch.equal(ours, expected)
    assert torch.equal(back.W2, theirs[2] * used[:, None])
    assert torch.equal(back.b2, theirs[3] * used)
    blank = HierarchicalSoftmax(4, 12, clusters=torch.arange(12) // 4, bias=False).to_theano()
    assert not blank.b1.any()
    assert blank.b2.shape == (3, 4)


def test_theano_itself_loses_the_mass_of_its_unused_places():
    """With zero weights (nC nO - V) / (nC nO) of it, as methods.md says."""
    zeros = [torch.zeros_like(p) for p in parameters(23)]
    x = torch.zeros(1, 4, dtype=torch.float64)
    assert h_softmax(x, *zeros, 23, mask_padding=False).sum().item() == pytest.approx(23 / 25)
    assert HierarchicalSoftmax.from_theano(*zeros, 23).log_prob(x).exp().sum().item() == pytest.approx(1)


@pytest.mark.parametrize("num_classes", [20, 26])
def test_a_number_of_classes_that_does_not_fill_the_places(num_classes):
    with pytest.raises(ValueError, match="num_classes must be between 21 and 25"):
        HierarchicalSoftmax.from_theano(*parameters(23), num_classes)


@pytest.mark.parametrize("wrong", range(4))
def test_parameters_that_do_not_fit(wrong):
    theirs = [p.detach() for p in parameters(23)]
    with pytest.raises(ValueError, match=r"W1|b1|W2|b2"):
        HierarchicalSoftmax.from_theano(*(p[:-1] if i == wrong else p for i, p in enumerate(theirs)), 23)
    with pytest.raises(TypeError, match=r"W1|b1|W2|b2"):
        HierarchicalSoftmax.from_theano(*(p.long() if i == wrong else p for i, p in enumerate(theirs)), 23)


def test_other_clusters_have_no_such_layout():
    counts = torch.arange(30, 0, -1)
    layer = HierarchicalSoftmax(3, 30, clusters=clusters.by_frequency(counts, 5))
    with pytest.raises(ValueError, match="neighbouring ids"):
        layer.to_theano()
