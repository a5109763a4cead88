"""Mixture of softmaxes (Yang et al. 2018): several softmaxes over one matrix, mixed by the context."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lastlayer.functional.checks import check_fraction, check_positive, eager_on_cpu
from lastlayer.functional.linear_chunks import mapped_logits
from lastlayer.functional.linear_statistics import linear_score
from lastlayer.functional.logit_map import LogitMap, barred_classes
from lastlayer.functional.mixture_cross_entropy import mixture_cross_entropy
from lastlayer.functional.precision import as_exact
from lastlayer.functional.reduce import row_shares
from lastlayer.layers.base import OutputLayer
from lastlayer.layers.parts import draw, map_beside, tied_or_new


class MixtureOfSoftmaxes(OutputLayer):
    """`P(c | h) = Σ_k π_k(h) softmax(f(weight @ g_k(h) + bias))_c`, of a rank that no single softmax reaches.

    With K components, `π = softmax(prior(h))`, `g_k(h) = tanh(latent(h))_k` with dropout, and f the `logit_map`,
    or nothing. All is in log space: no floor is added to probabilities. One component equals `FullSoftmax` on its
    latent.

    Cost of a training step: K times that of `FullSoftmax`, `6 N K V d` operations. Memory: that of `FullSoftmax`
    and the N K latent rows with their gradients; the usual implementation holds several `(N, K, V)` tensors.
    `topk` and `log_prob` compute all K V logits, a chunk of rows at a time in `topk`;
    `ScreenedSoftmax.from_layer(layer, ...)` computes the same from one preview of the weight.

    Not where time matters: a wider softmax with as many parameters costs less, and in the replication
    of Parthiban, Mao and Inkpen (AAAI 2021) tied with the mixture on Penn Treebank.

    Args:
        in_features: the width of `hidden`.
        num_classes: V.
        num_components: K.
        latent_features: d, the width of the latents and of `weight`; `in_features` if not given.
        dropout: of the latents, in training.
        context_prior: whether the prior depends on the hidden state, or is one for all.
        bias: whether there is a bias for each class, shared by the components.
        weight: an `nn.Parameter (V, d)` to use instead of a new one: tied.
        logit_map: an increasing function of one logit, in every component.
        reduction, ignore_index, device, dtype: as in every `OutputLayer`.

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong kind.

    Source: Yang, Dai, Salakhutdinov, Cohen, "Breaking the Softmax Bottleneck", ICLR 2018.

    >>> import torch, lastlayer
    >>> layer = lastlayer.MixtureOfSoftmaxes(16, 1000, 4, latent_features=8)
    >>> hidden, targets = torch.randn(5, 16), torch.randint(1000, (5,))
    >>> layer(hidden, targets).backward()
    >>> layer.topk(hidden, 3).indices.shape
    torch.Size([5, 3])
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        num_components: int,
        *,
        latent_features: int | None = None,
        dropout: float = 0.0,
        context_prior: bool = True,
        bias: bool = True,
        weight: nn.Parameter | None = None,
        logit_map: LogitMap | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, reduction=reduction, ignore_index=ignore_index)
        self.num_components = check_positive("num_components", num_components)
        width = in_features if latent_features is None else check_positive("latent_features", latent_features)
        self.latent_features = width
        self.dropout = check_fraction("dropout", dropout)
        self.weight = tied_or_new(weight, (self.num_classes, width), device, dtype)
        made = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.bias = nn.Parameter(torch.zeros(self.num_classes, **made)) if bias else None
        self.latent = nn.Linear(in_features, num_components * width, **made)
        self.prior = nn.Linear(in_features, num_components, bias=False, **made) if context_prior else None
        self.prior_logits = None if context_prior else nn.Parameter(torch.zeros(num_components, **made))
        self.logit_map = map_beside(logit_map, self.weight)

    def reset_parameters(self) -> None:
        """Draws weight (a tied one too), latents and prior anew, as `nn.Linear`; biases and prior logits are 0."""
        draw(self.weight, self.latent_features)
        self.latent.reset_parameters()
        if self.prior is not None:
            self.prior.reset_parameters()
        for parameter in (self.bias, self.prior_logits):
            if parameter is not None:
                nn.init.zeros_(parameter)
        if self.logit_map is not None:
            self.logit_map.reset_parameters()

    def latents(
        self,
        hidden: Tensor,  # (..., in_features)
    ) -> Tensor:  # (..., K, latent_features)
        """The hidden state of each component."""
        latents = F.dropout(torch.tanh(self.latent(hidden)), self.dropout, self.training)
        return latents.unflatten(-1, (self.num_components, self.latent_features))

    def log_prior(
        self,
        hidden: Tensor,  # (..., in_features)
    ) -> Tensor:  # (..., K)
        """The log of each component's share, float32 at least."""
        if self.prior is not None:
            return as_exact(self.prior(hidden)).log_softmax(-1)
        assert self.prior_logits is not None  # one of the two is not None
        return as_exact(self.prior_logits).log_softmax(-1).expand(*hidden.shape[:-1], -1)

    def _parameter_shapes(self) -> Iterable[tuple[str, Tensor | None, tuple[int, ...]]]:
        latents = self.num_components * self.latent_features
        yield "weight", self.weight, (self.num_classes, self.latent_features)
        yield "bias", self.bias, (self.num_classes,)
        yield "latent.weight", self.latent.weight, (latents, self.in_features)
        yield "latent.bias", self.latent.bias, (latents,)
        yield "prior_logits", self.prior_logits, (self.num_components,)
        if self.prior is not None:
            yield "prior.weight", self.prior.weight, (self.num_components, self.in_features)

    def _loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        if self.reduction == "none":
            return super()._loss(hidden, targets)
        kept = targets != self.ignore_index
        if eager_on_cpu(targets) and not bool(kept.all()):  # ignored rows cost nothing
            at = kept.nonzero().squeeze(1)
            hidden, targets, kept = (part.index_select(0, at) for part in (hidden, targets, kept))
        log_prior = self.log_prior(hidden)
        shares, lacking = row_shares(kept, self.reduction, log_prior.dtype)
        return self._nll(hidden, log_prior, targets.masked_fill(~kept, 0), shares) + lacking

    def _nll(self, hidden: Tensor, log_prior: Tensor, targets: Tensor, shares: Tensor | None = None) -> Tensor:
        return mixture_cross_entropy(
            self.latents(hidden),
            log_prior,
            self.weight,
            targets,
            bias=self.bias,
            logit_map=self.logit_map,
            shares=shares,
        )

    def _log_prob(self, hidden: Tensor) -> Tensor:
        latents, log_prior = self.latents(hidden), self.log_prior(hidden)
        total, barred = None, barred_classes(self.bias)
        for latent, share in zip(latents.unbind(1), log_prior.unbind(1), strict=True):
            logits = mapped_logits(latent, self.weight, self.bias, self.logit_map)
            part = logits.log_softmax(-1) + share[:, None]
            if barred is not None:
                part = part.masked_fill(barred, 0)  # of two -inf, logaddexp has no gradient
            total = part if total is None else torch.logaddexp(total, part)
        assert total is not None  # there is at least one component
        return total if barred is None else total.masked_fill(barred, -torch.inf)

    def _target_log_prob(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return -self._nll(hidden, self.log_prior(hidden), targets)

    def _score(self, hidden: Tensor, ids: Tensor) -> Tensor:
        K = self.num_components
        latents = self.latents(hidden).flatten(0, 1)
        inside = linear_score(
            latents, self.weight, ids.repeat_interleave(K, 0), bias=self.bias, logit_map=self.logit_map
        )
        joint = inside.unflatten(0, (hidden.shape[0], K)) + self.log_prior(hidden)[:, :, None]
        absent = joint.detach().amax(1) == -torch.inf  # of -inf alone, logsumexp has no gradient
        return joint.masked_fill(absent[:, None], 0).logsumexp(1).masked_fill(absent, -torch.inf)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_components={self.num_components}, dropout={self.dropout:g}"
