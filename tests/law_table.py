"""The table of layers under the law suite; one line a case."""

import torch
from torch import nn

from lastlayer import (
    PLIF,
    AdaptiveSoftmax,
    AugmentReduce,
    BlackOut,
    Entmax,
    FactoredOutput,
    FullSoftmax,
    HierarchicalSoftmax,
    MixtureOfSoftmaxes,
    MonotoneNetwork,
    NegativeSampling,
    NoiseContrastive,
    QuadraticKernel,
    SampledSoftmax,
    Sigsoftmax,
    SoftCap,
    Sparsemax,
    SphericalSoftmax,
    TaylorSoftmax,
    TopKSoftmax,
    TreeSoftmax,
    Uniform,
    Unigram,
)
from lastlayer.testing import LayerCase
from oracles import (
    adaptive_softmax,
    entmax,
    entmax_loss,
    factored_softmax,
    full_softmax,
    full_softmax_loss,
    hierarchical_softmax,
    mixture_of_softmaxes,
    tree_softmax,
)


def full(name, in_features, num_classes, loss_oracle=None, logit_map=lambda: None, **options):
    """A row for `FullSoftmax`."""

    def make(**kwargs):
        return FullSoftmax(in_features, num_classes, logit_map=logit_map(), **options, **kwargs)

    return LayerCase(f"full-{name}", make=make, oracle=full_softmax, loss_oracle=loss_oracle)


def mixture(name, *sizes, logit_map=lambda: None, **options):
    """A row for `MixtureOfSoftmaxes`."""

    def make(**kwargs):
        return MixtureOfSoftmaxes(*sizes, logit_map=logit_map(), **options, **kwargs)

    return LayerCase(f"mixture-{name}", make=make, oracle=mixture_of_softmaxes)


def near_zero(layer):
    """Parameters so small that no class of a row has probability 0, where -inf would have no differences."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in layer.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_((0.02 * noise).to(parameter))


def entmax_case(name, normalizer):
    """A row for `FullSoftmax` with an `Entmax`, whose zeros have tests of their own."""

    def make(**kwargs):
        return FullSoftmax(4, 7, normalizer=normalizer(), **kwargs)

    return LayerCase(f"full-{name}", make=make, oracle=entmax, loss_oracle=entmax_loss, spread=near_zero)


def tied(**kwargs):
    """A `FullSoftmax` on the weight of an embedding."""
    of_embedding = {name: kwargs.pop(name) for name in ("device", "dtype") if name in kwargs}
    return FullSoftmax(6, 13, weight=nn.Embedding(13, 6, **of_embedding).weight, **kwargs)


def hierarchical(name, num_classes, clusters=None, **options):
    """A row for `HierarchicalSoftmax`."""
    ids = None if clusters is None else torch.tensor(clusters)

    def make(**kwargs):
        return HierarchicalSoftmax(4, num_classes, clusters=ids, **options, **kwargs)

    return LayerCase(f"hierarchical-{name}", make=make, oracle=hierarchical_softmax)


def spread_weight(layer):
    """A weight that is state, not a parameter, away from special values; in `eval()` no step is recorded."""
    generator = torch.Generator().manual_seed(7)
    shape = (layer.num_classes, layer.in_features)
    weight = 0.4 * torch.randn(shape, generator=generator, dtype=torch.float64)
    bias = 0.4 * torch.randn(shape[0], generator=generator, dtype=torch.float64) if layer.has_bias else None
    layer.set_weight(weight, bias)
    layer.eval()


def fill_weight(layer, value):
    """Every entry of weight and bias one number."""
    layer.set_weight(
        torch.full_like(layer.weight, value), torch.full_like(layer.bias, value) if layer.has_bias else None
    )


def factored(name, in_features, num_classes, loss, **options):
    """A row for `FactoredOutput`, whose steps have tests of their own."""

    def make(**kwargs):
        return FactoredOutput(in_features, num_classes, loss=loss, **options, **kwargs)

    return LayerCase(
        f"factored-{name}", make=make, oracle=factored_softmax, spread=spread_weight, fill=fill_weight
    )


def adaptive(name, num_classes, cutoffs, **options):
    """A row for `AdaptiveSoftmax`."""

    def make(**kwargs):
        return AdaptiveSoftmax(6, num_classes, cutoffs, div_value=2.0, **options, **kwargs)

    return LayerCase(f"adaptive-{name}", make=make, oracle=adaptive_softmax)


def adaptive_tied(**kwargs):
    """An `AdaptiveSoftmax` whose head is an embedding's."""
    of_embedding = {name: kwargs.pop(name) for name in ("device", "dtype") if name in kwargs}
    weight = nn.Embedding(11, 4, **of_embedding).weight
    return AdaptiveSoftmax(4, 11, [3, 7], div_value=2.0, weight=weight, counts=SHUFFLED[:11], **kwargs)


def tree(name, counts, **options):
    """A row for `TreeSoftmax`."""

    def make(**kwargs):
        return TreeSoftmax(4, len(counts), counts=torch.tensor(counts), **options, **kwargs)

    return LayerCase(f"tree-{name}", make=make, oracle=tree_softmax)


