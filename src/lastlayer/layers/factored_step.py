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
By rows an example costs 7 d^2 multiply-adds in the products with and into U, R and Q, and about 5 N d in those
with the (N, N) matrices.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lastlayer.layers.factored_state import FactoredState

EASY = 0.9  # lr tr(H^T D H) up to which a step is far from singular whatever the eigenvalues


@dataclass
class FactoredGradient:
    """One backward pass, or several at the same weight: what the step needs, N rows in all."""

    hidden: Tensor  # (N, d), H
    ids: Tensor  # (N, K)
    target: Tensor  # (N, K), dL/da
    norm: Tensor  # (N,), dL/dq
    total: Tensor | None  # (N,), dL/ds; None when the loss does not read the sum
    products: Tensor  # (N, 3 d): H Q, H U^T, H R^T (the last not where `prefers_features`)
    sparse: Tensor  # (N, d), Y W + g_s total^T
    wanted: Tensor  # (N, d), the gradient of hidden: D H Q + sparse

    def scale(self, factor: float) -> None:
        """Multiplies the gradient of the loss."""
        for name in ("target", "norm", "sparse", "wanted"):
            setattr(self, name, getattr(self, name) * factor)
        if self.total is not None:
            self.total = self.total * factor

    @classmethod
    def joined(cls, parts: Sequence["FactoredGradient"]) -> "FactoredGradient":
        """Several passes as one of all their rows."""
        if len(parts) == 1:
            return parts[0]
        width = max(part.ids.shape[1] for part in parts)
        needed = min(part.products.shape[1] for part in parts)  # a large pass is without H R^T, and so is the step

        def column(name: str) -> Tensor:
            pieces = [getattr(part, name) for part in parts]
            if name in {"ids", "target"}:
                pieces = [torch.nn.functional.pad(piece, (0, width - piece.shape[1])) for piece in pieces]
            return torch.cat([piece[:, :needed] for piece in pieces] if name == "products" else pieces)

        total = None if parts[0].total is None else column("total")
        names = ("hidden", "ids", "target", "norm", "products", "sparse", "wanted")
        return cls(total=total, **{name: column(name) for name in names})


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
) -> StepPlan | None:
    """The exact step `W <- W - lr (min(1, max_norm / ||g||) g + weight_decay W)`; None when nothing changes.

    Raises:
        ValueError: the step is singular or not finite, or the decay takes away all of the weight.
    """
    shrink = 1 - lr * weight_decay
    if not shrink > 0:
        raise ValueError(f"lr * weight_decay must be below 1, got {lr} * {weight_decay}")
    if lr == 0 or len(gradient.hidden) == 0:
        return _decay_only(state, shrink) if shrink != 1 and lr != 0 else None
    if max_norm is not None:
        lr *= min(1.0, max_norm / (gradient_norm(gradient, state.num_classes) + 1e-6))  # as clip_grad_norm_ does
    rate = lr / shrink
    pulled = gradient.hidden * (-2 * rate * gradient.norm)[:, None]  # -lr D H
    by_rows = not prefers_features(*pulled.shape)
    system = gradient.hidden @ pulled.T if by_rows else None  # (N, N), less the identity
    spread = (gradient.hidden * pulled).sum(1) if system is None else system.diagonal()
    probe = gradient.target.sum() if gradient.total is None else gradient.target.sum() + gradient.total.sum()
    parts = spread.tolist()  # of the trace, -lr tr(H^T D H)
    if not math.isfinite(sum(parts) + float(probe)):
        raise ValueError("hidden, or the gradient of the loss, is not finite: the step is refused")
    growing = sum(part for part in parts if part > 0)
    shrinking = growing - sum(parts)
    plan = None
    if system is not None and shrinking <= EASY and growing <= 1:
        solution = _solve_easy(gradient, system)
        plan = _by_rows(state, gradient, rate, pulled, solution, -math.log1p(-shrinking))
    elif system is not None and growing <= 1e-3 * shrinking:
        plan = _by_rows_checked(state, gradient, rate, pulled)
    if plan is None:
        plan = _by_features(state, gradient, rate, lr, growing)
    plan.growth += growing
    return plan if shrink == 1 else _with_decay(state, plan, shrink)


def prefers_features(rows: int, features: int) -> bool:
    """Whether the (d, d) form of a step costs less than the (N, N) form."""
    return 2 * rows > 3 * features


def gradient_norm(gradient: FactoredGradient, num_classes: int) -> float:
    """`||dL/dW||_F`, exact: the sum of `(G G^T) o (H H^T)`, in float64."""
    hidden, wanted, sparse = (x.double() for x in (gradient.hidden, gradient.wanted, gradient.sparse))
    overlap = hidden @ hidden.T
    weighted = overlap @ (2 * gradient.norm.double()[:, None] * hidden)
    targets = target_overlap(gradient, num_classes).double()
    square = (weighted * (wanted + sparse)).sum() + (targets * overlap).sum()
    return float(square.clamp(min=0).sqrt())


def target_overlap(gradient: FactoredGradient, num_classes: int) -> Tensor:  # (N, N)
    """`(Y + g_s 1^T) (Y + g_s 1^T)^T`: the part of `G G^T` in which the outputs do not occur."""
    ids, values = gradient.ids, gradient.target
    if ids.shape[1] == 1:
        overlap = (values * values.T).masked_fill_(ids != ids.T, 0)
    else:
        compact = _compact(ids, values)
        overlap = compact @ compact.T
    if gradient.total is not None:
        rank_one = torch.outer(gradient.total, values.sum(1) + num_classes / 2 * gradient.total)
        overlap += rank_one + rank_one.T
    return overlap


