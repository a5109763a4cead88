"""The layers by the names that the command line knows them by; a new one is one entry."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lastlayer.functional import clusters
from lastlayer.functional.spherical import SphericalSoftmax
from lastlayer.layers.adaptive import AdaptiveSoftmax
from lastlayer.layers.base import OutputLayer
from lastlayer.layers.factored import FactoredOutput
from lastlayer.layers.full import FullSoftmax
from lastlayer.layers.hierarchical import HierarchicalSoftmax
from lastlayer.layers.mixture import MixtureOfSoftmaxes
from lastlayer.layers.plif import PLIF
from lastlayer.layers.sampled.black_out import BlackOut
from lastlayer.layers.sampled.negative_sampling import NegativeSampling
from lastlayer.layers.sampled.noise_contrastive import NoiseContrastive
from lastlayer.layers.sampled.sampled_softmax import SampledSoftmax
from lastlayer.layers.sampled.u_max import UMax
from lastlayer.layers.samplers.log_uniform import LogUniform
from lastlayer.layers.samplers.unigram import Unigram
from lastlayer.layers.sigsoftmax import Sigsoftmax
from lastlayer.layers.tree import TreeSoftmax
from lastlayer.study.errors import UsageError


@dataclass(frozen=True)
class Choice:
    """A layer as `compare` and `bench` make it.

    Args:
        description: one line for a reader who does not know it.
        build: `build(in_features, counts (V,))` gives the layer; `counts` fall, as ids are sorted by frequency.
    """

    description: str
    build: Callable[[int, Tensor], OutputLayer]


def _adaptive(in_features: int, counts: Tensor) -> OutputLayer:
    """With the default cut-offs, and tails as narrow as `in_features` permits.

    `AdaptiveSoftmax.cutoffs_for` finds the fastest cut-offs by measuring this machine; a run and its resumption
    need the same ones, and a larger head predicts better.
    """
    div_value = 4.0 if in_features >= 16 else 2.0 if in_features >= 4 else 1.0
    return AdaptiveSoftmax(in_features, len(counts), div_value=div_value)


def _sampled(in_features: int, counts: Tensor) -> OutputLayer:
    sampler = LogUniform(len(counts), replacement=False)
    return SampledSoftmax(in_features, len(counts), sampler, _num_samples(counts), sparse=True)


def _nce(in_features: int, counts: Tensor) -> OutputLayer:
    return NoiseContrastive(in_features, len(counts), _unigram(counts, 1.0), _num_samples(counts), sparse=True)


def _negative_sampling(in_features: int, counts: Tensor) -> OutputLayer:
    return NegativeSampling(in_features, len(counts), _unigram(counts, 0.75), _num_samples(counts), sparse=True)


def _blackout(in_features: int, counts: Tensor) -> OutputLayer:
    return BlackOut(in_features, len(counts), _unigram(counts, 0.4), _num_samples(counts), sparse=True)


def _umax(in_features: int, counts: Tensor) -> OutputLayer:
    """Without a state of the examples: each row's own normaliser is computed, from all logits."""
    return UMax(in_features, len(counts), LogUniform(len(counts)), _num_samples(counts), sparse=True)


def _unigram(counts: Tensor, power: float) -> Unigram:
    return Unigram(counts.clamp(min=1), power)


def _num_samples(counts: Tensor) -> int:
    """1,024, or of few classes a quarter."""
    return min(1024, max(1, len(counts) // 4))


CHOICES: dict[str, Choice] = {
    "full": Choice("exact softmax over all classes", lambda d, counts: FullSoftmax(d, len(counts))),
    "hierarchical": Choice(
        "a cluster, then a class inside it",
        lambda d, counts: HierarchicalSoftmax(d, len(counts), clusters=clusters.by_frequency(counts), sparse=True),
    ),
    "sigsoftmax": Choice(
        "exact softmax of x + log sigmoid(x)",
        lambda d, counts: FullSoftmax(d, len(counts), logit_map=Sigsoftmax()),
    ),
    "plif": Choice(
        "exact softmax of a learned increasing function of each logit",
        lambda d, counts: FullSoftmax(d, len(counts), logit_map=PLIF()),
    ),
    "mixture": Choice(
        "five softmaxes over one matrix, mixed by the context",
        lambda d, counts: MixtureOfSoftmaxes(d, len(counts), 5),
    ),
    "adaptive": Choice("frequent classes in the head, rare ones in narrow tails", _adaptive),
    "tree": Choice(
        "a walk down a binary tree", lambda d, counts: TreeSoftmax(d, len(counts), counts=counts, sparse=True)
    ),
    "factored": Choice(
        "spherical softmax, its exact SGD step at a cost without V",
        lambda d, counts: FactoredOutput(d, len(counts), loss=SphericalSoftmax()),
    ),
    "sampled": Choice("softmax over the target and 1,024 sampled classes", _sampled),
    "nce": Choice("the target told from 1,024 classes of noise", _nce),
    "negative-sampling": Choice("word2vec's loss, with 1,024 negatives", _negative_sampling),
    "blackout": Choice("discriminative softmax over 1,024 sampled classes", _blackout),
    "umax": Choice("1,024 sampled classes and the exact normaliser: the softmax's gradient without bias", _umax),
}

DEFAULT_LAYERS = "full,hierarchical,adaptive"


def choose(names: str) -> list[str]:
    """The names in a comma-separated list, each once, in its order.

    Raises:
        UsageError: a name that is not known (it lists those that are), or none.
    """
    chosen = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    unknown = [name for name in chosen if name not in CHOICES]
    if unknown or not chosen:
        problem = f"there is no layer {unknown[0]!r}" if unknown else "no layer was named"
        raise UsageError(f"{problem}; the layers are: {', '.join(CHOICES)}")
    return chosen


def build_layer(name: str, in_features: int, counts: Tensor) -> OutputLayer:
    """The layer called `name` for classes that occur `counts (V,)` times."""
    return CHOICES[name].build(in_features, counts)
