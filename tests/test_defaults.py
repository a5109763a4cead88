"""Layers and screens under PyTorch's default dtype and default device, which others may have set."""

import contextlib
import copy

import pytest
import torch

from lastlayer import (
    PLIF,
    AdaptiveSoftmax,
    AugmentReduce,
    BlackOut,
    Entmax,
    FactoredOutput,
    FactoredSGD,
    FullSoftmax,
    HierarchicalSoftmax,
    InBatch,
    Int4Preview,
    Int8Preview,
    LogUniform,
    Mixed,
    MixtureOfSoftmaxes,
    MonotoneNetwork,
    NegativeSampling,
    NoiseContrastive,
    OneVsAll,
    QuadraticKernel,
    RandomFourier,
    SampledSoftmax,
    ScreenedSoftmax,
    Sigsoftmax,
    SVDPreview,
    TopKSoftmax,
    TreeSoftmax,
    UMax,
    Uniform,
    Unigram,
)
from lastlayer.functional.clusters import by_embedding, by_frequency
from lastlayer.functional.trees import huffman

V, D, N = 600, 64, 80  # large enough for the kernels
COUNTS = torch.arange(1, V + 1)
LAYERS = {
    "full": lambda: FullSoftmax(D, V),
    "PLIF": lambda: FullSoftmax(D, V, logit_map=PLIF(100)),
    "monotone": lambda: FullSoftmax(D, V, logit_map=MonotoneNetwork(5)),
    "sigsoftmax": lambda: FullSoftmax(D, V, logit_map=Sigsoftmax()),
    "hierarchical": lambda: HierarchicalSoftmax(D, V),
    "hierarchical by frequency": lambda: HierarchicalSoftmax(D, V, clusters=by_frequency(COUNTS), sparse=True),
    "adaptive": lambda: AdaptiveSoftmax(D, V, [50, 200], counts=COUNTS),
    "tree": lambda: TreeSoftmax(D, V, counts=COUNTS),
    "mixture": lambda: MixtureOfSoftmaxes(D, V, 2),
    "factored": lambda: FactoredOutput(D, V),
    "entmax": lambda: FullSoftmax(D, V, normalizer=Entmax()),
    "top-k": lambda: FullSoftmax(D, V, normalizer=TopKSoftmax(50)),
    "uniform": lambda: SampledSoftmax(D, V, Uniform(V), 50),
    "log-uniform": lambda: SampledSoftmax(D, V, LogUniform(V, counts=COUNTS, replacement=False), 50, sparse=True),
    "unigram": lambda: NoiseContrastive(D, V, Unigram(COUNTS), 50, sparse=True),
    "in-batch": lambda: SampledSoftmax(D, V, Mixed(InBatch(V), Uniform(V)), 50),
    "one set a row": lambda: NegativeSampling(D, V, LogUniform(V, shared=False), 50),
    "quadratic kernel": lambda: BlackOut(D, V, QuadraticKernel(V, D), 20),
    "random Fourier": lambda: SampledSoftmax(D, V, RandomFourier(V, D), 20),
    "augment and reduce": lambda: AugmentReduce(D, V, Uniform(V), 50),
    "U-max": lambda: UMax(D, V, Unigram(COUNTS), 50, num_examples=9),
    "one against all": lambda: OneVsAll(D, V),
    "one against sampled": lambda: OneVsAll(D, V, sampler=Uniform(V), num_samples=50, sparse=True),
}
PREVIEWS = {
    "4 bits": lambda hidden: Int4Preview(calibration=hidden),
    "8 bits": lambda hidden: Int8Preview(),
    "SVD": lambda hidden: SVDPreview(16, calibration=hidden),
    "SVD in 8 bits": lambda hidden: SVDPreview(16, storage="int8"),
}


@contextlib.contextmanager
def settings(dtype=torch.float32, device=None):
    """The default dtype and device; "meta" stands for any that is not the layer's own."""
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


OTHERS = pytest.mark.parametrize(
    "others", [{"dtype": torch.float64}, {"dtype": torch.bfloat16}, {"device": "meta"}], ids=str
)


