"""The exact SGD step of `FactoredOutput`, planned first and applied afterwards, at O(d^2) an example.

With `O = H W^T` and a loss of (target scores a, squared norms q, sums s), the gradient of the outputs is

    G = D O + g_s 1^T + Y,    D = diag(2 dL/dq),  g_s = dL/ds,  Y sparse (N, V) with dL/da at the targets,

and the step `W <- W - lr G^T H` is, with `A = I - lr H^T D H`,

    W A - 1 (lr H^T g_s)^T - lr Y^T H.

On the state `W = F U + 1 offset^T`, `R = U^-T`, `Q = W^T W`:

    U      <- U A
    R      <- R A^-1
    F      <- F - lr Y^T X,    X = H U_new^-1 = H R_new^T        (target rows only)
    offset <- A offset - lr H^T g_s
    Q      <- Q - lr (H^T Z + Z^T H) + ...                        Z = G W, the gradient of the hidden states

For N below d these are updates of rank N (`_by_rows`); otherwise A itself is made and factored (`_by_features`).
By rows an example costs 7 d^2 multiply-adds in the products with and into U, R and Q, and about 4 N d in those
with the (N, N) matrices; `kernels/factored_update.py` holds them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lastlayer.kernels.factored_gradient import Columns, FactoredGradient
from lastlayer.kernels.factored_update import Easy, RowMatrices, gradient_norm, move_targets, row_matrices, update
from lastlayer.layers.factored_state import FactoredState

EASY = 0.9  # lr tr(H^T D H) up to which a step is far from singular whatever the eigenvalues
EASY_STEPS = {kind: Easy(EASY, (torch.finfo(kind).eps / 4) ** (1 / 8)) for kind in (torch.float32, torch.float64)}


@dataclass
class StepPlan:
    """A step that is ready: `apply()` cannot fail."""

    apply: Callable[[], None]
    rows: int  # N
    growth: float  # log of the most by which the condition of U can have grown
    overshoots: float | None = None  # where a direction of the weight turns around: the rate up to which none does


def plan_step(
    state: FactoredState,
    gradient: FactoredGradient,
    lr: float,
    *,
    weight_decay: float = 0.0,
    max_norm: float | None = None,
    alone: bool = False,
) -> StepPlan | None:
    """The exact step `W <- W - lr (min(1, max_norm / ||g||) g + weight_decay W)`; None when nothing changes.

    An easy one is made at once where it is `alone`, not one of several of which all or none are to be made.

    Raises:
        ValueError: the step is singular or not finite, or the decay takes away all of the weight.
    """
    shrink = 1 - lr * weight_decay
    if not shrink > 0:
        raise ValueError(f"lr * weight_decay must be below 1, got {lr} * {weight_decay}")
    count, _, features, _, _ = gradient.sizes()
    if lr == 0 or count == 0:
        return _decay_only(state, shrink) if shrink != 1 and lr != 0 else None
    if max_norm is not None:
        lr *= min(1.0, max_norm / (gradient_norm(gradient, state.num_classes) + 1e-6))  # as clip_grad_norm_ does
    rate = lr / shrink
    rows, at_once = None, EASY_STEPS[state.factor.dtype] if alone and shrink == 1 else None
    if prefers_features(count, features):
        spread = 2 * rate * gradient.norm * gradient.hidden.square().sum(1)  # the diagonal of lr H H^T D
        shrinking, growing = float(spread.clamp(min=0).sum()), -float(spread.clamp(max=0).sum())
        probe = float(gradient.target.sum() + (0.0 if gradient.total is None else gradient.total.sum()))
    else:
        rows = row_matrices(state.stacked, state.factor, gradient, rate, at_once)
        shrinking, growing, probe = rows.shrinking, rows.growing, rows.probe
    if not math.isfinite(shrinking + growing + probe):
        raise ValueError("hidden, or the gradient of the loss, is not finite: the step is refused")
    if growing > 0:
        _check_size((1 + growing) ** 2 * state.gram.double(), state.gram.dtype)
    plan = None
    if rows is not None and rows.applied:
        plan = StepPlan(_nothing, count, -math.log1p(-min(shrinking, rows.size)))
    elif rows is not None and shrinking <= EASY and growing <= 1:
        solve = None if rows.size <= EASY_STEPS[state.factor.dtype].size else partial(_solve_easy, rows)
        plan = _by_rows(state, gradient, rate, rows, solve, -math.log1p(-min(shrinking, rows.size)))
        growing = min(growing, rows.size)
    elif rows is not None and growing <= 1e-3 * shrinking:
        plan = _by_rows_checked(state, gradient, rate, rows)
    if plan is None:
        plan = _by_features(state, gradient, rate, lr, growing)
    plan.growth += growing
    return plan if shrink == 1 else _with_decay(state, plan, shrink)


def _nothing() -> None:
    """What is left to apply of a step that was made at once."""


def prefers_features(rows: int, features: int) -> bool:
    """Whether the (d, d) form of a step costs less than the (N, N) form."""
    return 2 * rows > 3 * features


# N below d: updates of rank N. The solve is with I - lr H H^T D, whose determinant is that of A.


def _solve_easy(rows: RowMatrices, right: Tensor) -> Tensor:  # (N, d), X
    """`(I - S)^-1 H R^T`, where the trace proves the matrix well conditioned, and a series would be long."""
    return torch.linalg.inv_ex(_identity(right.shape[0], right) - rows.system).inverse @ right


def _by_rows_checked(
    state: FactoredState, gradient: FactoredGradient, rate: float, rows: RowMatrices
) -> StepPlan | None:
    """The step by rows for D > 0, by Cholesky in float64; None unless A is positive, well away from singular."""
    root = (2 * rate * gradient.norm).double().sqrt()[:, None]
    scaled = root * gradient.hidden
    inverse, growth = _inverse_factor(_identity(len(root), root) - scaled @ scaled.T, 0.0)
    if growth > _most_growth(gradient.hidden.dtype) or not bool((root > 0).all()):
        return None

    def solve(right: Tensor) -> Tensor:
        return (inverse.T @ (inverse @ (root * right)) / root).to(right.dtype)

    return _by_rows(state, gradient, rate, rows, solve, math.log(growth))


def _inverse_factor(matrix: Tensor, growing: float) -> tuple[Tensor, float]:
    """The inverse of the Cholesky factor, and a bound on the largest eigenvalue of the inverse of `matrix`.

    All eigenvalues of the inverse but the largest are at least `1 / (1 + growing)`, and their sum is its trace.
    Infinite where the matrix is not positive definite.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        return factor, math.inf
    inverse = torch.linalg.solve_triangular(factor, _identity(len(matrix), matrix), upper=False)
    return inverse, max(1.0, float(inverse.square().sum()) - (len(matrix) - 1) / (1 + growing))


