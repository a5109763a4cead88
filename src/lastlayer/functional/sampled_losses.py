"""Losses over the logits of the targets and of sampled candidates, in place of those of all classes.

All take, of N rows with K targets and S candidates each,

    target_logits     (N, K)    } with the log counts of their classes subtracted,
    candidate_logits  (N, S)    } where the method has it so
    target_weights    (N, K), 0 where there is no target

and give the loss of every row, `(N,)`. The log counts are the logarithms of how often the sampler draws each class
into one set, on average. A candidate whose logit is -inf does not count.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

SLACK = 1.0  # how far u may lie below the least that a sampled class shows it to be: delta of U-max


def accidental_hits(
    targets: Tensor,  # (N, K)
    target_weights: Tensor,  # (N, K)
    candidates: Tensor,  # (S,) or (N, S)
) -> Tensor:  # (N, S), bool
    """Which candidates are a target of their row."""
    ids = targets.masked_fill(target_weights == 0, -1)
    hits = candidates == ids[:, :1]
    for place in range(1, ids.shape[1]):
        hits |= candidates == ids[:, place : place + 1]
    return hits


def below_peak(
    target_logits: Tensor,  # (N, K)
    candidate_logits: Tensor,  # (N, S)
    target_weights: Tensor,  # (N, K)
) -> tuple[Tensor, Tensor]:
    """Both, less the row's largest: the same softmax, and log counts keep their precision at large logits."""
    present = target_logits.masked_fill(target_weights == 0, -torch.inf)
    peak = torch.cat([present, candidate_logits], 1).detach().amax(1, keepdim=True)
    peak = peak.masked_fill(peak == -torch.inf, 0)  # no class has mass
    return target_logits - peak, candidate_logits - peak


def sampled_softmax_loss(
    target_logits: Tensor,  # (N, K)
    candidate_logits: Tensor,  # (N, S), both corrected
    target_weights: Tensor,  # (N, K)
) -> Tensor:  # (N,)
    """The cross-entropy of a softmax over the row's targets and its candidates."""
    none = target_weights == 0
    logits = torch.cat([target_logits.masked_fill(none, -torch.inf), candidate_logits], 1)
    log_prob = logits.log_softmax(1)[:, : target_logits.shape[1]]
    return -(target_weights * log_prob.masked_fill(none, 0)).sum(1)


def noise_contrastive_loss(
    target_logits: Tensor,  # (N, K)
    candidate_logits: Tensor,  # (N, S), both with the log counts subtracted
    target_weights: Tensor,  # (N, K)
    noise_weights: Tensor | float = 1.0,  # (N,)
) -> Tensor:  # (N,)
    """Logistic regression of data against noise: `-log sigmoid(s)` of targets, `-log sigmoid(-s)` of noise."""
    of_targets = (target_weights * -F.logsigmoid(target_logits.masked_fill(target_weights == 0, 0))).sum(1)
    return of_targets - noise_weights * F.logsigmoid(-candidate_logits).sum(1)


def black_out_loss(
    target_logits: Tensor,  # (N, K)
    candidate_logits: Tensor,  # (N, S), both with the log counts subtracted
    target_weights: Tensor,  # (N, K)
    noise_weights: Tensor | float = 1.0,  # (N,)
) -> Tensor:  # (N,)
    """`-log p` of the targets and `-log(1 - p)` of the candidates, p the softmax over all of them."""
    none = target_weights == 0
    logits = torch.cat([target_logits.masked_fill(none, -torch.inf), candidate_logits], 1)
    log_prob = logits.log_softmax(1)
    of_targets, of_candidates = log_prob.split([target_logits.shape[1], candidate_logits.shape[1]], 1)
    of_targets = -(target_weights * of_targets.masked_fill(none, 0)).sum(1)
    # 1 - p rounds to 0 for the largest p alone: there it is the mass of all others.
    top = log_prob.detach().argmax(1, keepdim=True)
    is_top = torch.zeros_like(log_prob, dtype=torch.bool).scatter_(1, top, True)[:, target_logits.shape[1] :]
    top_is_candidate = is_top.any(1, keepdim=True)
    others = torch.where(top_is_candidate, logits.scatter(1, top, -torch.inf), logits).logsumexp(1)
    of_top = torch.where(top_is_candidate[:, 0], others - logits.logsumexp(1), 0.0)
    of_rest = torch.log1p(-of_candidates.masked_fill(is_top, -torch.inf).exp()).sum(1)
    return of_targets - noise_weights * (of_rest + of_top)


def positive_power(num_samples: int, num_classes: int, calibration: float) -> float:
    """beta of the generalised binary cross-entropy: `t (alpha - 1) + 1` with `alpha = num_samples / (V - 1)`.

    Source: A. Petrov, C. Macdonald, "gSASRec: reducing overconfidence in sequential recommendation trained with
    negative sampling", RecSys 2023.
    """
    rate = min(1.0, num_samples / max(1, num_classes - 1))
    return calibration * (rate - 1) + 1


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
    """The bound on `-log p` that Augment & Reduce and U-max estimate; and the u at which it would be least.

    For a row with logits o and target y, and any number u,

        -log p_y  <=  u + exp(-u) (1 + sum over k != y of exp(o_k - o_y)) - 1        with equality at u = -log p_y

    as `log x <= x / e^u + u - 1` at `x = 1 + sum`. A sample estimates the sum without bias, unlike its logarithm:
    with c_j the expected count of class j in a sample, the mean of `sum over the sample of exp(o_j - o_y) / c_j`
    is the whole sum, and so for its gradient.

    Every exponent is below `SLACK` less a log count where u is at least `least_normalizers` less `SLACK`.
    """
    excess = candidate_logits - target_logits[:, None] - log_counts - normalizers[:, None]
    total = (-normalizers).exp() + excess.exp().sum(1)
    return normalizers + total - 1, (normalizers + total.detach().log())
