"""Keeps the state of `FactoredOutput` well conditioned: measured, and repaired only when needed.

Every step multiplies U from the right, so a direction that the hidden states favour shrinks in U step after step
while its scale moves into F: without repair, U becomes singular.

The scale of U's rows does no harm. Whatever is done to U, R or F is relative to a row of U, its row of R
and its column of F: with `W = sum_i F_i U_i` and `F_i = W R_i`, an error of `eps ||U_i||` in the row i of U is one
of `eps ||U_i|| ||R_i||` in W, whatever the scale of the row. So the measure, the amplification, is the norm of all
`||U_i|| ||R_i||`, that is, of the inverse of U with rows of norm 1. It is sqrt(d) when the rows are orthogonal,
and grows as they become dependent. A direction that shrinks is harmless once it is a row of its own.

Repairs, by increasing cost (that of R in the rows of a batch is part of each step, see `step.py`):

- where a bound on the growth of the amplification, summed over the steps, reaches the limit, it is measured,
  O(d^2), and R checked against U as a whole, O(d^3); where the amplification did grow, the rows of U that depend
  on others are freed of them: O(V) for each, and O(d) for each row of F that this changes by more than rounding.
  Those are all at first; where a direction has shrunk to nothing, they are those that were targets recently;
- rows of U whose scale leaves the range of the numbers are brought back, exactly, O(V) for each; an offset that
  has grown large relative to W, which `F U` then nearly cancels, moves into F, O(V d);
- Q is computed anew from the weight, O(V d^2), once in so many steps that this costs one part in twenty of them.

Where processes divide the rows of F, each repairs its own, and all repair what the first one decides.
"""

import math
from functools import cache

import torch
from torch import Tensor

from lastlayer.layers.factored.rows import Rows
from lastlayer.layers.factored.state import FactoredState, inverse_transpose
from lastlayer.layers.factored.step import Step, drift_limit

REFRESH_SHARE = 1 / 20  # of the arithmetic of the steps
DEPENDENT = 3.0  # `||U_i|| ||R_i||` from which a repair changes row i; 1 when it is orthogonal to the others
AMPLIFIED, AMPLIFIED_DOUBLE = 8.0, 64.0  # times sqrt(d): the amplification that calls for a repair
SLACK = 2.0  # by which a repair leaves it below its limit
ALIKE = 8.0  # the ratio up to which two such products are treated as equal
CANCELLING = 16.0  # norms of a row of W that the offset may have, which is more than F U loses in digits
RANGE = 2.0**60  # of the rows' norms: far from the ends of float32
FAR = 20  # log2 of a row's norm that is brought back together with them
SAMPLED = 512  # rows of F
MOST = 7 / 8  # of them


class Stabilizer:
    """Counters of the steps since the last repairs of a state, and the repairs.

    Args:
        automatic: False leaves everything to `stabilize()`: for experiments.
    """

    def __init__(self, *, automatic: bool = True) -> None:
        self.automatic = automatic
        self.growth = 0.0  # bounds log of the amplification
        self.gram_rows = 0  # examples since Q was refreshed

    def after(self, state: FactoredState, step: Step) -> None:
        """Called after every step."""
        self.growth += step.growth
        self.gram_rows += step.rows
        if not self.automatic:
            return
        if not self.growth <= growth_limit(state):
            self._measure(state)
            if not self.growth <= growth_limit(state):
                self.repair(state)
        if 9 * REFRESH_SHARE * self.gram_rows >= state.num_classes:
            self.refresh_gram(state)

    def counters(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"growth": self.growth, "gram_rows": self.gram_rows}

    def load_counters(self, counters: dict[str, float]) -> None:
        """As `counters` gave them."""
        self.growth, self.gram_rows = counters["growth"], int(counters["gram_rows"])

    def repair(self, state: FactoredState) -> int:
        """Frees the rows of U that depend on others, and recomputes R; returns how many rows. W is unchanged."""
        exact = state.map.double()
        scale = exact.norm(dim=1, keepdim=True)
        presence = column_presence(state.rows) * scale[:, 0]
        light = presence < state.negligible()
        found = independent_rows(exact / scale, presence, light, math.exp(growth_limit(state)) / SLACK)
        nothing = torch.full_like(exact, torch.nan)
        rows, transform = state.rows.first(torch.stack((nothing, nothing) if found is None else found))
        if not bool(rows.isfinite().all()):
            state.rebase()
            self._measure(state)
            return state.features
        changed = (transform != torch.eye(len(transform), device=exact.device)).any(1).nonzero().squeeze(1)
        if len(changed):
            state.change_rows(changed, rows * scale, scale * transform / scale.T)
        state.refresh_inverse()
        self._measure(state)
        return len(changed)

    def stabilize(self, state: FactoredState) -> int:
        """Multiplies the product out where a singular value of U is outside [1/2, 2]; how many were."""
        values = torch.linalg.svdvals(state.map.double())
        outside = int(state.rows.first(((values < 0.5) | (values > 2)).sum()))
        if outside:
            state.rebase()
        else:
            state.refresh_inverse()
        self._measure(state)
        return outside

    def refresh_gram(self, state: FactoredState) -> None:
        """Q and the sum from the weight."""
        state.refresh_gram()
        self.gram_rows = 0

    def _measure(self, state: FactoredState) -> None:
        """The amplification as it is; R, the scale of the rows and the offset within their limits."""
        if not state.inverse_drift() <= drift_limit(state.factor.dtype):
            state.refresh_inverse()
        scale = state.map.double().norm(dim=1)
        own = [
            (scale * state.inverse.double().norm(dim=1)).norm(),
            scale.min(),
            scale.max(),
            state.offset.double().norm(),
            state.typical_norm(),
        ]
        measured = state.rows.first(torch.cat([torch.stack(own), scale]))
        (amplification, least, most, offset, typical), scale = measured[:5].tolist(), measured[5:]
        if least < 1 / RANGE or most > RANGE:
            state.rescale(scale, FAR)
        if offset > CANCELLING * typical:
            state.fold_offset()
        self.growth = math.log(amplification)


