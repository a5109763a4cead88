"""Keeps the state of `FactoredOutput` well conditioned: measured, and paid for only when needed.

Every step multiplies U from the right, so a direction that the hidden states favour shrinks in U step after step
while its scale moves into F: left alone, U becomes singular. Three repairs, from cheap to dear:

- the inverse is polished by a Newton step, O(d^3), every 100 steps or more, and made anew when it drifted too far;
- where a bound on the growth of U and R, summed over the steps, reaches the limit, both are measured; and when
  they did grow, the singular directions of U outside [1/2, 2] are moved into F, O(V d) each;
- Q is made anew from the weight, O(V d^2), once in so many steps that this costs one part in twenty of them.
"""

import math

import torch

from lastlayer.layers.factored_state import FactoredState
from lastlayer.layers.factored_step import StepPlan

POLISH_STEPS = 100
POLISH_ROWS = 16  # times d: what keeps polishing below one part in fifty of the arithmetic
DRIFT = 1e-2  # |U^T R - I| above which a Newton step is not enough
REFRESH_SHARE = 1 / 20  # of the arithmetic of the steps


class Stabilizer:
    """What happened to a state since its last repairs, and the repairs.

    Args:
        automatic: False leaves everything to `stabilize()`: for experiments.
    """

    def __init__(self, *, automatic: bool = True) -> None:
        self.automatic = automatic
        self.growth = 0.0  # bounds log ||R|| and log ||U||
        self.steps = 0  # since the inverse was polished
        self.polish_rows = 0  # examples since then
        self.gram_rows = 0  # examples since Q was refreshed

    def after(self, state: FactoredState, plan: StepPlan) -> None:
        """Called after every step."""
        self.growth += plan.growth
        self.steps += 1
        self.polish_rows += plan.rows
        self.gram_rows += plan.rows
        if not self.automatic:
            return
        if self.growth > growth_limit(state):
            self.growth = math.log(max(float(state.map.norm()), float(state.inverse.norm())))
            if not self.growth <= growth_limit(state):
                self.stabilize(state)
        if self.steps >= POLISH_STEPS and self.polish_rows >= POLISH_ROWS * state.features:
            self.polish(state)
        if 7 * REFRESH_SHARE * self.gram_rows >= state.num_classes:
            self.refresh_gram(state)

    def stabilize(self, state: FactoredState) -> int:
        """Brings every singular value of U into [1/2, 2], and makes R anew; how many it moved. W is unchanged."""
        exact = state.map.double()
        squares, directions = torch.linalg.eigh(exact @ exact.T)
        scales = squares.clamp(min=torch.finfo(torch.float64).tiny).sqrt()
        outside = (scales < 0.5) | (scales > 2)
        moved = int(outside.sum())
        if 3 * moved > state.features:
            state.rebase()
        elif moved:
            state.absorb(directions[:, outside], scales[outside])
        self._renew_inverse(state)
        self.growth = math.log(max(float(state.map.norm()), float(state.inverse.norm())))
        return moved

    def polish(self, state: FactoredState) -> None:
        """One Newton step towards `U^T R = I`, which squares what is left."""
        residual = state.map.T @ state.inverse
        residual.diagonal().sub_(1)
        if float(residual.abs().max()) <= DRIFT:
            state.inverse.sub_(state.inverse @ residual)
            self.steps = self.polish_rows = 0
        else:
            self._renew_inverse(state)

    def refresh_gram(self, state: FactoredState) -> None:
        """Q and the sum from the weight."""
        state.refresh_gram()
        self.gram_rows = 0

    def _renew_inverse(self, state: FactoredState) -> None:
        state.inverse.copy_(torch.linalg.inv(state.map.double()).T)
        self.steps = self.polish_rows = 0


def growth_limit(state: FactoredState) -> float:
    """Log of the norm of U or R that calls for repair: in F, errors of rounding are larger by as much."""
    most = 64.0 if state.factor.dtype == torch.float32 else 1e4
    return math.log(max(most, 4 * math.sqrt(state.features)))
