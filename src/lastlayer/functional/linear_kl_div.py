"""The divergence of a linear layer's softmax from a teacher's, without the `(N, V)` logits of either."""

from torch import Tensor

from lastlayer.functional.checks import REDUCTIONS, check_above_zero, check_choice, check_linear
from lastlayer.functional.linear_cross_entropy import RowLoss, loss_of, row_terms
from lastlayer.functional.precision import product_dtype
from lastlayer.functional.soft_targets import TeacherRows, all_classes


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
    dtype = product_dtype(hidden)
    rows = hidden.reshape(-1, hidden.shape[-1]) / temperature
    teacher_rows = teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1])
    dense = TeacherRows(teacher_rows, teacher_weight, teacher_bias, temperature)
    terms, absent = row_terms(all_classes(dense, rows), None, 0.0, 0.0, len(weight), reduction, dtype)
    bias = None if bias is None else bias / temperature
    loss = temperature**2 * loss_of(rows, weight, bias, RowLoss(terms, dtype, reduction, dense=dense))
    return loss.reshape(shape) if reduction == "none" else loss + absent
