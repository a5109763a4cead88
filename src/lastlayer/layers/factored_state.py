"""The state of `FactoredOutput`: a weight kept as a product, so that an exact SGD step need not touch its rows."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lastlayer.functional.gram import gram_matrix
from lastlayer.kernels.factored import target_scores
from lastlayer.kernels.factored_gradient import Columns
from lastlayer.kernels.factored_update import add_columns

CHUNK_NUMBERS = 1 << 22  # numbers of the (V, d) factor that one pass holds at once

SAMPLED = 512  # rows of F
MOST = 7 / 8  # of them
FAR = 20  # log2 of a scale

VIEWS = {"gram", "map", "offset", "total", "inverse"}


class Consistency(NamedTuple):
    """How far the parts of the state have drifted apart; all 0 in exact arithmetic, `condition` aside."""

    inverse: float  # the largest entry of |U^T R - I|
    gram: float  # ||Q - W^T W|| / ||W^T W||
    total: float  # ||W^T 1 - its kept value|| / (sqrt(V) ||W||)
    condition: float  # the condition number of U with its rows scaled to norm 1


class FactoredState:
    """`W = F U + 1 offset^T`, with `R = U^-T`, `Q = W^T W` and `total = W^T 1` kept up to date beside it.

    With the three square matrices a step on N examples costs O(N d^2): the dense part of the gradient multiplies
    `W` from the right, which `U` takes; the sparse part touches the target rows of `F`; `Q` answers `||W h||^2`.
    float64 for a float64 weight, else float32. 3 d^2 + 2 d numbers beside the V d of the weight.

    Args:
        weight: `(V, d)`; becomes the factor `F` itself, so pass a copy of what must not change.
    """

    def __init__(self, weight: Tensor) -> None:
        features = weight.shape[1]
        self.factor = weight.to(torch.promote_types(weight.dtype, torch.float32)).contiguous()  # F (V, d)
        # All the rest in one matrix: one product answers a batch, and one updates it.
        self.stacked = self.factor.new_zeros(Columns.of(features).end, features)
        self._view()
        self._reset_maps()
        self.refresh_gram()

    @property
    def num_classes(self) -> int:
        return self.factor.shape[0]

    @property
    def features(self) -> int:
        return self.factor.shape[1]

    def _view(self) -> None:
        """The parts of `stacked` by name."""
        d, at = self.features, Columns.of(self.features)
        starts = at.gram, at.map, at.inverse
        self.gram, self.map, self.inverse = (self.stacked[start : start + d] for start in starts)  # Q, U, R
        self.offset, self.total = self.stacked[at.shared : at.shared + 2]  # (d,) each: the part that all rows of
        # W share, and W^T 1

    def __getstate__(self) -> dict[str, Any]:
        return {name: part for name, part in self.__dict__.items() if name not in VIEWS}

    def __setstate__(self, parts: dict[str, Any]) -> None:
        self.__dict__.update(parts)
        self._view()

    def weight(self) -> Tensor:  # (V, d)
        """The weight itself, made anew: O(V d^2)."""
        return torch.addmm(self.offset, self.factor, self.map)

    def outputs(
        self,
        hidden: Tensor,  # (N, d)
    ) -> Tensor:  # (N, V)
        """`hidden @ W.T` without making W."""
        return (hidden @ self.map.T) @ self.factor.T + (hidden @ self.offset)[:, None]

    def statistics(
        self,
        hidden: Tensor,  # (N, d)
        ids: Tensor,  # (N, K)
    ) -> tuple[Tensor, Tensor, Tensor]:  # (N, K), (N,), (N,)
        """Target scores, squared norm and sum of the outputs in float64, differentiable in `hidden`."""
        squared_norm = ((hidden @ self.gram) * hidden).sum(1).double()
        scores = target_scores(hidden @ self.map.T, self.factor, ids) + (hidden @ self.offset)[:, None]
        return scores.double(), squared_norm.clamp(min=0), (hidden @ self.total).double()

    def to(self, device: torch.device) -> None:
        """Moves every part, bit for bit."""
        self.factor, self.stacked = self.factor.to(device), self.stacked.to(device)
        self._view()

    def consistency(self) -> Consistency:
        """The drift, measured from scratch: O(V d^2)."""
        eye = torch.eye(self.features, dtype=torch.float64, device=self.factor.device)
        exact = self.map.double()
        drift = (exact.T @ self.inverse.double() - eye).abs().max()
        gram, total = self._measured_gram()
        return Consistency(
            float(drift),
            float((self.gram - gram).norm() / gram.norm().clamp(min=1e-30)),
            float((self.total - total).norm() / _scale(gram, self.num_classes)),
            float(torch.linalg.cond(exact / exact.norm(dim=1, keepdim=True))),
        )

    def refresh_gram(self) -> None:
        """Q and the sum from the weight itself: O(V d^2), summed in float64."""
        gram, total = self._measured_gram()
        self.gram.copy_(gram)
        self.total.copy_(total)

    def rebase(self) -> None:
        """The product multiplied out: `F` becomes W and `U` the identity; O(V d^2)."""
        for rows in self._row_chunks():
            rows.copy_(torch.addmm(self.offset, rows, self.map))
        self._reset_maps()

    def change_rows(
        self,
        changed: Tensor,  # (m,)
        rows: Tensor,  # (d, d), float64
        transform: Tensor,  # (d, d), float64, T; rows of the identity but for those that change
    ) -> None:
        """`rows` for U, given that `U = T rows`, and `F T` for F: W is unchanged; R is stale then.

        A row of F that T changes by less than rounding of W is left alone: O(V m), and O(d m) for each other row.
        """
        moved = (self.map[changed].double() - rows[changed]).norm(dim=1)
        least = self.negligible() / len(changed) / moved
        change = transform[changed]
        change[torch.arange(len(changed), device=change.device), changed] -= 1
        kind = self.factor.dtype
        add_columns(self.factor, changed, change.to(kind), least.to(kind))
        self.map.copy_(rows)

    def presence(self) -> Tensor:  # (d,), float64
        """What most rows of F do not exceed, column by column, judged by some of them."""
        some = self.factor[:: max(1, self.num_classes // SAMPLED)].abs().double()
        return some.kthvalue(1 + int(MOST * (len(some) - 1)), 0).values.clamp(min=1e-200)

    def rescale(
        self,
        scale: Tensor,  # (d,), norms of the rows of U
    ) -> None:
        """Powers of 2 moved from the rows of U to F, so exactly, where they are far from 1; O(V) each.

        What becomes too small for a number in F adds nothing to W either.
        """
        exponents = scale.log2().round()
        exponents[exponents.abs() < FAR] = 0
        for row in exponents.nonzero().squeeze(1).tolist():
            power = 2.0 ** float(exponents[row])
            self.map[row] /= power
            self.inverse[row] *= power
            self.factor[:, row] *= power

    def fold_offset(self) -> None:
        """`F + 1 a^T` for F with `a U = offset`, and no offset: W is unchanged, O(V d)."""
        exact = self.map.double()
        scale = exact.norm(dim=1)
        shared = torch.linalg.solve((exact / scale[:, None]).T, self.offset.double()) / scale  # R may have drifted
        self.factor.add_(shared.to(self.factor.dtype))
        self.offset.zero_()

    def negligible(self) -> Tensor:  # ()
        """Of the norm of a row of W, what is less than rounding."""
        return torch.finfo(self.factor.dtype).eps / 64 * self.typical_norm()

    def typical_norm(self) -> Tensor:  # ()
        """The root mean square of the norms of the rows of W."""
        return (self.gram.double().trace().clamp(min=0) / self.num_classes).sqrt()

    def _reset_maps(self) -> None:
        eye = torch.eye(self.features, dtype=self.factor.dtype, device=self.factor.device)
        self.map.copy_(eye)
        self.inverse.copy_(eye)
        self.offset.zero_()

    def _measured_gram(self) -> tuple[Tensor, Tensor]:
        """`W^T W` and `W^T 1` in float64, from W a piece at a time: `U^T (F^T F) U` would square the condition."""
        gram = torch.zeros(self.features, self.features, dtype=torch.float64, device=self.factor.device)
        total = torch.zeros(self.features, dtype=torch.float64, device=self.factor.device)
        for rows in self._row_chunks():
            weight = torch.addmm(self.offset, rows, self.map)
            gram += gram_matrix(weight)
            total += weight.sum(0, dtype=torch.float64)
        return gram, total

    def _row_chunks(self) -> tuple[Tensor, ...]:
        return self.factor.split(max(1, CHUNK_NUMBERS // self.features))


def _scale(gram: Tensor, num_classes: int) -> Tensor:
    """The most that the norm of the sum of the rows can be: the scale on which its error matters."""
    return (num_classes * gram.trace()).sqrt().clamp(min=1e-30)
