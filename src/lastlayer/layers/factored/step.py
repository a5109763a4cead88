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

For N below d all but F is an update of rank N (`_plan_by_rows`); otherwise A itself is formed
(`_plan_by_features`). By rows an example costs 9 d^2 multiply-adds in products with and into U, R and Q, and about
5 N d in those with (N, N) matrices.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from lastlayer.kernels import factored as kernel
from lastlayer.kernels.backends import factored_backend_for
from lastlayer.layers.factored.state import FactoredState, inverse_transpose

EASY = 0.9  # lr tr(H^T D H) up to which a step is far from singular whatever the eigenvalues
REFUSED = 32.0  # times the drift that calls for a new R: above which even a new R is refused


@dataclass(frozen=True)
class Gradient:
    """One backward pass, or several at the same weight: what the step needs, N rows in all."""

    hidden: Tensor  # (N, d), H
    products: Tensor  # (N, 2 d + 2), of H with Q, U (that is T), offset (t) and total
    ids: Tensor  # (N, K)
    by_score: Tensor  # (N, K), dL/da
    by_norm: Tensor  # (N,), dL/dq
    by_total: Tensor | None  # (N,), dL/ds; None when the loss does not read the sum
    by_hidden: Tensor  # (N, d), Z
    sparse: Tensor  # (N, d), the part of Z that is not D H Q: Y W + g_s total^T

    def scaled(self, factor: float) -> "Gradient":
        """The gradient of `factor` times the loss."""
        return replace(
            self,
            by_score=self.by_score * factor,
            by_norm=self.by_norm * factor,
            by_total=None if self.by_total is None else self.by_total * factor,
            by_hidden=self.by_hidden * factor,
            sparse=self.sparse * factor,
        )

    @classmethod
    def joined(cls, parts: Sequence["Gradient"]) -> "Gradient":
        """Several passes as one of all their rows."""
        if len(parts) == 1:
            return parts[0]
        width = max(part.ids.shape[1] for part in parts)

        def rows(name: str) -> Tensor:
            return torch.cat([getattr(part, name) for part in parts])

        def padded_rows(name: str) -> Tensor:
            return torch.cat([F.pad(getattr(part, name), (0, width - part.ids.shape[1])) for part in parts])

        same = ("hidden", "products", "by_norm", "by_hidden", "sparse")
        return cls(
            ids=padded_rows("ids"),
            by_score=padded_rows("by_score"),
            by_total=None if parts[0].by_total is None else rows("by_total"),
            **{name: rows(name) for name in same},
        )


@dataclass(frozen=True)
class Step:
    """A step that is ready: `apply` cannot fail."""

    ids: Tensor  # (N, K), the rows of F that change
    by_score: Tensor  # (N, K)
    rate: float
    solution: Tensor  # (N, d), X
    reading: Tensor  # the new Q, U, offset and total
    inverse: Tensor  # the new R
    growth: float  # log of the most by which the condition of U can have grown
    overshoots: float | None = None  # where a direction of the weight changes sign: the rate up to which none does

    @property
    def rows(self) -> int:
        """N."""
        return len(self.ids)

    def apply(self, state: FactoredState) -> None:
        """Makes the step."""
        state.rows.move(self.ids, self.by_score, self.solution, self.rate)
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
    if lr == 0 or len(gradient.ids) == 0:
        nothing = gradient.hidden[:0], state.reading.clone(), state.inverse.clone()
        step = Step(gradient.ids[:0], gradient.by_score[:0], 0.0, *nothing, 0.0)
        return _decayed(step, shrink) if shrink != 1 and lr != 0 else None
    if max_norm is not None:
        lr *= min(1.0, max_norm / (gradient_norm(gradient, state.num_classes) + 1e-6))  # as clip_grad_norm_ does
    rate = lr / shrink
    by_rows = 2 * len(gradient.ids) <= 3 * state.features
    compiled = factored_backend_for(gradient.ids.device, gradient.hidden.dtype) == "compiled"
    step = _plan_easy(state, gradient, rate) if by_rows and compiled else None
    if step is None:
        spread = 2 * rate * gradient.by_norm * gradient.hidden.square().sum(1)  # the diagonal of lr H H^T D
        shrinking, growing = torch.stack([spread.clamp(min=0).sum(), -spread.clamp(max=0).sum()]).tolist()
        if not math.isfinite(shrinking + growing + _probe(gradient)):
            raise ValueError("hidden, or the gradient of the loss, is not finite: the step is refused")
        step = _plan_by_rows(state, gradient, rate, shrinking, growing) if by_rows else None
        if step is None:
            step = _plan_by_features(state, gradient, rate, lr, growing)
    _check_size(step.reading[: state.features])
    return _decayed(step, shrink) if shrink != 1 else step


def _probe(g: Gradient) -> float:
    """Not finite where the gradient at a target, or of the sum, is not."""
    return float(g.by_score.sum()) + (0.0 if g.by_total is None else float(g.by_total.sum()))


