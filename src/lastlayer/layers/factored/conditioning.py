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
  on larger ones are made orthogonal to these: O(V) for each, and O(d) for each row of F that this changes by more
  than rounding. Those are all at first; where a direction has shrunk to nothing, those that were targets recently;
- rows of U whose scale goes out of range are brought back, exactly, O(V) for each; an offset that has grown large
  relative to W, which `F U` then nearly cancels, moves into F, O(V d);
- Q is computed anew from the weight, O(V d^2), once in so many steps that this costs one part in twenty of them.

Where processes divide the rows of F, each repairs its own, and all repair what the first one decides.
"""

import math

import torch
from torch import Tensor

from lastlayer.layers.factored.state import CHUNK_NUMBERS, FactoredState, inverse_transpose
from lastlayer.layers.factored.step import Step, drift_limit

REFRESH_SHARE = 1 / 20  # of the arithmetic of the steps
CHANGED = (0.03, 0.1, 0.3, math.inf)  # of a row of U, its own share below which a repair changes it; in turn
AMPLIFIED, AMPLIFIED_DOUBLE = 8.0, 64.0  # times sqrt(d): the amplification that calls for a repair
SLACK = 2.0  # by which a repair leaves it below its limit
CANCELLING = 16.0  # norms of a row of W that the offset may have, which is more than F U loses in digits
FAR = 20  # log2 of the norm of a row of U from which it is scaled back to about 1: far from the range of float32
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
        self.gram_rows += len(step.ids)
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
        """Frees rows of U of those that they depend on, and recomputes R; returns how many. W is unchanged."""
        exact = state.map.double()
        scale = exact.norm(dim=1, keepdim=True)
        before = exact / scale
        found = independent_rows(before, _presence(state, scale[:, 0]), math.exp(growth_limit(state)) / SLACK)
        rows = state.first(torch.full_like(before, torch.nan) if found is None else found)
        changed = (rows != before).any(1).nonzero().squeeze(1)
        if not bool(rows.isfinite().all()):
            state.rebase()
        elif len(changed):
            transform = torch.linalg.solve(rows, before[changed], left=False)
            _change_rows(state, changed, rows * scale, scale[changed] * transform / scale.T)
        state.refresh_inverse()
        self._measure(state)
        return len(changed)

    def stabilize(self, state: FactoredState) -> int:
        """All repairs; the product is multiplied out where singular values of U are outside [1/2, 2]: how many."""
        values = torch.linalg.svdvals(state.map.double())
        outside = int(state.first(((values < 0.5) | (values > 2)).sum()))
        if outside:
            state.rebase()
        else:
            state.refresh_inverse()
        self._measure(state)
        self.refresh_gram(state)
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
        amplification = (scale * state.inverse.double().norm(dim=1)).norm()
        own = torch.stack([amplification, state.offset.double().norm(), _typical_norm(state)])
        measured = state.first(torch.cat([own, scale]))
        (amplified, offset, typical), scale = measured[:3].tolist(), measured[3:]
        _rescale(state, scale)
        if offset > CANCELLING * typical:
            _fold_offset(state)
        self.growth = math.log(amplified)


def growth_limit(state: FactoredState) -> float:
    """Log of the amplification of rounding that calls for repair."""
    limit = AMPLIFIED if state.factor.dtype == torch.float32 else AMPLIFIED_DOUBLE
    return math.log(limit * math.sqrt(state.features))


def independent_rows(
    rows: Tensor,  # (d, d), float64, of norm 1
    presence: Tensor,  # (d,), their share of W
    enough: float,
) -> Tensor | None:  # (d, d)
    """Rows with the same span of which at most `enough` dependence is left; None: not found.

    Of a row that depends on those before it, what is orthogonal to all of these is kept. The least present and
    most dependent rows come last: theirs are the directions that shrink, and most rows of F need not change for
    them. As few rows as are enough are changed.
    """
    dependence = inverse_transpose(rows).norm(dim=1)
    order = (presence / dependence).argsort(descending=True)
    basis, triangle = torch.linalg.qr(rows[order].T)
    own = triangle.diagonal()[:, None]  # the length of what each row has in no row before it
    for least in CHANGED:
        found = rows.index_copy(0, order, torch.where(own.abs() < least, own * basis.T, rows[order]))
        if amplification(found) < enough:
            return found
    return None


def amplification(
    rows: Tensor,  # (d, d), float64
) -> float:
    """The norm of all `||U_i|| ||R_i||`."""
    return float((rows.norm(dim=1) * inverse_transpose(rows).norm(dim=1)).norm())


def _presence(state: FactoredState, scale: Tensor) -> Tensor:  # (d,), float64
    """The share that each row of U has of most rows of W, judged by some of them."""
    some = state.factor[:: max(1, len(state.factor) // SAMPLED)].abs().double()
    if not len(some):  # of a process without rows, which the first one is not
        return scale
    return scale * some.kthvalue(1 + int(MOST * (len(some) - 1)), 0).values.clamp(min=1e-200)


def _typical_norm(state: FactoredState) -> Tensor:  # ()
    """The root mean square of the norms of the rows of W."""
    return (state.gram.double().trace().clamp(min=0) / state.num_classes).sqrt()


def _change_rows(
    state: FactoredState,
    changed: Tensor,  # (m,)
    rows: Tensor,  # (d, d), float64
    transform: Tensor,  # (m, d), float64
) -> None:
    """`rows` for U, whose changed rows were `transform rows`, and F to match: W is unchanged; R is stale then.

    A row of F that this changes by less than rounding of W is left alone: O(V m), and O(d m) for each other row.
    """
    dtype = state.factor.dtype
    moved = (state.map[changed].double() - rows[changed]).norm(dim=1)
    least = (torch.finfo(dtype).eps / 64 * _typical_norm(state) / len(changed) / moved).to(dtype)
    change = transform.clone()
    change[torch.arange(len(changed), device=change.device), changed] -= 1
    for part in state.factor.split(max(1, CHUNK_NUMBERS // state.features)):
        some = part[:, changed]
        at = (some.abs() > least).any(1).nonzero().squeeze(1)
        part.index_add_(0, at, some[at] @ change.to(dtype))
    state.map.copy_(rows)


def _rescale(
    state: FactoredState,
    scale: Tensor,  # (d,), norms of the rows of U
) -> None:
    """Powers of 2 moved from rows of U to F, and so exactly: O(V) each. What underflows in F adds nothing to W."""
    exponents = scale.log2().round()
    rows = (exponents.abs() >= FAR).nonzero().squeeze(1)
    powers = exponents[rows].exp2()
    state.map[rows] /= powers[:, None]
    state.inverse[rows] *= powers[:, None]
    state.factor[:, rows] *= powers


def _fold_offset(state: FactoredState) -> None:
    """`F + 1 a^T` for F with `a U = offset`, and no offset: W is unchanged, O(V d)."""
    shared = inverse_transpose(state.map) @ state.offset.double()  # R itself may have drifted
    state.factor.add_(shared.to(state.factor.dtype))
    state.offset.zero_()
