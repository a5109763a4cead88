"""Negative log-likelihood of a mixture of softmaxes over one matrix, without logits in memory."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lastlayer.functional.checks import integer_ids
from lastlayer.functional.linear_chunks import LinearChunks, linear_logits
from lastlayer.functional.linear_cross_entropy import chunk_losses
from lastlayer.functional.logit_map import LogitMap, bound
from lastlayer.functional.one_pass import one_pass_loss
from lastlayer.functional.precision import exact_dtype, product_dtype
from lastlayer.functional.second_order import Tensors
from lastlayer.kernels.softmax_rows import RowTerms


def mixture_cross_entropy(
    latent: Tensor,  # (N, K, d)
    log_prior: Tensor,  # (N, K), normalised, float32 at least
    weight: Tensor,  # (V, d)
    targets: Tensor,  # (N,) valid classes, of any integer dtype
    *,
    bias: Tensor | None = None,  # (V,)
    logit_map: LogitMap | None = None,
    shares: Tensor | None = None,  # (N,)
) -> Tensor:  # (N,), or () with `shares`
    """`-log Σ_k exp(log_prior[n, k]) softmax(f(weight @ latent[n, k] + bias))[y_n]`, for every row n.

    With `shares` the result is the sum of the row losses times their shares (no gradient for these), and its
    gradients are formed in the forward pass. The N K latent rows are one chunked softmax in which the K rows of an
    example stay together. With `ℓ_nk` their log-probabilities of the target and `r_nk ∝ prior_nk exp ℓ_nk` the
    responsibilities, the gradient of the loss is that of `-Σ_k r_nk (ℓ_nk + log_prior_nk)` at fixed r. So a
    chunk's gradient is formed before r is known, and r scales the rows of the products' narrow factors.
    Nothing is computed twice. Without `shares` the backward pass recomputes the chunks.

    Cost: `6 N K V d` operations. Memory: a chunk of logits, the latent's gradient.
    """
    targets = integer_ids("targets", targets)
    parameters = () if logit_map is None else tuple(logit_map.parameters())
    dtype = product_dtype(latent)
    losses = _MixtureLosses(targets, logit_map, dtype)
    inputs = latent.flatten(0, 1), log_prior.to(exact_dtype(dtype)), weight, bias, *parameters
    return one_pass_loss(losses, inputs, shares, reduced=shares is not None, constants=(targets,))


class _MixtureLosses(NamedTuple):
    """`RowLosses` of latent `(N K, d)`, log_prior, weight, bias and the map's parameters."""

    targets: Tensor  # (N,)
    logit_map: LogitMap | None
    dtype: torch.dtype  # of the products

    def plain(
        self, latent: Tensor, log_prior: Tensor, weight: Tensor, bias: Tensor | None, *parameters: Tensor
    ) -> Tensor:
        """By PyTorch's own operations."""
        _, values = linear_logits(latent, weight, bias, self.logit_map, parameters, self.dtype)
        ids = self.targets.repeat_interleave(log_prior.shape[1])
        at_target = values.log_softmax(1).gather(1, ids[:, None]).reshape(log_prior.shape)
        return -(log_prior + at_target).logsumexp(1)

    def run(
        self, inputs: tuple[Any, ...], shares: Tensor | None, wanted: Sequence[bool] | None
    ) -> tuple[Tensor, Tensors | None]:
        """Chunk by chunk."""
        work = lambda: self._of_chunks(*inputs[:4], shares=shares, wanted=wanted)  # noqa: E731
        return bound(self.logit_map, inputs[4:], work)

    def _of_chunks(
        self,
        latent: Tensor,
        log_prior: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shares: Tensor | None,
        wanted: Sequence[bool] | None,
    ) -> tuple[Tensor, Tensors | None]:
        components = log_prior.shape[1]
        chunks = LinearChunks(latent, weight, bias, self.logit_map, self.dtype, group=components)
        if wanted is not None:
            chunks.want([wanted[0], *wanted[2:]])
        losses, of_prior = log_prior.new_empty(len(log_prior)), torch.empty_like(log_prior)

        def weigh(rows: slice, nll: Tensor) -> Tensor:  # (n,)
            """Writes the losses of some examples, and returns the factors of their rows' gradients."""
            examples = slice(rows.start // components, rows.stop // components)
            joint = log_prior[examples] - nll.reshape(-1, components)
            log_prob = joint.logsumexp(1, keepdim=True)
            losses[examples] = -log_prob[:, 0]
            if shares is None:
                return nll
            # A barred target has no responsible component, and its row no gradient.
            factors = (joint - log_prob.masked_fill(log_prob == -torch.inf, 0)).exp_()
            factors.mul_(shares[examples, None])
            torch.neg(factors, out=of_prior[examples])
            return factors.reshape(-1)

        ids = self.targets.repeat_interleave(components)
        terms = RowTerms(ids, torch.ones_like(ids, dtype=chunks.exact))
        chunk_losses(chunks, terms, form=wanted is not None, weigh=weigh)
        losses = losses if shares is None else losses.mul_(shares)
        if wanted is None:
            return losses, None
        of_latent, *others = chunks.gradients()
        return losses, (of_latent, of_prior if wanted[1] else None, *others)