def answers(layer, hidden, targets):
    """Loss, gradients and queries, after a step where the layer makes its own."""
    layer, rows = copy.deepcopy(layer), hidden.clone().requires_grad_()
    optimizer = FactoredSGD(layer, 1e-3) if isinstance(layer, FactoredOutput) else None
    torch.manual_seed(1)  # of the classes that a sampler draws
    several = isinstance(layer, OneVsAll)
    loss = layer(rows, targets[:, None] if several else targets)
    loss.backward()
    gradients = [p.grad.to_dense() for p in layer.parameters() if p.grad is not None and p.dim()]
    if optimizer:
        optimizer.step()
    found = [loss.detach(), rows.grad, *gradients, *layer.topk(hidden[:3], 4)]
    if several:  # no probabilities
        return [*found, layer.scores(hidden[:3]).detach(), layer.score(hidden, targets[:, None]).detach()]
    return [*found, layer.log_prob(hidden[:3]).detach(), layer.target_log_prob(hidden, targets).detach()]


def screened(screen, hidden):
    """Queries of one row, as most are, and of several."""
    found = []
    for rows in (hidden[:1], hidden[:9]):
        found += [*screen.topk(rows, 5), screen(rows), screen.log_prob(rows), screen.log_normalizer_error(rows)]
    return found


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.allclose(one.double(), other.double(), rtol=1e-5, atol=1e-6)


@OTHERS
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_answers_as_ever(name, others):
    torch.manual_seed(0)
    layer, hidden, targets = LAYERS[name](), torch.randn(N, D), torch.randint(V, (N,))
    expected = answers(layer, hidden, targets)
    with settings(**others):
        found = answers(layer, hidden, targets)
    assert_same(found, expected)


@OTHERS
@pytest.mark.parametrize("name", PREVIEWS)
def test_a_screen_answers_as_ever(name, others):
    torch.manual_seed(0)
    weight, hidden = torch.randn(V, D), torch.randn(N, D)

    def make():
        return ScreenedSoftmax(weight, preview=PREVIEWS[name](hidden), candidates=32, exact=True, use="screen")

    before, expected = make(), screened(make(), hidden)
    with settings(**others):
        assert_same(screened(before, hidden), expected)
        assert_same(screened(make(), hidden), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_made_without_memory_is_all_of_it(name):
    """As for a model that is too large to be made twice: on "meta" first, then filled from a state."""
    torch.manual_seed(0)
    full, hidden = LAYERS[name](), torch.randn(3, D)
    with torch.device("meta"):
        layer = LAYERS[name]()
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
    layer = layer.to_empty(device="cpu")
    layer.load_state_dict(full.state_dict())
    answer = "scores" if isinstance(full, OneVsAll) else "log_prob"
    assert torch.allclose(getattr(layer, answer)(hidden), getattr(full, answer)(hidden), atol=1e-6)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "factored"])
def test_a_layer_made_without_memory_starts_again(name):
    """`reset_parameters` draws parameters; clusters, orders and trees are those that it was made for."""
    torch.manual_seed(0)
    full, hidden = LAYERS[name](), torch.randn(3, D)
    with torch.device("meta"):
        layer = LAYERS[name]()
    layer = layer.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(torch.nan)
    layer.reset_parameters()
    for key, buffer in full.named_buffers():
        if key in ("order", "offsets", "nodes"):
            assert torch.equal(layer.get_buffer(key), buffer), key
    if isinstance(full, OneVsAll):
        assert layer.scores(hidden).isfinite().all()
    else:
        assert torch.allclose(layer.log_prob(hidden).exp().sum(1), torch.ones(3))
    for key, parameter in layer.named_parameters():
        spread, like = parameter.std(correction=0), full.get_parameter(key).std(correction=0)
        assert parameter.numel() < 20 or like / 2 <= spread <= 2 * like, key
    assert layer.topk(hidden, 2).indices.shape == (3, 2)


def test_clusters_and_trees_are_made_on_the_cpu():
    torch.manual_seed(0)
    vectors = torch.randn(50, 4)
    expected = by_frequency(COUNTS), by_embedding(vectors, 5), huffman(COUNTS)
    with settings(device="meta"):
        found = by_frequency(COUNTS), by_embedding(vectors, 5), huffman(COUNTS)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
