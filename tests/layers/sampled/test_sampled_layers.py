"""Sampled layers: training, sparse gradients, autocast, compilation, adaptive samplers, bad input."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from lastlayer import (
    BlackOut,
    FullSoftmax,
    InBatch,
    LogUniform,
    Mixed,
    NegativeSampling,
    NoiseContrastive,
    QuadraticKernel,
    RandomFourier,
    SampledSoftmax,
    ScreenedSoftmax,
    SVDPreview,
    Uniform,
    Unigram,
)

LAYERS = pytest.mark.parametrize("layer_class", [SampledSoftmax, NoiseContrastive, NegativeSampling, BlackOut])
V, D = 60, 8


def make(layer_class, sampler=None, num_samples=10, **options):
    torch.manual_seed(1)
    return layer_class(D, V, LogUniform(V) if sampler is None else sampler, num_samples, **options)


def batch(rows=32, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(rows, D, generator=generator).to(dtype)
    return hidden, torch.randint(V, (rows,), generator=generator)


@LAYERS
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adagrad])
def test_sparse_steps_equal_dense_steps(layer_class, optimizer):
    layers = [make(layer_class, sparse=sparse) for sparse in (True, False)]
    for layer in layers:
        torch.manual_seed(3)
        steps = optimizer(layer.parameters(), lr=0.1)
        for _ in range(5):
            steps.zero_grad()
            layer(*batch()).backward()
            steps.step()
    for one, other in zip(*(layer.parameters() for layer in layers), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert layers[0].weight.grad.is_sparse
    assert [id(p) for p in layers[0].sparse_parameters()] == [id(layers[0].weight), id(layers[0].bias)]
    assert layers[1].sparse_parameters() == []


@pytest.mark.parametrize(
    ("layer_class", "sampler"),
    [
        (SampledSoftmax, lambda: Uniform(V, replacement=False)),
        (NoiseContrastive, lambda: Unigram(1 / torch.arange(1, V + 1), shared=False)),
        (SampledSoftmax, lambda: InBatch(V)),
        (NegativeSampling, lambda: Mixed(InBatch(V), Uniform(V), 0.5)),
        (BlackOut, lambda: QuadraticKernel(V, D)),
        (SampledSoftmax, lambda: RandomFourier(V, D, leaf_size=4)),
    ],
)
def test_training_learns_with_every_sampler(layer_class, sampler):
    """Each class has a direction of its own; after training the layer's best class is mostly the right one."""
    layer = make(layer_class, sampler(), 20, sparse=True)
    directions = 3 * torch.nn.functional.normalize(torch.randn(V, D), dim=1)
    steps = torch.optim.Adagrad(layer.parameters(), lr=0.5)
    for _ in range(150):
        targets = torch.randint(V, (64,))
        loss = layer(directions[targets], targets)
        steps.zero_grad()
        loss.backward()
        steps.step()
    found = layer.topk(directions, 1).indices[:, 0]
    assert float((found == torch.arange(V)).float().mean()) > 0.8


def test_evaluation_is_the_full_softmax():
    layer = make(SampledSoftmax)
    full = FullSoftmax(D, V)
    full.load_state_dict(layer.state_dict())
    hidden, targets = batch()
    for call in (
        lambda layer: layer.log_prob(hidden),
        lambda layer: layer.target_log_prob(hidden, targets),
        lambda layer: layer.topk(hidden, 5, exclude=targets[:, None])[1],
        lambda layer: layer.score(hidden, targets[:, None]),
    ):
        assert torch.equal(call(layer), call(full))
    screen = ScreenedSoftmax.from_layer(layer, preview=SVDPreview(4), candidates=40, exact=True)
    assert torch.equal(screen.topk(hidden, 3).indices, full.topk(hidden, 3).indices)


def test_a_seed_reproduces_the_loss():
    layer, found = make(SampledSoftmax), []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        found.append(layer(*batch()).item())
    assert found[0] == found[1] != found[2]