def _plan_easy(state: FactoredState, g: Gradient, rate: float) -> Step | None:
    """`_plan_by_rows` in one compiled call, where a short series converges; None where it does not."""
    if not math.isfinite(_probe(g)):
        return None
    plan = kernel.plan_easy(
        g.hidden,
        g.products,
        g.by_hidden,
        g.sparse,
        g.ids,
        g.by_score,
        g.by_norm,
        g.by_total,
        state.reading,
        state.inverse,
        rate=rate,
        easy=EASY,
        drift_limit=drift_limit(g.hidden.dtype),
        num_classes=state.num_classes,
    )
    if plan is None:
        return None
    growth = math.log1p(min(plan.growing, plan.size)) - math.log1p(-min(plan.shrinking, plan.size))
    return Step(g.ids, g.by_score, rate, plan.solution, plan.reading, plan.inverse, growth)


def _plan_by_rows(state: FactoredState, g: Gradient, rate: float, shrinking: float, growing: float) -> Step | None:
    """The step as updates of rank N; None where only the eigenvalues of A can tell whether it is singular."""
    hidden, row_rates = g.hidden, 2 * rate * g.by_norm  # lr D
    response, log_growth = _response(hidden, row_rates, shrinking, growing)
    if response is None:
        return None
    # Half of the symmetric update, including `lr^2 G G^T / 2`; added to its transpose it is the update:
    inner = _sparse_overlap(g, state.num_classes).mul_(rate)
    inner.addcmul_(hidden @ (g.by_hidden + g.sparse).T, row_rates[:, None])
    twice_half = torch.addmm(g.by_hidden, inner, hidden, beta=-2 * rate, alpha=rate)  # of the update of Q
    left = -row_rates[:, None] * g.products
    left[:, : state.features] = twice_half
    left[:, -1] -= rate * g.by_score.sum(1)
    if g.by_total is not None:
        left[:, -2:] -= rate * g.by_total[:, None] * g.by_total.new_tensor([1.0, state.num_classes])
    reading = torch.addmm(state.reading, left.T, hidden)
    _make_symmetric(reading[: state.features])
    inverse, solution = _solve(state, g, row_rates, response, reading[state.features : 2 * state.features])
    return Step(g.ids, g.by_score, rate, solution, reading, inverse, log_growth)


def _response(
    hidden: Tensor,  # (N, d)
    row_rates: Tensor,  # (N,), the diagonal of lr D
    shrinking: float,
    growing: float,
) -> tuple[Tensor | None, float]:
    """`(I - lr H H^T D)^-1 - I`, log of the most that it may magnify; None where it is not known to be safe."""
    if growing > 0 and shrinking > EASY:
        return None, 0.0
    rows = hidden if shrinking <= EASY else hidden.double()
    overlap = (rows @ rows.T).double()
    identity = torch.eye(len(overlap), dtype=overlap.dtype, device=overlap.device)
    if growing > 0:
        inverse = torch.linalg.inv_ex(identity - overlap * row_rates.double()).inverse
        return (inverse - identity).to(hidden.dtype), growing - math.log1p(-shrinking)
    root = row_rates.double().sqrt()
    inverse, growth = _inverse_of_definite(identity - root[:, None] * overlap * root, 0.0)
    if growth > _most_growth(hidden.dtype):
        return None, 0.0
    return ((overlap * root) @ inverse * root).to(hidden.dtype), math.log(growth)


def _solve(
    state: FactoredState,
    g: Gradient,
    row_rates: Tensor,  # (N,), the diagonal of lr D
    response: Tensor,  # (N, N)
    new_map: Tensor,  # (d, d), U_new
) -> tuple[Tensor, Tensor]:  # (d, d), (N, d)
    """R_new and X, which `X U_new = H` defines: from R, refined; from U where R has drifted."""
    hidden = g.hidden
    right = hidden @ state.inverse.T
    solution = torch.addmm(right, response, right)
    rest = torch.addmm(hidden, solution, new_map, alpha=-1)
    limit = drift_limit(hidden.dtype)
    if _drift(rest, hidden) <= limit:
        # `rest R_new^T`, by R_new^T = R^T + lr H^T D X:
        solution = solution + torch.addmm(rest @ state.inverse.T, (rest @ hidden.T) * row_rates, solution)
        return torch.addmm(state.inverse, (row_rates[:, None] * solution).T, hidden), solution
    exact = inverse_transpose(new_map)
    inverse, solution = exact.to(hidden.dtype), (hidden.double() @ exact.T).to(hidden.dtype)
    drift = _drift(torch.addmm(hidden, solution, new_map, alpha=-1), hidden)
    if not drift <= REFUSED * limit:
        raise ValueError(
            f"the state is too ill-conditioned for this step, whose error would be {drift:.1e} of it: the step is "
            "refused, the weight unchanged; call zero_grad() and the layer's stabilize(), or lower lr"
        )
    return inverse, solution


def _drift(rest: Tensor, hidden: Tensor) -> float:
    """The largest relative error of a row of H."""
    lengths = torch.linalg.vector_norm(hidden, dim=1)
    return float((torch.linalg.vector_norm(rest, dim=1) / torch.where(lengths > 0, lengths, 1)).max())


def drift_limit(dtype: torch.dtype) -> float:
    """The relative error of R whose square is rounding."""
    return torch.finfo(dtype).eps ** 0.5


