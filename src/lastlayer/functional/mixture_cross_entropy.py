"""Negative log-likelihood of a mixture of softmaxes over one matrix, without logits in memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lastlayer.functional.checks import integer_ids
from lastlayer.functional.linear_chunks import Gradients, LinearChunks, Wanted
from lastlayer.functional.linear_twin import linear_logits
from lastlayer.functional.logit_map import LogitMap, bound
from lastlayer.functional.ordinary import eager_on_cpu, ordinary
from lastlayer.functional.precision import exact_dtype, no_autocast, product_dtype
from lastlayer.functional.second_order import HandWritten, gradients
from lastlayer.kernels.backends import softmax_rows_backend_for
from lastlayer.kernels.softmax_rows import NO_MAP, RowTerms, fused, plain


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
    dtype, targets = product_dtype(latent), integer_ids("targets", targets)
    parameters = () if logit_map is None else tuple(logit_map.parameters())
    rows, log_prior = latent.flatten(0, 1), log_prior.to(exact_dtype(dtype))
    if not ordinary(rows, log_prior, weight, bias, targets, *parameters):
        return _twin(targets, shares, logit_map, dtype)(rows, log_prior, weight, bias, *parameters)
    wanted = None  # no gradient is formed in the forward pass
    if torch.is_grad_enabled() and shares is not None:
        of_all = Wanted.of(rows, weight, bias, parameters)
        wanted = of_all if any(of_all) or log_prior.requires_grad else None
    with no_autocast(latent.device.type):
        found: Any = _MixtureCrossEntropy.run(
            rows, log_prior, weight, bias, targets, shares, logit_map, dtype, wanted, *parameters
        )
    return found[0]


def _twin(
    targets: Tensor, shares: Tensor | None, logit_map: LogitMap | None, dtype: torch.dtype
) -> Callable[..., Tensor]:
    """The same by PyTorch's own operations, of latent `(N K, d)`, log_prior, weight, bias, map's parameters."""

    def loss(
        latent: Tensor, log_prior: Tensor, weight: Tensor, bias: Tensor | None, *parameters: Tensor
    ) -> Tensor:
        _, values = linear_logits(latent, weight, bias, logit_map, parameters, dtype)
        ids = targets.repeat_interleave(log_prior.shape[1])
        at_target = values.log_softmax(1).gather(1, ids[:, None]).reshape(log_prior.shape)
        row_loss = -(log_prior + at_target).logsumexp(1)
        return row_loss if shares is None else row_loss @ shares

    return loss


class _MixtureCrossEntropy(HandWritten):
    @staticmethod
    def forward(
        latent: Tensor,
        log_prior: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        shares: Tensor | None,
        logit_map: LogitMap | None,
        dtype: torch.dtype,
        wanted: Wanted | None,  # which gradients to form already
        *parameters: Tensor,
    ) -> tuple[Tensor, tuple[Tensor, Gradients] | None]:
        row_loss, formed = _run(latent, log_prior, weight, bias, targets, logit_map, dtype, shares, wanted)
        return row_loss if shares is None else row_loss @ shares, None if wanted is None else formed

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        latent, log_prior, weight, bias, targets, *settings = inputs
        ctx.settings, parameters = settings[:3], settings[4:]
        _, ctx.formed = output
        ctx.save_for_backward(latent, log_prior, weight, bias, targets, *parameters)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        scale, needs, (shares, logit_map, dtype) = upstream[0], ctx.needs_input_grad, ctx.settings
        latent, log_prior, weight, bias, targets, *parameters = ctx.saved_tensors

        def form() -> tuple[Tensor | None, ...]:
            formed, ctx.formed = ctx.formed, None
            if formed is None:  # row losses, or a second pass over a retained graph
                rows = scale if shares is None else scale * shares
                wanted = Wanted(needs[0], needs[2], needs[3], any(needs[9:]))
                arguments = latent, log_prior, weight, bias, targets, logit_map, dtype, rows, wanted
                _, formed = bound(logit_map, parameters, lambda: _run(*arguments))
            elif not (eager_on_cpu(scale) and float(scale) == 1.0):
                for part in (formed[0].mul_, formed[1].scale_):  # no other reference to them exists
                    part(scale)
            of_prior, (of_latent, of_weight, of_bias, of_map) = formed
            return of_latent, of_prior if needs[1] else None, of_weight, of_bias, *of_map

        inputs = latent, log_prior, weight, bias, *parameters
        found = gradients(form, _twin(targets, shares, logit_map, dtype), inputs, upstream[:1])
        return *found[:4], None, None, None, None, None, *found[4:]


def _run(
    latent: Tensor,  # (N K, d)
    log_prior: Tensor,  # (N, K)
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,  # (N,)
    logit_map: LogitMap | None,
    dtype: torch.dtype,
    shares: Tensor | None,  # (N,)
    wanted: Wanted | None,
) -> tuple[Tensor, tuple[Tensor, Gradients]]:
    """The loss of every example (N,); and the gradients of their sum, weighted by `shares`, that are needed."""
    components = log_prior.shape[1]
    kernel_map = None
    of_map = wanted is not None and wanted.logit_map
    # The gradient of a map's parameters needs the responsibilities before the kernel has run.
    if softmax_rows_backend_for(latent.device, dtype) == "compiled" and not of_map:
        kernel_map = NO_MAP if logit_map is None else logit_map.kernel_map()
    chunks = LinearChunks(latent, weight, bias, logit_map, dtype, group=components)
    kernel_map = None if chunks.barred is not None else kernel_map  # no kernel handles barred classes
    if wanted is not None:
        chunks.want(wanted)
    row_loss, of_prior = log_prior.new_empty(len(log_prior)), torch.empty_like(log_prior)

    def weigh(rows: slice, nll: Tensor) -> Tensor:  # (n,)
        """Writes the losses of some examples, and returns the factors of their rows' gradients."""
        examples = slice(rows.start // components, rows.stop // components)
        joint = log_prior[examples] - nll.reshape(-1, components)
        log_prob = joint.logsumexp(1, keepdim=True)
        row_loss[examples] = -log_prob[:, 0]
        if shares is None:
            return nll
        # A barred target has no responsible component, and its row no gradient.
        scale = (joint - log_prob.masked_fill(log_prob == -torch.inf, 0)).exp_().mul_(shares[examples, None])
        torch.neg(scale, out=of_prior[examples])
        return scale.reshape(-1)

    form = wanted is not None
    ids = targets.repeat_interleave(components)
    terms = RowTerms(ids, torch.ones_like(ids, dtype=chunks.exact), None, None, None)
    for rows in chunks:
        scale = None
        if kernel_map is not None:
            nll, _ = fused(chunks.multiply(rows), chunks.bias, terms.of(rows), form, kernel_map)
            scale = weigh(rows, nll)
        else:
            for part in chunks.parts(rows):
                logits = chunks.logits(part)
                values = chunks.map(logits)
                of_part = weigh(part, plain(values, terms.of(part), form))
                if form:
                    chunks.map_back(part, logits, values.mul_(of_part[:, None]))
        if form:
            chunks.multiply_back(rows, scale)
    return row_loss, (of_prior, chunks.gradients())
