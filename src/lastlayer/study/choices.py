"""The layers by the names that the command line knows them by; a new one is one entry."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from torch import Tensor

from lastlayer.functional import clusters
from lastlayer.functional.normalizers import Entmax, Sparsemax, TopKSoftmax
from lastlayer.functional.spherical import SphericalSoftmax
from lastlayer.layers.adaptive import AdaptiveSoftmax
from lastlayer.layers.base import OutputLayer
from lastlayer.layers.factored import FactoredOutput
from lastlayer.layers.full import FullSoftmax
from lastlayer.layers.hierarchical import HierarchicalSoftmax
from lastlayer.layers.mixture import MixtureOfSoftmaxes
from lastlayer.layers.one_vs_all import OneVsAll
from lastlayer.layers.plif import PLIF
from lastlayer.layers.sampled.black_out import BlackOut
from lastlayer.layers.sampled.negative_sampling import NegativeSampling
from lastlayer.layers.sampled.noise_contrastive import NoiseContrastive
from lastlayer.layers.sampled.sampled_softmax import SampledSoftmax
from lastlayer.layers.sampled.unbiased import AugmentReduce, UMax
from lastlayer.layers.samplers.base import Sampler
from lastlayer.layers.samplers.log_uniform import LogUniform
from lastlayer.layers.samplers.unigram import Unigram
from lastlayer.layers.sigsoftmax import Sigsoftmax
from lastlayer.layers.tree import TreeSoftmax
from lastlayer.study.errors import StudyError, UsageError


@dataclass(frozen=True)
class Choice:
    """A layer as `compare` and `bench` make it.

    Args:
        description: one line for a reader who does not know it.
        build: `build(in_features, counts (V,))` gives the layer; `counts` fall, as ids are sorted by frequency.
        per_example: whether the layer keeps a number for each training example; `build` then takes `num_examples`
            as well, None to keep nothing.
        logits: how many float32 `(N, V)` tensors a training step holds at once; 0 where it never holds all logits.
        package: an optional package that it needs, and the extra of lastlayer that installs it.
    """

    description: str
    build: Callable[..., OutputLayer]
    per_example: bool = False
    logits: int = 0
    package: str | None = None

    @property
    def installed(self) -> bool:
        """Whether the package that it needs is there."""
        return self.package is None or find_spec(self.package) is not None


def _adaptive(in_features: int, counts: Tensor) -> OutputLayer:
    """With the default cut-offs, and tails as narrow as `in_features` permits.

    `AdaptiveSoftmax.cutoffs_for` finds the fastest cut-offs by measuring this machine; a run and its resumption
    need the same ones, and a larger head predicts better.
    """
    div_value = 4.0 if in_features >= 16 else 2.0 if in_features >= 4 else 1.0
    return AdaptiveSoftmax(in_features, len(counts), div_value=div_value)


def _sampled(
    layer: Callable[..., OutputLayer], sampler: Callable[[Tensor], Sampler]
) -> Callable[..., OutputLayer]:
    """`build` of a layer that draws 1,024 classes by the sampler of these counts."""

    def build(in_features: int, counts: Tensor, **per_example: int | None) -> OutputLayer:
        settings = {"sampler": sampler(counts), "num_samples": _num_samples(counts), "sparse": True}
        return layer(in_features, len(counts), **settings, **per_example)

    return build


def _unigram(power: float) -> Callable[[Tensor], Unigram]:
    return lambda counts: Unigram(counts.clamp(min=1), power)


def _log_uniform(replacement: bool = True) -> Callable[[Tensor], LogUniform]:
    return lambda counts: LogUniform(len(counts), replacement=replacement)


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
    "sampled": Choice(
        "softmax over the target and 1,024 sampled classes",
        _sampled(SampledSoftmax, _log_uniform(replacement=False)),
    ),
    "nce": Choice(
        "logistic regression of the target against 1,024 classes of noise",
        _sampled(NoiseContrastive, _unigram(1.0)),
    ),
    "negative-sampling": Choice(
        "word2vec's loss, with 1,024 negatives", _sampled(NegativeSampling, _unigram(0.75))
    ),
    "blackout": Choice("discriminative softmax over 1,024 sampled classes", _sampled(BlackOut, _unigram(0.4))),
    "umax": Choice(
        "1,024 sampled classes and a number kept for each training example: no bias where that number is right",
        _sampled(UMax, _log_uniform()),
        per_example=True,
    ),
    "augment-reduce": Choice(
        "the same, with a running average as the number of each example",
        _sampled(AugmentReduce, _log_uniform()),
        per_example=True,
    ),
    "umax-exact": Choice(
        "1,024 sampled classes and each row's exact normaliser, which reads all logits",
        _sampled(UMax, _log_uniform()),
    ),
    "one-vs-all": Choice("a sigmoid for each class", lambda d, counts: OneVsAll(d, len(counts))),
    "one-vs-sampled": Choice(
        "a sigmoid for each class, with 1,024 sampled negatives", _sampled(OneVsAll, _unigram(0.5))
    ),
    "sparsemax": Choice(
        "exact, and most classes have probability 0",
        lambda d, counts: FullSoftmax(d, len(counts), normalizer=Sparsemax()),
        logits=32,
        package="entmax",
    ),
    "entmax": Choice(
        "exact, between softmax and sparsemax (alpha 1.5): many classes have probability 0",
        lambda d, counts: FullSoftmax(d, len(counts), normalizer=Entmax(1.5)),
        logits=32,
        package="entmax",
    ),
    "topk-softmax": Choice(
        "softmax of the 1,024 largest logits; all other classes have probability 0",
        lambda d, counts: FullSoftmax(d, len(counts), normalizer=TopKSoftmax(_num_samples(counts))),
        logits=8,
    ),
}

DEFAULT_LAYERS = "full,hierarchical,adaptive"


def choose(names: str) -> list[str]:
    """The names in a comma-separated list, each once, in its order.

    Raises:
        UsageError: a name that is not known (it lists those that are), or none.
        StudyError: a layer whose package is not installed; says what to install.
    """
    chosen = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    unknown = [name for name in chosen if name not in CHOICES]
    if unknown or not chosen:
        problem = f"there is no layer {unknown[0]!r}" if unknown else "no layer was named"
        raise UsageError(f"{problem}; the layers are: {', '.join(CHOICES)}")
    for name in chosen:
        if not CHOICES[name].installed:
            package = CHOICES[name].package
            raise StudyError(f"{name} needs the {package} package: pip install 'lastlayer[{package}]'")
    return chosen


def installed() -> list[str]:
    """All names but those of layers whose package is missing."""
    return [name for name, choice in CHOICES.items() if choice.installed]


def build_layer(name: str, in_features: int, counts: Tensor, num_examples: int | None = None) -> OutputLayer:
    """The layer called `name` for classes that occur `counts (V,)` times.

    With `num_examples` a layer that keeps a number for each training example does so.
    """
    choice = CHOICES[name]
    more = {"num_examples": num_examples} if choice.per_example else {}
    return choice.build(in_features, counts, **more)