def growth_limit(state: FactoredState) -> float:
    """Log of the amplification of rounding that calls for repair."""
    return _growth_limit(state.factor.dtype, state.features)


@cache
def _growth_limit(dtype: torch.dtype, features: int) -> float:
    return math.log((AMPLIFIED if dtype == torch.float32 else AMPLIFIED_DOUBLE) * math.sqrt(features))


def independent_rows(
    rows: Tensor,  # (d, d), float64, of norm 1
    presence: Tensor,  # (d,), their share of W
    light: Tensor,  # (d,), bool: rows that are cheap to change
    enough: float,
) -> tuple[Tensor, Tensor] | None:
    """Rows of which at most `enough` dependence is left, and T with `rows = T new_rows`; None: not found.

    Row i of the inverse is orthogonal to all other rows, so what row i must lose to be so, too, is

        rows_i - dual_i / ||dual_i||^2 = sum_j c_j rows_j,    c = dual (that difference),

    which makes `T <- T (I + e_i c^T)` and `dual <- dual + c dual_i^T`. Of rows about as dependent as the worst the
    least present is taken: its direction is the one that shrinks, and most rows of F need not change for it.
    Once a row is changed that is not light, all that are DEPENDENT are: they cost little more.
    """
    rows, dual = rows.clone(), inverse_transpose(rows).clone()
    if not bool(dual.isfinite().all()):
        return None
    transform = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    all_of_them, last = False, -1
    left = torch.zeros_like(light)  # rows that only smaller ones make dependent
    known = math.inf
    for _ in range(3 * len(rows)):
        lengths = dual.norm(dim=1)
        dependence = lengths * rows.norm(dim=1)
        known = float(dependence.norm())
        if known < enough and not all_of_them:
            dependence = dependence * light
        if float((dependence * ~left).max()) >= DEPENDENT:
            dependence, strict = dependence * ~left, True
        elif known < enough:
            break
        else:
            strict = False
        worst = float(dependence.max())
        if worst < DEPENDENT:
            break
        score = torch.where(dependence >= max(DEPENDENT, worst / ALIKE), dependence / presence, 0)
        row = int(score.argmax())
        all_of_them |= not light[row]
        coefficients = dual @ (rows[row] - dual[row] / lengths[row] ** 2)
        coefficients[row] = 0
        if strict:  # far smaller rows are made orthogonal to this one, not the reverse, so that F need not grow
            coefficients[presence < presence[row] / ALIKE] = 0
            left[row] = row == last
        last = row
        rows[row] -= (
            coefficients @ rows
        )  # computed from the coefficients, so that T is exact whatever the error of dual
        transform.addr_(transform[:, row].clone(), coefficients)
        dual.addr_(coefficients, dual[row].clone())
    return (rows, transform) if known < enough else None


def column_presence(rows: Rows) -> Tensor:  # (d,), float64
    """What most rows of F do not exceed, column by column, judged by some of them."""
    some = rows.some(SAMPLED).abs().double()
    return some.kthvalue(1 + int(MOST * (len(some) - 1)), 0).values.clamp(min=1e-200)