def _compact(ids: Tensor, values: Tensor) -> Tensor:  # (N, J)
    """Y with the columns of the J classes that occur."""
    classes, place = ids.unique(return_inverse=True)
    return values.new_zeros(len(ids), len(classes)).scatter_add_(1, place, values)


# N below d: updates of rank N. The solve is with I - lr H H^T D, whose determinant is that of A.


def _solve_easy(gradient: FactoredGradient, system: Tensor) -> Tensor:  # (N, d), X
    """`X = (I + system)^-1 H R^T`, where the trace proves the matrix well conditioned.

    With `S = -system` of small norm by `(I + S) (I + S^2) (I + S^4)`, in products; else by LU.
    """
    right = gradient.products[:, -gradient.hidden.shape[1] :]
    left_out, eps = float(system.norm()) ** 2, torch.finfo(system.dtype).eps / 4
    if left_out**4 > eps:
        system.diagonal().add_(1)
        return torch.linalg.inv_ex(system).inverse @ right
    power = system.neg_()
    inverse = power.clone()
    inverse.diagonal().add_(1)
    while left_out > eps:
        power = power @ power
        inverse = torch.addmm(inverse, power, inverse)
        left_out *= left_out
    return inverse @ right


def _by_rows_checked(
    state: FactoredState, gradient: FactoredGradient, rate: float, pulled: Tensor
) -> StepPlan | None:
    """The step by rows for D > 0, by Cholesky in float64; None unless A is positive, well away from singular."""
    d = gradient.hidden.shape[1]
    root = (2 * rate * gradient.norm.double()).sqrt()[:, None]
    scaled = root * gradient.hidden
    inverse, growth = _inverse_factor(_identity(len(root), root) - scaled @ scaled.T, 0.0)
    if growth > _most_growth(gradient.hidden.dtype) or not bool((root > 0).all()):
        return None
    solution = inverse.T @ (inverse @ (root * gradient.products[:, 2 * d :])) / root
    return _by_rows(state, gradient, rate, pulled, solution.to(pulled.dtype), math.log(growth))


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
    pulled: Tensor,  # (N, d), -lr D H
    solution: Tensor,  # (N, d), X
    growth: float,
) -> StepPlan:
    """The step as updates of rank N."""
    hidden, d = g.hidden, g.hidden.shape[1]
    # Q_new - Q = P + P^T,  P = H^T (lr^2 M H - lr wanted),  M + M^T = G G^T:
    # M = D H (D H Q / 2 + sparse)^T + (Y + g_s 1^T)(Y + g_s 1^T)^T / 2, and D H Q = wanted - sparse
    inner = target_overlap(g, state.num_classes).addmm_(pulled, (g.wanted + g.sparse).T, beta=rate, alpha=-1)
    right = torch.addmm(g.wanted, inner, hidden, beta=-rate, alpha=rate / 2)

    def apply() -> None:
        half = hidden.T @ right
        state.gram.add_(half).add_(half.T)
        state.map.addmm_(g.products[:, d : 2 * d].T, pulled)
        state.inverse.addmm_(solution.T, pulled, alpha=-1)
        _update_vectors(state, g, rate)
        _update_targets(state, g, rate, solution)

    return StepPlan(apply, len(hidden), growth)


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
    solution = (hidden @ inverse.T).to(g.hidden.dtype)

    def apply() -> None:
        state.gram.copy_((gram + gram.T) / 2)
        state.map.copy_(state.map.double() @ step)
        state.inverse.copy_(inverse)
        _update_vectors(state, g, rate)
        _update_targets(state, g, rate, solution)

    return StepPlan(apply, len(hidden), math.log(growth), overshoot)


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


# What both forms share.


def _update_vectors(state: FactoredState, g: FactoredGradient, rate: float) -> None:
    """The sum of the rows of W, and the offset they share."""
    if g.total is None or state.total is None:
        return
    double_norm = 2 * g.norm
    shared = double_norm * (g.hidden @ state.offset) + g.total
    sums = double_norm * (g.hidden @ state.total) + state.num_classes * g.total + g.target.sum(1)
    state.offset.sub_(shared @ g.hidden, alpha=rate)
    state.total.sub_(sums @ g.hidden, alpha=rate)


def _update_targets(state: FactoredState, g: FactoredGradient, rate: float, solution: Tensor) -> None:
    """`F <- F - lr Y^T X`, one target of every row at a time."""
    for ids, values in zip(g.ids.T, g.target.T, strict=True):
        state.factor.index_add_(0, ids, values[:, None] * solution, alpha=-rate)


def _decay_only(state: FactoredState, shrink: float) -> StepPlan:
    return _with_decay(state, StepPlan(lambda: None, 0, 0.0), shrink)


def _with_decay(state: FactoredState, plan: StepPlan, shrink: float) -> StepPlan:
    """The same step, and then the whole weight times `shrink`."""
    inner = plan.apply

    def apply() -> None:
        inner()
        state.gram.mul_(shrink**2)
        state.map.mul_(shrink)
        state.inverse.div_(shrink)
        state.offset.mul_(shrink)
        if state.total is not None:
            state.total.mul_(shrink)

    plan.apply = apply
    plan.growth -= math.log(shrink)
    return plan