def _identity(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)


def _by_rows(
    state: FactoredState,
    g: FactoredGradient,
    rate: float,
    rows: RowMatrices,
    solve: Callable[[Tensor], Tensor] | None,  # of H R^T, (N, d), X; None: a short series will do
    growth: float,
) -> StepPlan:
    """The step as one update of rank N of all but F."""

    def apply() -> None:
        update(state.stacked, state.factor, g, rate, rows, None if solve is None else solve(g.right))

    return StepPlan(apply, g.sizes().rows, growth)


# N above d, or a step that is not easy: A itself, (d, d), in float64.


def _by_features(state: FactoredState, g: FactoredGradient, rate: float, lr: float, growing: float) -> StepPlan:
    """The step through `A = I - lr H^T D H`: its Cholesky factor or eigenvalues tell how near singular it is."""
    hidden = g.hidden.double()
    step = _identity(state.features, hidden) - (2 * rate * g.norm.double()[:, None] * hidden).T @ hidden
    factor, growth = _inverse_factor(step, growing)
    overshoot = None
    if growth <= _most_growth(g.hidden.dtype):
        inverse = (state.inverse.double() @ factor.T) @ factor
    else:
        values, vectors = torch.linalg.eigh(step)
        least, safe_lr = float(values.abs().min()), lr / (1 - float(values[0]))
        growth = 1 / min(least, 1.0) if least else math.inf
        if growth > _most_growth(g.hidden.dtype):
            raise ValueError(
                f"lr = {lr:.6g} makes this step singular (it shrinks a direction of the weight to "
                f"{least:.1e} of its size): the weight is unchanged; a rate up to {0.99 * safe_lr:.6g} is safe "
                "for this batch"
            )
        overshoot = safe_lr if values[0] < 0 else None
        growth *= max(1.0, float(values.abs().max()))
        inverse = ((state.inverse.double() @ vectors) / values) @ vectors.T
    entries = _row_sums(g, hidden)
    gram = step @ (state.gram.double() @ step - 2 * rate * (g.sparse.double().T @ hidden))
    gram += rate**2 * (entries.T @ entries)
    if g.total is not None:
        shared = hidden.T @ g.total.double()
        either = hidden.T @ g.target.double().sum(1) + state.num_classes / 2 * shared
        gram += 2 * rate**2 * torch.outer(shared, either)
    _check_size(gram, g.hidden.dtype)
    solution = (hidden @ inverse.T).to(g.hidden.dtype)

    def apply() -> None:
        state.gram.copy_((gram + gram.T) / 2)
        state.map.copy_(state.map.double() @ step)
        state.inverse.copy_(inverse)
        move_targets(state.factor, g.ids, g.target, rate, solution)
        total = torch.zeros_like(g.norm) if g.total is None else g.total
        pushed = 2 * g.norm[:, None] * g.shared  # by the offset and by the sum
        pushed += torch.stack([total, g.target.sum(1) + state.num_classes * total], 1)
        at = Columns.of(state.features).shared
        state.stacked[at : at + 2].addmm_(pushed.T, g.hidden, alpha=-rate)

    return StepPlan(apply, len(hidden), math.log(growth), overshoot)


