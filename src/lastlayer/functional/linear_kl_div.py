"""The divergence of a linear layer's softmax from a teacher's, without the `(N, V)` logits of either."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lastlayer.functional.checks import REDUCTIONS, check_above_zero, check_choice, check_linear
from lastlayer.functional.linear_chunks import LinearChunks, linear_logits
from lastlayer.functional.one_pass import one_pass_loss
from lastlayer.functional.precision import product_dtype
from lastlayer.functional.reference_head import ReferenceChunks, ReferenceHead, reference_log_prob
from lastlayer.functional.second_order import Tensors


def linear_kl_div(
    hidden: Tensor,  # (..., d)
    weight: Tensor,  # (V, d)
    teacher_hidden: Tensor,  # (..., D)
    teacher_weight: Tensor,  # (V, D)
    *,
    bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    reduction: str = "mean",
) -> Tensor:  # (), or (...) for "none"
    """`KL(teacher || student)` of two linear layers' softmaxes, without the `(N, V)` logits of either.

    Equals, for logits of student and teacher divided by the temperature T,

        student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
        T ** 2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)

    with "mean" over the rows. Both layers' logits are computed in the same chunks, and the student's gradients
    formed there for "mean" and "sum"; the teacher gets none. Cost: `6 N V d + 2 N V D` operations; memory beyond
    the gradients: two chunks of logits.

    Where the teacher's few best logits are stored, `linear_cross_entropy` of `(..., K)` targets costs less.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or range.

    Source: G. Hinton et al., "Distilling the knowledge in a neural network", 2015.

    >>> import torch
    >>> hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
    >>> teacher_hidden, teacher_weight = torch.randn(6, 16), torch.randn(1000, 16)
    >>> linear_kl_div(hidden, weight, teacher_hidden, teacher_weight, temperature=2.0).backward()
    >>> weight.grad.shape
    torch.Size([1000, 8])
    """
    check_linear(hidden, weight, bias)
    check_linear(teacher_hidden, teacher_weight, teacher_bias)
    check_choice("reduction", reduction, REDUCTIONS)
    shape = hidden.shape[:-1]
    if teacher_hidden.shape[:-1] != shape or len(teacher_weight) != len(weight):
        raise ValueError(
            f"teacher_hidden and teacher_weight must have the rows {tuple(shape)} and the {len(weight)} classes "
            f"of the student, got shapes {tuple(teacher_hidden.shape)} and {tuple(teacher_weight.shape)}"
        )
    check_above_zero("temperature", temperature)
    rows = hidden.reshape(-1, hidden.shape[-1])
    teacher = ReferenceHead(teacher_hidden.reshape(-1, teacher_hidden.shape[-1]), teacher_weight, teacher_bias)
    share = temperature**2 / max(1, rows.shape[0]) if reduction == "mean" else temperature**2
    divergence = _Divergence(teacher, temperature, share, product_dtype(hidden))
    inputs = rows, weight, bias
    losses = one_pass_loss(divergence, inputs, reduced=reduction != "none", constants=teacher[:3])
    if reduction == "mean":
        return losses + losses.new_zeros(()) / rows.shape[0]  # nan over nothing
    return losses.reshape(shape) if reduction == "none" else losses


class _Divergence(NamedTuple):
    """`share` times the divergence of every row: `RowLosses` of the student's hidden states, weight and bias."""

    teacher: ReferenceHead  # its hidden states as rows
    temperature: float
    share: float
    dtype: torch.dtype  # of the products

    def plain(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """By PyTorch's own operations."""
        _, values = linear_logits(hidden, weight, bias, None, (), self.dtype)
        known = reference_log_prob(self.teacher, self.temperature, self.dtype)
        return self._of_rows((values / self.temperature).log_softmax(1), known)

    def run(
        self, inputs: tuple[Any, ...], shares: Tensor | None, wanted: Sequence[bool] | None
    ) -> tuple[Tensor, Tensors | None]:
        """Chunk by chunk, beside the teacher's. With p the student's and q the teacher's probabilities, the
        gradient of a row's loss for the logits is `share / temperature * (p - q)`."""
        hidden, weight, bias = inputs
        chunks = LinearChunks(hidden, weight, bias, None, self.dtype, buffers=2)
        teacher = ReferenceChunks(self.teacher, self.temperature, self.dtype)
        if wanted is not None:
            chunks.want(wanted)
        losses = hidden.new_empty(len(hidden), dtype=chunks.exact)
        factors = torch.full_like(losses, self.share / self.temperature)
        factors = factors if shares is None else factors * shares
        for rows in chunks:
            teacher.multiply(rows)
            for part in chunks.parts(rows):
                logits, known = chunks.logits(part), teacher.log_prob(part)
                log_prob = (logits / self.temperature).log_softmax(1)
                losses[part] = self._of_rows(log_prob, known)
                if wanted is not None:
                    chunks.map_back(part, logits, log_prob.exp_().sub_(known.exp_()).mul_(factors[part, None]))
            if wanted is not None:
                chunks.multiply_back(rows)
        losses = losses if shares is None else losses * shares
        return losses, None if wanted is None else chunks.gradients()

    def _of_rows(self, log_prob: Tensor, known: Tensor) -> Tensor:  # (n, V) each, to (n,)
        """Classes of probability 0 add 0, not nan."""
        prob = known.exp()
        return self.share * (prob * (known - log_prob).masked_fill(prob == 0, 0)).sum(1)