@LAYERS
@pytest.mark.parametrize("shared", [True, False])
def test_low_precision_is_near_double(layer_class, shared):
    hidden, targets = batch()
    layer = make(layer_class, LogUniform(V, shared=shared), sparse=True)
    truth = copy.deepcopy(layer).double()
    found = []
    for one, dtype, autocast in (
        (truth, torch.float64, False),
        (layer, torch.float32, True),
        (copy.deepcopy(layer).bfloat16(), torch.bfloat16, False),
    ):
        torch.manual_seed(0)
        leaf = hidden.to(dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = one(leaf, targets)
        loss.backward()
        assert loss.dtype == (torch.float64 if one is truth else torch.float32)
        assert one.weight.grad.dtype == one.weight.dtype
        found.append((loss.double(), leaf.grad.double(), one.weight.grad.to_dense().double()))
    for ours in found[1:]:
        for one, exact in zip(ours, found[0], strict=True):
            assert float((one - exact).norm()) < 0.02 * float(exact.norm())


def test_tied_weight_and_frozen_parts():
    embedding = nn.Embedding(V, D)
    layer = make(SampledSoftmax, weight=embedding.weight, bias=False, sparse=True)
    assert layer.weight is embedding.weight
    hidden, targets = batch()
    layer.weight.requires_grad_(False)
    leaf = hidden.requires_grad_()
    layer(leaf, targets).backward()
    assert layer.weight.grad is None
    assert leaf.grad.any()


def test_a_kernel_sampler_follows_the_weight():
    """After steps and a loaded state, its probabilities are those of a sampler that looks at the weight afresh."""
    layer = make(SampledSoftmax, QuadraticKernel(V, D, leaf_size=4, centred=False), 3, sparse=True)
    steps = torch.optim.SGD(layer.parameters(), lr=2.0)
    hidden, targets = batch(rows=2)

    def agrees():
        fresh = QuadraticKernel(V, D, leaf_size=4, centred=False)
        fresh.update(layer.weight, layer.bias)
        everything = torch.arange(V).expand(2, V)
        return torch.allclose(
            layer.sampler.log_prob(everything, hidden), fresh.log_prob(everything, hidden), atol=1e-5
        )

    for step in range(6):
        steps.zero_grad()
        layer(hidden, targets).backward()
        assert agrees(), f"before step {step}"
        if step % 2:  # two batches before one step, every other time
            steps.step()
    layer.load_state_dict({name: torch.randn_like(t) for name, t in layer.state_dict().items()})
    layer(hidden, targets)
    assert agrees()


@LAYERS
def test_barred_classes_are_never_pushed_and_give_finite_gradients(layer_class):
    layer = make(layer_class, Uniform(V), 50, sparse=True)
    with torch.no_grad():
        layer.bias[10:20] = -math.inf
    hidden, targets = batch()
    targets = torch.where((targets >= 10) & (targets < 20), 0, targets)
    loss = layer(hidden, targets)
    loss.backward()
    assert loss.isfinite()
    gradient = layer.weight.grad.to_dense()
    assert gradient.isfinite().all()
    assert not gradient[10:20].any()
    assert layer.bias.grad.to_dense().isfinite().all()
    assert not set(layer.topk(hidden, 30).indices.flatten().tolist()) & set(range(10, 20))


def test_copies_keep_the_sampler():
    layer = make(SampledSoftmax, Unigram(1 / torch.arange(1, V + 1)))
    hidden, targets = batch()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.manual_seed(0)
        expected = layer(hidden, targets)
        torch.manual_seed(0)
        assert torch.equal(twin(hidden, targets), expected)


def test_in_batch_counts_in_training_alone():
    layer = make(SampledSoftmax, InBatch(V))
    hidden, targets = batch()
    targets[3] = -100
    layer(hidden, targets)
    assert float(layer.sampler.total) == len(targets) - 1
    layer.eval()
    layer(hidden, targets)
    assert float(layer.sampler.total) == len(targets) - 1


def test_a_screen_and_the_sampler_are_moved_with_the_layer():
    with torch.device("meta"):
        layer = make(SampledSoftmax, Unigram(1 / torch.arange(1, V + 1, device="cpu")))
    layer = layer.to_empty(device="cpu")
    source = make(SampledSoftmax)
    layer.load_state_dict(source.state_dict())
    assert layer(*batch()).isfinite()


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "sampler must be a Sampler", lambda: make(SampledSoftmax, 3)),
        (ValueError, "num_classes=60, got one of 9", lambda: make(SampledSoftmax, Uniform(9))),
        (ValueError, "num_samples must be at least 1, got 0", lambda: make(BlackOut, num_samples=0)),
        (
            ValueError,
            "num_samples must be at most num_classes=60",
            lambda: make(SampledSoftmax, Uniform(V, replacement=False), 61),
        ),
        (ValueError, "correction must be one of", lambda: make(SampledSoftmax, correction="target")),
        (ValueError, "calibration", lambda: make(NegativeSampling, calibration=1.5)),
        (ValueError, "log_normalizer", lambda: make(NoiseContrastive, log_normalizer=math.inf)),
        (ValueError, "class_weights", lambda: make(SampledSoftmax, class_weights=torch.ones(3))),
        (
            ValueError,
            "class 0 is never drawn",
            lambda: make(SampledSoftmax, Unigram((torch.arange(V) > 0).float()))(
                torch.zeros(1, D), torch.tensor([0])
            ),
        ),
        (
            ValueError,
            "target_weights must have targets' shape",
            lambda: make(SampledSoftmax)(torch.zeros(2, D), torch.zeros(2, 3).long(), torch.ones(2)),
        ),
        (
            ValueError,
            "target_weights must be weights that are finite and at least 0",
            lambda: make(SampledSoftmax)(torch.zeros(2, D), torch.zeros(2, 3).long(), -torch.ones(2, 3)),
        ),
        (
            IndexError,
            "targets must be class ids",
            lambda: make(SampledSoftmax)(torch.zeros(2, D), torch.full((2, 3), V)),
        ),
    ],
)
def test_bad_input_is_refused(error, message, call):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("num_samples", [1, 50])
def test_fresh_negative_sampling_expects_one_target_among_its_negatives(num_samples):
    """A bias from 0 on would cost `k log 2`, most of it a push down that every class gets."""
    layer = NegativeSampling(D, V, Uniform(V), num_samples, remove_hits=False)
    loss = layer(torch.zeros(5, D), torch.arange(5))
    assert float(loss.detach()) < math.log(num_samples + 1) + 1.01
