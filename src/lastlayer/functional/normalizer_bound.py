"""The bound on a row's negative log-probability that Augment & Reduce and U-max estimate without bias.

For a row with logits o and target y, and any number u,

    -log p_y  <=  u + exp(-u) (1 + sum over k != y of exp(o_k - o_y)) - 1        with equality at u = -log p_y

as `log x <= x / e^u + u - 1` at `x = 1 + sum`. Unlike the logarithm of the sum, the sum itself is what a sample
estimates without bias: with c_j the expected count of class j in a sample, the mean of `sum over the sample of
exp(o_j - o_y) / c_j` is the whole sum, and that of its gradient is the sum's gradient.
"""

from torch import Tensor
from torch.nn import functional as F

SLACK = 1.0  # how far u may lie below the least that a sampled class shows it to be: delta of U-max


def least_normalizers(
    target_logits: Tensor,  # (N,)
    candidate_logits: Tensor,  # (N, S), -inf at candidates that do not count
) -> Tensor:  # (N,)
    """`log(1 + exp(o_j - o_y))` of the best candidate j: `-log p_y` is at least that."""
    return F.softplus(candidate_logits.amax(1) - target_logits)


def normalizer_bound(
    target_logits: Tensor,  # (N,)
    candidate_logits: Tensor,  # (N, S), -inf at candidates that do not count
    log_counts: Tensor,  # (S,) or (N, S), of the candidates
    normalizers: Tensor,  # (N,), u
) -> tuple[Tensor, Tensor]:  # (N,) each
    """The estimated bound; and the estimate of `log(1 + sum)`, the u at which it would be least.

    Every exponent is below `SLACK` less a log count where u is at least `least_normalizers` less `SLACK`.
    """
    excess = candidate_logits - target_logits[:, None] - log_counts - normalizers[:, None]
    total = (-normalizers).exp() + excess.exp().sum(1)
    return normalizers + total - 1, (normalizers + total.detach().log())
