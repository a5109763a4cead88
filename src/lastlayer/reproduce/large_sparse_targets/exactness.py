"""Large sparse targets, exactness: drift from plain SGD over many steps, and what the repairs take."""

import time
from collections.abc import Iterator
from itertools import cycle

import torch
from torch import Tensor, nn

from lastlayer.functional import spherical_loss
from lastlayer.functional.spherical import SquaredError
from lastlayer.layers.factored import FactoredOutput, FactoredSGD
from lastlayer.layers.factored.conditioning import Stabilizer
from lastlayer.layers.factored.state import FactoredState
from lastlayer.layers.factored.step import Step
from lastlayer.reproduce.large_sparse_targets.speed import times_of
from lastlayer.study.files import Record, Records

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
    """A factored layer in training under the squared error, with and without the repairs."""

    def __init__(self, layer: FactoredOutput, rate: float, stabilized: bool = True) -> None:
        self.layer, self.stabilized = layer, stabilized
        self.dtype = layer.anchor.dtype
        self.stabilizer = layer._stabilizer = TimedStabilizer(automatic=stabilized)
        self.optimizer = FactoredSGD(layer, rate)
        self.seconds: list[float] = []  # of each step
        self.diverged = False

    def step(self, hidden: Tensor, targets: Tensor) -> None:
        """One step; a state that is no number any more is refused, and the run is over."""
        if self.diverged:
            return
        hidden = hidden.to(self.dtype, copy=True).requires_grad_()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.layer(hidden, targets).backward()
        try:
            self.optimizer.step()
        except ValueError:
            self.diverged = True
        self.seconds.append(time.perf_counter() - start)

    @property
    def stabilizing_share(self) -> float:
        """Of the time of all steps, that of the repairs."""
        return self.stabilizer.seconds / sum(self.seconds)

    def record(self, step: int, truth: Tensor) -> Record:
        """How far it is from the truth."""
        error = float((self.layer.weight.double() - truth).norm() / truth.norm())
        diverged = self.diverged or not error < 1
        return {
            "case": "exactness",
            "num_classes": len(truth),
            "in_features": truth.shape[1],
            "dtype": str(self.dtype).removeprefix("torch."),
            "stabilized": self.stabilized,
            "step": step,
            "weight_error": None if diverged else error,
            "diverged": diverged,
            "condition": None if diverged else self.layer.consistency().condition,
            "stabilizing_share": self.stabilizing_share,
        }


def measure_exactness(
    steps: int,
    num_classes: int = 2000,
    in_features: int = 32,
    batch: int = 16,
    rate: float = 1e-4,
    seed: int = 0,
) -> Records:
    """Relative errors of the weight against plain SGD in float64, which is the truth, under rectified hidden
    states, which share a direction and so drive U towards singular."""
    generator = torch.Generator().manual_seed(seed)
    bound = in_features**-0.5
    weight = bound * (2 * torch.rand(num_classes, in_features, generator=generator, dtype=torch.float64) - 1)
    runs = []
    for dtype in (torch.float32, torch.float64):
        for stabilized in (True, False):
            options = {"loss": SquaredError(), "reduction": "sum", "dtype": dtype}
            layer = FactoredOutput(in_features, num_classes, **options)
            layer.set_weight(weight)
            runs.append(Run(layer, rate, stabilized))
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


def measure_repairs(
    num_classes: int, in_features: int, batch: int, steps: int, rate: float = 1e-3, seed: int = 0
) -> Records:
    """What the repairs take of a state that was just begun.

    Hidden states: one batch over and over, 16 in turn, and fresh ones whose directions have variances that fall as
    1 / k, with the same norm.
    """
    records = []
    sizes = {"num_classes": num_classes, "in_features": in_features, "batch": batch, "steps": steps}
    for name in ("one batch", "16 batches in turn", "a spectrum that decays"):
        torch.manual_seed(seed)
        run = Run(FactoredOutput(in_features, num_classes, loss=SquaredError()), rate)
        hidden = _hidden_states(name, batch, in_features)
        for _ in range(steps):
            run.step(next(hidden), torch.randint(num_classes, (batch,)))
        found = {"repairs": run.stabilizer.repairs, "stabilizing_share": run.stabilizing_share}
        records.append({"case": "repairs", "name": name, **sizes, **found, **times_of(run.seconds)})
    return records


def _hidden_states(name: str, batch: int, in_features: int) -> Iterator[Tensor]:
    if name == "a spectrum that decays":
        scale = torch.arange(1, in_features + 1) ** -0.5
        basis, _ = torch.linalg.qr(torch.randn(in_features, in_features))
        directions = (in_features**0.5 * scale / scale.norm())[:, None] * basis
        while True:
            yield torch.randn(batch, in_features) @ directions
    yield from cycle([torch.randn(batch, in_features) for _ in range(1 if name == "one batch" else 16)])