def _check_size(gram: Tensor, dtype: torch.dtype) -> None:
    """An error where the squares of the weight would leave the range of its dtype, as after steps that diverge."""
    if not float(gram.diagonal().max()) < torch.finfo(dtype).max / 16:  # NaN as well
        raise ValueError(
            f"the weight has grown so large that its squares would leave the range of {dtype}, as steps at too "
            "large a rate make it: the step is refused, the weight unchanged"
        )


def _row_sums(g: FactoredGradient, hidden: Tensor) -> Tensor:  # (J, d)
    """`Y^T H`, the rows of the classes that occur."""
    classes, place = g.ids.unique(return_inverse=True)
    sums = hidden.new_zeros(len(classes), hidden.shape[1])
    for column, values in zip(place.T, g.target.T, strict=True):
        sums.index_add_(0, column, values.double()[:, None] * hidden)
    return sums


def _most_growth(dtype: torch.dtype) -> float:
    """By how much R may grow in one step before half of the digits are lost."""
    return torch.finfo(dtype).eps ** -0.5


def _decay_only(state: FactoredState, shrink: float) -> StepPlan:
    return _with_decay(state, StepPlan(_nothing, 0, 0.0), shrink)


def _with_decay(state: FactoredState, plan: StepPlan, shrink: float) -> StepPlan:
    """The same step, and then the whole weight times `shrink`."""
    inner = plan.apply

    def apply() -> None:
        inner()
        state.stacked.mul_(shrink)
        state.gram.mul_(shrink)  # twice
        state.inverse.div_(shrink**2)  # and the other way

    plan.apply = apply
    plan.growth -= math.log(shrink)
    return plan
