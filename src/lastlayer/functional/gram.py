"""The d x d Gram matrix of a weight, and the rotations that its eigenvectors give.

`Q = W^T W` holds everything that SVD-softmax needs of a `(V, d)` weight: its eigenvectors are the right singular
vectors. One product of float64 blocks and one d x d eigenproblem replace the singular value decomposition of `W`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_ROWS = 8192  # rows cast to float64 at once
RIDGE = 1e-4  # of the mean eigenvalue, so that a second moment of few rows can be factored


class Rotation(NamedTuple):
    """Two d x d matrices with `weight_side @ hidden_side.T = I`, directions by decreasing importance.

    `(W @ weight_side) @ (h @ hidden_side).T` are the logits, and their first columns are most of them.
    """

    weight_side: Tensor  # (d, d), float64
    hidden_side: Tensor  # (d, d), float64
    squares: Tensor  # (d,), float64: sums over the rows of `(W @ weight_side)^2`, up to rounding


def gram_matrix(
    rows: Tensor,  # (n, d)
) -> Tensor:  # (d, d), float64
    """`rows^T rows` in float64, by blocks: no float64 copy of a large weight is made."""
    width = rows.shape[-1]
    gram = torch.zeros(width, width, dtype=torch.float64, device=rows.device)
    for block in rows.detach().split(BLOCK_ROWS):
        block = block.double()
        gram.addmm_(block.T, block)
    return gram


def principal_rotation(
    gram: Tensor,  # (d, d), float64
) -> Rotation:
    """The right singular vectors of the weight: the rotation whose first columns keep most of `||W||`."""
    values, vectors = (found.flip(-1) for found in torch.linalg.eigh(gram))  # eigh sorts increasingly
    return Rotation(vectors, vectors, values)


def calibrated_rotation(
    gram: Tensor,  # (d, d), float64
    moment: Tensor,  # (d, d), float64
) -> Rotation:
    """The rotation whose first columns keep most of `E|logit|^2` under hidden states of second moment `moment`.

        moment = L L^T        L^T (W^T W) L = P diag P^T        weight side L P, hidden side L^-T P

    Hidden states in these coordinates have second moment I, so dropping the last columns drops the least of the
    mean squared logits that any projection of that rank can.
    """
    factor = torch.linalg.cholesky(moment)
    vectors, _, values = principal_rotation(factor.T @ gram @ factor)
    return Rotation(factor @ vectors, torch.linalg.solve_triangular(factor.T, vectors, upper=True), values)


def shrunk_moment(
    moment: Tensor,  # (d, d), float64: mean of h h^T
    rows: int,
) -> Tensor:  # (d, d), positive definite
    """`moment` shrunk towards a multiple of I (the plain rotation), the more the fewer `rows` it was taken from.

    The share is the oracle-approximating one (Chen, Wiesel, Eldar and Hero 2010), which needs only the traces of
    `moment` and of its square; `RIDGE` of the mean eigenvalue is added on top.
    """
    width = len(moment)
    mean = moment.trace() / width
    squares = moment.square().sum()
    spread = squares - width * mean.square()  # ||moment - mean I||^2
    wanted = (1 - 2 / width) * squares + (width * mean).square()
    share = (wanted / ((rows + 1 - 2 / width) * spread).clamp(min=torch.finfo(torch.float64).tiny)).clamp(0, 1)
    identity = torch.eye(width, dtype=moment.dtype, device=moment.device)
    return (1 - share) * moment + ((share + RIDGE) * mean) * identity
