"""The exact SGD step of `FactoredOutput`, planned first and applied afterwards, at O(d^2) an example.

With `O = H W^T` and a loss of (target scores a, squared norms q, sums s), the gradient of the outputs is

    G = D O + g_s 1^T + Y,    D = diag(2 dL/dq),  g_s = dL/ds,  Y sparse (N, V) with dL/da at the targets,

and the step `W <- W - lr G^T H` is, with `A = I - lr H^T D H`,

    W A - 1 (lr H^T g_s)^T - lr Y^T H.

On the state `W = F U + 1 offset^T`, `R = U^-T`, `Q = W^T W`, `total = W^T 1`, with `y = Y 1`:

    U      <- U A                         = U - lr (D T)^T H,             T = H U^T
    offset <- A offset - lr H^T g_s       = offset - lr H^T (D t + g_s),  t = H offset
    total  <- A total - lr H^T (V g_s + y)
    Q      <- Q - lr (H^T Z + Z^T H) + lr^2 H^T G G^T H,                  Z = G W, the gradient of H
    F      <- F - lr Y^T X,               X = H U_new^-1                  (target rows only)
    R      <- R A^-1                      = R + lr (D X)^T H

`X` decides whether the step is right: what the target rows of W gain is `X U_new`, which must be H. From `R`
alone it would not stay so: the recursion `R A^-1` multiplies an error of R, in what A shrinks, by as much at
every step, and where the hidden states do not span the space the loss never sees it. So X is refined against
the very U_new that is stored,

    rest = H - X U_new,    X <- X + rest R_new^T,

which squares its relative error, and leaves in R an error that adds up but is not multiplied. `rest` also
measures, at every step and for the rows of the batch, by how much R has drifted: past a limit R is recomputed
from U, and where that does not help either the step is refused.

For N below 1.5 d all but F is an update of rank N (`_plan_by_rows`, and the same in the compiled engine where the
step is easy); otherwise A itself is formed (`_plan_by_features`). By rows an example costs 9 d^2 multiply-adds in
products with and into U, R and Q, and about 5 N d in those with (N, N) matrices.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lastlayer.kernels import factored as kernel
from lastlayer.kernels.backends import factored_backend_for
from lastlayer.layers.factored.record import Gradient
from lastlayer.layers.factored.state import FactoredState, in_range, inverse_transpose

EASY = 0.9  # the norm of I - A up to which no eigenvalue need be known
REFUSED = 32.0  # times the drift that calls for a new R: above which even a new R is refused


@dataclass(frozen=True)
class Step:
    """A step that is ready: `apply` cannot fail."""

    ids: Tensor  # (N, K), the rows of F that change
    by_score: Tensor  # (N, K)
    rate: float
    reading: Tensor  # the new Q, U, offset and total
    inverse: Tensor  # the new R
    solution: Tensor  # (N, d), X
    growth: float = 0.0  # log of the most by which the condition of U can have grown
    overshoots: float | None = None  # where a direction of the weight changes sign: the rate up to which none does

    def apply(self, state: FactoredState) -> None:
        """Makes the step."""
        state.move(self.ids, self.by_score, self.solution, self.rate)
        state.reading, state.inverse = self.reading, self.inverse


def plan_step(
    state: FactoredState,
    gradient: Gradient,
    lr: float,
    *,
    weight_decay: float = 0.0,
    max_norm: float | None = None,
) -> Step | None:
    """The exact step `W <- W - lr (min(1, max_norm / ||g||) g + weight_decay W)`; None when nothing changes.

    Raises:
        ValueError: the step is singular or not finite, or the decay takes away all of the weight.
    """
    shrink = 1 - lr * weight_decay
    if not shrink > 0:
        raise ValueError(f"lr * weight_decay must be below 1, got {lr} * {weight_decay}")
    if lr == 0 or (shrink == 1 and not len(gradient.ids)):
        return None
    if max_norm is not None:
        lr *= min(1.0, max_norm / (gradient_norm(gradient, state.num_classes) + 1e-6))  # as clip_grad_norm_ does
    rate = lr / shrink
    probe = (
        gradient.by_score.sum() if gradient.by_total is None else gradient.by_score.sum() + gradient.by_total.sum()
    )
    if not math.isfinite(float(probe)):
        raise ValueError("hidden, or the gradient of the loss, is not finite: the step is refused")
    by_rows = 0 < 2 * len(gradient.ids) <= 3 * state.features
    compiled = factored_backend_for(gradient.ids.device, gradient.hidden.dtype) == "compiled"
    step = _plan_compiled(state, gradient, rate) if by_rows and compiled else None
    if step is None:
        growth, overshoots = _growth(gradient, rate, lr)
        plan = _plan_by_rows if by_rows else _plan_by_features
        step = replace(plan(state, gradient, rate), growth=growth, overshoots=overshoots)
    if not in_range(step.reading[: state.features]):  # as after steps that diverge
        raise ValueError(
            f"the weight has grown so large that its squares would leave the range of {step.reading.dtype}, as "
            "steps at too large a rate make it: the step is refused, the weight unchanged"
        )
    return _decayed(step, shrink)


def _plan_compiled(state: FactoredState, g: Gradient, rate: float) -> Step | None:
    """`_plan_by_rows` in one compiled call, where a short series converges; None where it does not."""
    plan = kernel.plan_easy(
        g.hidden, g.products, g.by_hidden, g.sparse, g.ids, g.by_score, g.by_norm, g.by_total,
        state.reading, state.inverse,
        rate=rate, easy=EASY, drift_limit=drift_limit(g.hidden.dtype), num_classes=state.num_classes,
    )  # fmt: skip
    if plan is None:
        return None
    return Step(g.ids, g.by_score, rate, *plan[:3], growth=_growth_of(plan.size))


def _growth(g: Gradient, rate: float, lr: float) -> tuple[float, float | None]:
    """Log of the most by which A lets the condition of U grow, and the rate from which it overshoots, if it does.

    Raises:
        ValueError: A is not finite, or numerically singular.
    """
    hidden, row_rates = g.hidden.double(), 2 * rate * g.by_norm.double()  # lr D
    if len(hidden) < hidden.shape[1] and bool((row_rates >= 0).all()):  # of the same eigenvalues, but for zeros
        rooted = row_rates.sqrt()[:, None] * hidden
        change = rooted @ rooted.T
    else:
        change = (row_rates[:, None] * hidden).T @ hidden  # I - A
    size = float(change.norm())
    if size <= EASY:
        return _growth_of(size), None
    if not math.isfinite(size):
        raise ValueError("hidden, or the gradient of the loss, is not finite: the step is refused")
    values = 1 - torch.linalg.eigvalsh(change)
    lowest, least, most = float(values.min()), float(values.abs().min()), float(values.abs().max())
    safe_lr = lr / max(1 - lowest, 1e-300)
    if not least > torch.finfo(g.hidden.dtype).eps ** 0.5:  # half of the digits would be lost
        raise ValueError(
            f"lr = {lr:.6g} makes this step singular (it shrinks a direction of the weight to "
            f"{least:.1e} of its size): the weight is unchanged; a rate up to {0.99 * safe_lr:.6g} is safe "
            "for this batch"
        )
    return math.log(max(most, 1.0) / min(least, 1.0)), safe_lr if lowest < 0 else None


def _growth_of(size: float) -> float:
    """The same by the norm of I - A alone."""
    return math.log1p(size) - math.log1p(-size)


def _plan_by_rows(state: FactoredState, g: Gradient, rate: float) -> Step:
    """The step as updates of rank N."""
    hidden, row_rates, d = g.hidden, 2 * rate * g.by_norm, state.features
    # Half of the symmetric update, including `lr^2 G G^T / 2`; added to its transpose it is the update:
    inner = _sparse_overlap(g, state.num_classes).mul_(rate)
    inner.addcmul_(hidden @ (g.by_hidden + g.sparse).T, row_rates[:, None])
    left = -row_rates[:, None] * g.products
    left[:, :d] = torch.addmm(g.by_hidden, inner, hidden, beta=-2 * rate, alpha=rate)
    left[:, 2 * d :] -= rate * _shared(g, state.num_classes)
    reading = torch.addmm(state.reading, left.T, hidden)
    reading[:d] = (reading[:d] + reading[:d].T) / 2
    change = (hidden.double() @ hidden.double().T) * row_rates.double()  # lr H H^T D
    identity = torch.eye(len(change), dtype=change.dtype, device=change.device)
    response = torch.linalg.solve_ex(identity - change, change).result.to(hidden.dtype)
    return Step(g.ids, g.by_score, rate, reading, *_solve(state, g, row_rates, response, reading[d : 2 * d]))


def _solve(
    state: FactoredState,
    g: Gradient,
    row_rates: Tensor,  # (N,), the diagonal of lr D
    response: Tensor,  # (N, N), (I - lr H H^T D)^-1 - I
    new_map: Tensor,  # (d, d), U_new
) -> tuple[Tensor, Tensor]:  # (d, d), (N, d)
    """R_new and X, which `X U_new = H` defines: from R, refined; from U where R has drifted."""
    hidden, limit = g.hidden, drift_limit(g.hidden.dtype)
    right = hidden @ state.inverse.T
    solution = torch.addmm(right, response, right)
    rest = torch.addmm(hidden, solution, new_map, alpha=-1)
    if _drift(rest, hidden) <= limit:
        # `rest R_new^T`, by R_new^T = R^T + lr H^T D X:
        solution = solution + torch.addmm(rest @ state.inverse.T, (rest @ hidden.T) * row_rates, solution)
        return torch.addmm(state.inverse, (row_rates[:, None] * solution).T, hidden), solution
    exact = inverse_transpose(new_map)
    solution = (hidden.double() @ exact.T).to(hidden.dtype)
    drift = _drift(torch.addmm(hidden, solution, new_map, alpha=-1), hidden)
    if not drift <= REFUSED * limit:
        raise ValueError(
            f"the state is too ill-conditioned for this step, whose error would be {drift:.1e} of it: the step is "
            "refused, the weight unchanged; call zero_grad() and the layer's stabilize(), or lower lr"
        )
    return exact.to(hidden.dtype), solution


def _drift(rest: Tensor, hidden: Tensor) -> float:
    """The largest relative error of a row of H."""
    lengths = torch.linalg.vector_norm(hidden, dim=1)
    return float((torch.linalg.vector_norm(rest, dim=1) / torch.where(lengths > 0, lengths, 1)).max())


def drift_limit(dtype: torch.dtype) -> float:
    """The relative error of R whose square is rounding."""
    return torch.finfo(dtype).eps ** 0.5


def _plan_by_features(state: FactoredState, g: Gradient, rate: float) -> Step:
    """The step through A itself, in float64; R anew from U."""
    dtype, d = g.hidden.dtype, state.features
    hidden, row_rates = g.hidden.double(), 2 * rate * g.by_norm.double()
    step = torch.eye(d, dtype=hidden.dtype, device=hidden.device) - (row_rates[:, None] * hidden).T @ hidden
    shared = rate * _shared(g, state.num_classes).double()
    gram = step @ (state.gram.double() @ step - 2 * rate * (g.sparse.double().T @ hidden))
    entries = _target_sums(g, hidden)
    gram += rate**2 * (entries.T @ entries)
    if g.by_total is not None:  # of g_s with y + (y + V g_s), which the column of `shared` for total is
        of_sum, of_scores = hidden.T @ g.by_total.double(), hidden.T @ g.by_score.double().sum(1)
        gram += rate * torch.outer(of_sum, rate * of_scores + shared[:, 1] @ hidden)
    reading = torch.empty_like(state.reading)
    reading[:d] = (gram + gram.T) / 2
    reading[d : 2 * d] = state.map.double() @ step
    reading[2 * d :] = state.reading[2 * d :] - (row_rates[:, None] * g.products[:, 2 * d :] + shared).T @ hidden
    exact = inverse_transpose(reading[d : 2 * d])
    return Step(g.ids, g.by_score, rate, reading, exact.to(dtype), (hidden @ exact.T).to(dtype))


def _shared(g: Gradient, num_classes: int) -> Tensor:  # (N, 2)
    """`g_s` and `V g_s + y`: what offset and total lose of the hidden states, beside what A takes."""
    scores = g.by_score.sum(1)
    by_total = torch.zeros_like(scores) if g.by_total is None else g.by_total
    return torch.stack([by_total, num_classes * by_total + scores], 1)


def _sparse_overlap(g: Gradient, num_classes: int) -> Tensor:  # (N, N)
    """`(Y + g_s 1^T) (Y + g_s 1^T)^T`: the part of `G G^T` in which the outputs do not occur."""
    classes, place = g.ids.unique(return_inverse=True)
    compact = g.by_score.new_zeros(len(g.ids), len(classes)).scatter_add_(1, place, g.by_score)
    overlap = compact @ compact.T
    if g.by_total is not None:
        rank_one = torch.outer(g.by_total, g.by_score.sum(1) + num_classes / 2 * g.by_total)
        overlap += rank_one + rank_one.T
    return overlap


def _target_sums(g: Gradient, hidden: Tensor) -> Tensor:  # (J, d)
    """`Y^T H`, the rows of the J classes that occur."""
    classes, place = g.ids.unique(return_inverse=True)
    sums = hidden.new_zeros(len(classes), hidden.shape[1])
    for column, values in zip(place.T, g.by_score.T, strict=True):
        sums.index_add_(0, column, values.double()[:, None] * hidden)
    return sums


def gradient_norm(g: Gradient, num_classes: int) -> float:
    """`||dL/dW||_F`, exact: the sum of `(G G^T) o (H H^T)`, in float64."""
    hidden = g.hidden.double()
    overlap = hidden @ hidden.T
    weighted = overlap @ (2 * g.by_norm.double()[:, None] * hidden)
    square = (weighted * (g.by_hidden + g.sparse).double()).sum()
    square += (_sparse_overlap(g, num_classes).double() * overlap).sum()
    return float(square.clamp(min=0).sqrt())


def _decayed(step: Step, shrink: float) -> Step:
    """The same step, and then the whole weight times `shrink`."""
    if shrink == 1:
        return step
    step.reading.mul_(shrink)
    step.reading[: step.reading.shape[1]].mul_(shrink)  # Q: twice
    return replace(step, inverse=step.inverse / shrink, growth=step.growth - math.log(shrink))