def sampled(name, layer_class, sampler, num_samples, in_features=5, num_classes=13, **options):
    """A row for a sampled layer, whose losses have tests of their own: once trained it is a full softmax."""

    def make(**kwargs):
        return layer_class(in_features, num_classes, sampler(), num_samples, **options, **kwargs)

    return LayerCase(f"sampled-{name}", make=make, oracle=full_softmax, likelihood=False)


SHUFFLED = torch.tensor([3.0, 0, 9, 1, 5, 5, 2, 8, 0, 7, 4, 6, 1])

CASES: list[LayerCase] = [
    full("plain", 5, 23),
    full("no-bias", 8, 16, bias=False),
    full("one-class", 3, 1),
    full("soft-cap", 5, 11, logit_map=lambda: SoftCap(2.0)),
    full(
        "every-option",
        4,
        17,
        full_softmax_loss,
        class_weights=torch.linspace(0.2, 2.0, 17),
        label_smoothing=0.15,
        z_loss=0.01,
        logit_map=lambda: SoftCap(3.0),
    ),
    full("smooth", 4, 9, full_softmax_loss, label_smoothing=0.3),
    full("z-loss", 4, 9, full_softmax_loss, z_loss=0.1),
    full("sigsoftmax", 4, 13, logit_map=lambda: Sigsoftmax()),
    full("plif", 3, 11, logit_map=lambda: PLIF(7, 2.0, init_std=1.0)),
    full("monotone-network", 3, 11, logit_map=lambda: MonotoneNetwork(4)),
    entmax_case("sparsemax", lambda: Sparsemax()),
    entmax_case("entmax", lambda: Entmax(1.5)),
    full("top-k", 4, 9, normalizer=TopKSoftmax(9)),  # of all classes: where some are left out is tested elsewhere
    mixture("plain", 5, 13, 3),
    mixture("one-component", 4, 9, 1, latent_features=3),
    mixture("context-free", 3, 11, 4, context_prior=False, bias=False, latent_features=5),
    mixture("mapped", 3, 7, 2, logit_map=lambda: PLIF(6, 2.0, init_std=1.0)),
    LayerCase("full-tied", make=tied, oracle=full_softmax),
    hierarchical("even", 16),
    hierarchical("odd", 23),
    hierarchical("ragged", 13, [2, 0, 1, 1, 0, 1, 3, 1, 1, 0, 1, 3, 1], sparse=True),
    hierarchical("one-class", 1),
    hierarchical("one-cluster", 9, [0] * 9),
    hierarchical("own-clusters", 5, [3, 1, 0, 4, 2], sparse=True),
    hierarchical("sparse", 20, sparse=True),
    hierarchical("no-bias", 20, bias=False),
    hierarchical("sparse-no-bias", 11, sparse=True, bias=False),
    factored("spherical", 5, 23, SphericalSoftmax()),
    factored("spherical-bias", 4, 9, SphericalSoftmax(epsilon=0.3), bias=True),
    factored("spherical-one-class", 3, 1, SphericalSoftmax()),
    factored("taylor", 6, 16, TaylorSoftmax()),
    factored("taylor-bias", 3, 11, TaylorSoftmax(), bias=True),
    adaptive("two-tails", 17, [4, 9]),
    adaptive("head-bias", 12, [5], head_bias=True),
    adaptive("one-class-parts", 4, [1, 2], head_bias=True),
    adaptive("counts", 13, [3, 8], counts=SHUFFLED),
    LayerCase("adaptive-tied", make=adaptive_tied, oracle=adaptive_softmax),
    tree("huffman", [3, 0, 9, 1, 5, 5, 2, 8, 0, 7, 4, 6, 1]),
    tree("chain", [1, 2, 4, 8, 16, 32, 64], sparse=True),
    tree("given", [1] * 4, tree=torch.tensor([[6, 2], [0, 4], [3, 1]])),
    tree("two-classes", [4, 1], sparse=True),
    tree("one-class", [3]),
    sampled("softmax", SampledSoftmax, lambda: Uniform(13, replacement=False), 6),
    sampled("softmax-sparse", SampledSoftmax, lambda: Unigram(SHUFFLED + 1), 6, sparse=True),
    sampled("softmax-kernel", SampledSoftmax, lambda: QuadraticKernel(13, 5), 3, sparse=True, bias=False),
    sampled("softmax-one-class", SampledSoftmax, lambda: Uniform(1), 2, num_classes=1),
    sampled("noise-contrastive", NoiseContrastive, lambda: Unigram(SHUFFLED + 1), 6, sparse=True),
    sampled("negative-sampling", NegativeSampling, lambda: Uniform(13, shared=False), 4, calibration=0.5),
    sampled("augment-reduce", AugmentReduce, lambda: Uniform(13), 6, sparse=True),
    sampled("black-out", BlackOut, lambda: Unigram(SHUFFLED + 1, power=0.4), 6, sparse=True),
]
