"""The norm of the gradient of `FactoredOutput`'s weight, which is never made."""

from lastlayer.kernels.factored_gradient import FactoredGradient
from lastlayer.kernels.factored_update import sparse_overlap


def gradient_norm(gradient: FactoredGradient, num_classes: int) -> float:
    """`||dL/dW||_F`, exact: the sum of `(G G^T) o (H H^T)`, in float64."""
    hidden = gradient.hidden.double()
    overlap = hidden @ hidden.T
    weighted = overlap @ (2 * gradient.norm.double()[:, None] * hidden)
    targets = sparse_overlap(gradient.ids, gradient.target, gradient.total, num_classes).double()
    square = (weighted * gradient.both.double()).sum() + (targets * overlap).sum()
    return float(square.clamp(min=0).sqrt())
