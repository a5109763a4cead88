"""Large sparse targets, exactness: drift from plain SGD over many steps, with and without the repairs."""

import time
from typing import Any

import torch
from torch import Tensor, nn

from lastlayer.functional import spherical_loss
from lastlayer.functional.spherical import SquaredError
from lastlayer.layers.factored import FactoredOutput, FactoredSGD
from lastlayer.layers.factored.conditioning import Stabilizer
from lastlayer.layers.factored.state import FactoredState
from lastlayer.layers.factored.step import Step
from lastlayer.study.files import Records

CHECKS = 10  # points of each run


class TimedStabilizer(Stabilizer):
    """Adds up what all repairs take, and counts those that change rows."""

    def __init__(self, *, automatic: bool) -> None:
        super().__init__(automatic=automatic)
        self.seconds, self.repairs = 0.0, 0

    def repair(self, state: FactoredState) -> int:
        self.repairs += 1
        return super().repair(state)

    def after(self, state: FactoredState, step: Step) -> None:
        start = time.perf_counter()
        super().after(state, step)
        self.seconds += time.perf_counter() - start


class Run:
    """One factored layer beside plain SGD in float64, which is the truth."""

    def __init__(self, weight: Tensor, rate: float, dtype: torch.dtype, stabilized: bool) -> None:
        num_classes, in_features = weight.shape
        self.layer = FactoredOutput(in_features, num_classes, loss=SquaredError(), reduction="sum", dtype=dtype)
        self.layer.set_weight(weight)
        self.stabilizer = self.layer._stabilizer = TimedStabilizer(automatic=stabilized)
        self.optimizer = FactoredSGD(self.layer, rate)
        self.dtype, self.stabilized = dtype, stabilized
        self.seconds = 0.0
        self.diverged = False

    def step(self, hidden: Tensor, targets: Tensor) -> None:
        """One step; a state that is no number any more is refused, and the run is over."""
        if self.diverged:
            return
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.layer(hidden.to(self.dtype), targets).backward()
        try:
            self.optimizer.step()
        except ValueError:
            self.diverged = True
        self.seconds += time.perf_counter() - start

    def record(self, step: int, truth: Tensor) -> dict[str, Any]:
        """How far it is from the truth."""
        error = float((self.layer.weight.double() - truth).norm() / truth.norm())
        diverged = self.diverged or not error < 1
        condition = None if diverged else self.layer.consistency().condition
        return {
            "case": "exactness",
            "num_classes": len(truth),
            "in_features": truth.shape[1],
            "dtype": str(self.dtype).removeprefix("torch."),
            "stabilized": self.stabilized,
            "step": step,
            "weight_error": None if diverged else error,
            "diverged": diverged,
            "condition": condition,
            "stabilizing_share": self.stabilizer.seconds / self.seconds if self.seconds else 0.0,
        }


def measure_exactness(
    steps: int,
    num_classes: int = 2000,
    in_features: int = 32,
    batch: int = 16,
    rate: float = 1e-4,
    seed: int = 0,
) -> Records:
    """Relative errors of the weight of a layer under squared error and rectified hidden states, which share a
    direction and so drive U towards singular."""
    generator = torch.Generator().manual_seed(seed)
    bound = in_features**-0.5
    weight = bound * (2 * torch.rand(num_classes, in_features, generator=generator, dtype=torch.float64) - 1)
    runs = [Run(weight, rate, dtype, kept) for dtype in (torch.float32, torch.float64) for kept in (True, False)]
    plain = nn.Parameter(weight.clone())
    optimizer = torch.optim.SGD([plain], rate)
    records = []
    for step in range(1, steps + 1):
        hidden = torch.randn(batch, in_features, generator=generator, dtype=torch.float64).relu()
        targets = torch.randint(num_classes, (batch,), generator=generator)
        optimizer.zero_grad()
        spherical_loss(hidden, plain, targets, loss=SquaredError(), reduction="sum").backward()
        optimizer.step()
        for run in runs:
            run.step(hidden, targets)
        if step % max(1, steps // CHECKS) == 0:
            records += [run.record(step, plain.detach()) for run in runs]
    return records
