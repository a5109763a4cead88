"""`FactoredOutput` with its classes divided among ranks."""

from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor

from lastlayer.distributed.collectives import copied, gathered, summed
from lastlayer.distributed.divided_rows import DividedState
from lastlayer.distributed.ranks import Ranks, of_own_rows, own_rows
from lastlayer.distributed.row_scores import Part, RowScoredLayer
from lastlayer.functional.precision import no_autocast
from lastlayer.functional.spherical import NormalizedLoss
from lastlayer.layers.base import OutputLayer
from lastlayer.layers.factored import FactoredOutput
from lastlayer.layers.factored.record import Ledger


class ShardedFactoredOutput(RowScoredLayer, FactoredOutput):
    """`FactoredOutput` over all ranks: each has its rows of F, and all the same small state (`U`, its inverse, Q).

    `FactoredSGD` trains it as it does the layer of one process: a target's row of F is read and changed by the
    rank that has it, and all else of a step is computed by every rank. A step that one rank refuses is refused on
    all.

    Of N rows with K targets each, a training step sends, by the counts of results: forward N K numbers, the scores
    of the targets; backward N d, the sums of the targets' rows of F; in `FactoredSGD.step` two (float64), on which
    the ranks agree; all by all-reduce. A repair, when one is needed, sends some `d (d + 2)` numbers (float64);
    Q, recomputed once in some 2 V examples, `d (d + 1)` (float64). Cost of a rank: `9 N d^2 + 5
    N^2 d` multiply-adds a step, as in one process, and the targets of its own; of what costs O(V) there, its
    share; memory `V d / ranks + 3 d^2`.

    `weight` and `bias`, in the state dict too, are `Shard(0)` DTensors, computed from the rank's own rows. The one
    parameter, the anchor, is a plain tensor. With a mesh of two dimensions every step is that of the rows of all
    copies, as with `process_group`, and their hidden states and gradients are gathered over the first.
    """

    PLAIN = ("anchor",)
    KEPT = ("state",)

    @staticmethod
    def facts(layer: Any) -> dict[str, Any]:
        loss = repr(layer.loss) if is_dataclass(layer.loss) else type(layer.loss).__name__
        return {"loss": loss, **layer.state.tensors()}

    def __init__(self, layer: OutputLayer, ranks: Ranks, copies: Ranks | None) -> None:
        super().__init__(layer, ranks, copies)
        self._ledger = Ledger()
        whole = self.state
        device = whole.factor.device if whole.factor.is_meta else torch.device(ranks.mesh.device_type)
        own, *parts = (
            part.to(device, copy=True) for part in (own_rows(whole.factor, ranks), whole.reading, whole.inverse)
        )
        with torch.no_grad():
            self.state = DividedState(own, self.num_classes, ranks, copies)
        self.state.reading, self.state.inverse = parts

    @property
    def weight(self) -> Tensor:  # (V, d)
        """The weight, recomputed by each rank for its own rows: a copy."""
        return self._divided(self.state.weight()[:, : self.in_features])

    @property
    def bias(self) -> Tensor | None:  # (V,)
        """The bias, a copy as `weight` is; None without one."""
        return self._divided(self.state.weight()[:, self.in_features]) if self.has_bias else None

    def scores(self, hidden: Tensor) -> Tensor:
        """The outputs of all classes, on every rank: sends as many numbers as it returns."""
        return self._run("scores", lambda: self._all_outputs(hidden), hidden=hidden)

    def _all_outputs(self, hidden: Tensor) -> Tensor:
        own = self._own_outputs(self._rows(hidden))
        whole = gathered(own, self.ranks.spans(self.num_classes), self.ranks)
        return whole.reshape(*hidden.shape[:-1], self.num_classes)

    def score(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """See `OutputLayer`."""
        self._normalized()
        return super().score(hidden, ids)

    # The hooks.

    def _own_outputs(self, hidden: Tensor) -> Tensor:  # (N, d) to (N, W)
        with no_autocast(self.anchor.device.type):
            return self.state.outputs(self._featured(copied(hidden, self.ranks)))

    def _own_scores(self, hidden: Tensor) -> list[Part]:
        """Log-probabilities, or where the loss has none the outputs."""
        outputs, own = self._own_outputs(hidden), self.ranks.span(self.num_classes)
        if not isinstance(self.loss, NormalizedLoss):
            return [(outputs, own)]
        squared_norm, total = summed(torch.stack([outputs.square().sum(1), outputs.sum(1)]), self.ranks)
        normalizer = copied(self.loss.log_normalizer(squared_norm, total, self.num_classes), self.ranks)
        return [(self.loss.log_numerator(outputs) - normalizer[:, None], own)]

    def _log_prob(self, hidden: Tensor) -> Tensor:
        self._normalized()
        return super()._log_prob(hidden)

    def _sample(self, hidden: Tensor, num_samples: int) -> Tensor:
        self._normalized()
        return super()._sample(hidden, num_samples)

    def _divided(self, own: Tensor) -> Tensor:
        return of_own_rows(own.to(self.anchor.dtype).contiguous(), self.num_classes, self.ranks)
