"""Output layers for very many classes: train them without computing every logit, query them without
reading every weight."""

from lastlayer import functional, metrics
from lastlayer.functional import clusters
from lastlayer.functional.logit_map import LogitMap
from lastlayer.functional.normalizers import Entmax, Normalizer, Sparsemax, TopKSoftmax
from lastlayer.functional.results import ScoreTopK, ScreenedTopK, TopK
from lastlayer.functional.spherical import SphericalSoftmax, SquaredError, TaylorSoftmax, ZLoss
from lastlayer.kernels.config import show_config
from lastlayer.layers.adaptive import AdaptiveSoftmax
from lastlayer.layers.base import OutputLayer
from lastlayer.layers.factored import FactoredOutput, FactoredSGD
from lastlayer.layers.full import FullSoftmax
from lastlayer.layers.hierarchical import HierarchicalSoftmax
from lastlayer.layers.mixture import MixtureOfSoftmaxes
from lastlayer.layers.monotone_network import MonotoneNetwork
from lastlayer.layers.one_vs_all import OneVsAll
from lastlayer.layers.plif import PLIF
from lastlayer.layers.sampled.black_out import BlackOut
from lastlayer.layers.sampled.negative_sampling import NegativeSampling
from lastlayer.layers.sampled.noise_contrastive import NoiseContrastive
from lastlayer.layers.sampled.sampled_softmax import SampledSoftmax
from lastlayer.layers.sampled.unbiased import AugmentReduce, UMax
from lastlayer.layers.samplers.base import Candidates, Sampler
from lastlayer.layers.samplers.in_batch import InBatch
from lastlayer.layers.samplers.independent import Uniform
from lastlayer.layers.samplers.log_uniform import LogUniform
from lastlayer.layers.samplers.mixed import Mixed
from lastlayer.layers.samplers.quadratic_kernel import QuadraticKernel
from lastlayer.layers.samplers.random_fourier import RandomFourier
from lastlayer.layers.samplers.unigram import Unigram
from lastlayer.layers.sigsoftmax import Sigsoftmax
from lastlayer.layers.soft_cap import SoftCap
from lastlayer.layers.tree import TreeSoftmax
from lastlayer.screening import Int4Preview, Int8Preview, ScreenedSoftmax, SVDPreview, SVDSoftmax, choose_screen
from lastlayer.study.measuring.rank import Rank, rank
from lastlayer.version import __version__ as __version__

__all__ = [
    "OutputLayer",
    "TopK",
    "ScreenedTopK",
    "ScoreTopK",
    "FullSoftmax",
    "HierarchicalSoftmax",
    "FactoredOutput",
    "FactoredSGD",
    "SquaredError",
    "SphericalSoftmax",
    "TaylorSoftmax",
    "ZLoss",
    "AdaptiveSoftmax",
    "TreeSoftmax",
    "MixtureOfSoftmaxes",
    "SampledSoftmax",
    "NoiseContrastive",
    "NegativeSampling",
    "BlackOut",
    "AugmentReduce",
    "UMax",
    "OneVsAll",
    "Sampler",
    "Candidates",
    "Uniform",
    "LogUniform",
    "Unigram",
    "InBatch",
    "Mixed",
    "QuadraticKernel",
    "RandomFourier",
    "Normalizer",
    "Entmax",
    "Sparsemax",
    "TopKSoftmax",
    "LogitMap",
    "SoftCap",
    "Sigsoftmax",
    "PLIF",
    "MonotoneNetwork",
    "ScreenedSoftmax",
    "SVDPreview",
    "Int4Preview",
    "Int8Preview",
    "choose_screen",
    "SVDSoftmax",
    "clusters",
    "functional",
    "metrics",
    "show_config",
    "rank",
    "Rank",
]