def _plan_by_features(state: FactoredState, g: Gradient, rate: float, lr: float, growing: float) -> Step:
    """The step through A itself, in float64: its Cholesky factor or eigenvalues tell how near singular it is."""
    dtype, d = g.hidden.dtype, state.features
    hidden, row_rates = g.hidden.double(), 2 * rate * g.by_norm.double()
    step = torch.eye(d, dtype=hidden.dtype, device=hidden.device) - (row_rates[:, None] * hidden).T @ hidden
    growth, overshoots = _growth_of(step, growing, lr, dtype)
    entries = _target_sums(g, hidden)  # Y^T H
    gram = step @ (state.gram.double() @ step - 2 * rate * (g.sparse.double().T @ hidden))
    gram += rate**2 * (entries.T @ entries)
    reading = torch.empty_like(state.reading)
    change_shared = -row_rates[:, None] * g.products[:, 2 * d :].double()
    change_shared[:, 1] -= rate * g.by_score.double().sum(1)
    if g.by_total is not None:
        by_total = g.by_total.double()
        sum_gradient = hidden.T @ by_total  # H^T g_s
        gram += 2 * rate**2 * torch.outer(sum_gradient, hidden.T @ g.by_score.double().sum(1))
        gram += state.num_classes * rate**2 * torch.outer(sum_gradient, sum_gradient)
        change_shared -= rate * by_total[:, None] * by_total.new_tensor([1.0, state.num_classes])
    reading[:d] = (gram + gram.T) / 2
    reading[d : 2 * d] = state.map.double() @ step
    reading[2 * d :] = state.reading[2 * d :] + change_shared.T @ hidden
    exact = inverse_transpose(reading[d : 2 * d])
    return Step(
        g.ids, g.by_score, rate, (hidden @ exact.T).to(dtype), reading, exact.to(dtype), growth, overshoots
    )


def _growth_of(step: Tensor, growing: float, lr: float, dtype: torch.dtype) -> tuple[float, float | None]:
    """Log of the most that A lets the condition of U grow, and the rate from which it overshoots, if it does.

    Raises:
        ValueError: A is numerically singular.
    """
    _, growth = _inverse_of_definite(step, growing)
    overshoots = None
    if growth > _most_growth(dtype):
        values = torch.linalg.eigvalsh(step)
        least, safe_lr = float(values.abs().min()), lr / (1 - float(values[0]))
        growth = 1 / min(least, 1.0) if least else math.inf
        if growth > _most_growth(dtype):
            raise ValueError(
                f"lr = {lr:.6g} makes this step singular (it shrinks a direction of the weight to "
                f"{least:.1e} of its size): the weight is unchanged; a rate up to {0.99 * safe_lr:.6g} is safe "
                "for this batch"
            )
        overshoots = safe_lr if values[0] < 0 else None
        growth *= max(1.0, float(values.abs().max()))
    return math.log(growth) + growing, overshoots


def _inverse_of_definite(matrix: Tensor, growing: float) -> tuple[Tensor, float]:
    """The inverse, and a bound on its largest eigenvalue; infinite where `matrix` is not positive definite.

    All its eigenvalues but the largest are at least `1 / (1 + growing)`, and their sum is its trace; none differs
    from 1 by more than the norm of the inverse less I.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        return factor, math.inf
    inverse = torch.cholesky_inverse(factor)
    others, trace, square = len(matrix) - 1, float(inverse.trace()), float(inverse.square().sum())
    by_norm = math.sqrt(max(0.0, square - 2 * trace + others + 1))  # of the inverse - I
    return inverse, max(1.0, min(trace - others / (1 + growing), 1 + by_norm))


def _most_growth(dtype: torch.dtype) -> float:
    """By how much R may grow in one step before half of the digits are lost."""
    return torch.finfo(dtype).eps ** -0.5


def _sparse_overlap(g: Gradient, num_classes: int) -> Tensor:  # (N, N)
    """`(Y + g_s 1^T) (Y + g_s 1^T)^T`: the part of `G G^T` in which the outputs do not occur."""
    if g.ids.shape[1] == 1:
        overlap = (g.by_score * g.by_score.T) * (g.ids == g.ids.T)
    else:
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


def _check_size(gram: Tensor) -> None:
    """An error where the squares of the weight would leave the range of its dtype, as after steps that diverge."""
    if not float(gram.diagonal().max()) < torch.finfo(gram.dtype).max / 16:  # NaN as well
        raise ValueError(
            f"the weight has grown so large that its squares would leave the range of {gram.dtype}, as steps at "
            "too large a rate make it: the step is refused, the weight unchanged"
        )


def _make_symmetric(square: Tensor) -> None:
    square.add_(square.T.clone()).mul_(0.5)


def _decayed(step: Step, shrink: float) -> Step:
    """The same step, and then the whole weight times `shrink`."""
    step.reading.mul_(shrink)
    step.reading[: step.reading.shape[1]].mul_(shrink)  # Q: twice
    return replace(step, inverse=step.inverse / shrink, growth=step.growth - math.log(shrink))
