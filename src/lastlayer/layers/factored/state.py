"""The state of `FactoredOutput`: a weight kept as a product, so that an exact SGD step need not touch its rows."""

import copy
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lastlayer.functional.gram import gram_matrix
from lastlayer.kernels import factored as kernel
from lastlayer.kernels.backends import factored_backend_for
from lastlayer.layers.factored.rows import CHUNK_NUMBERS, Rows

SAME_WEIGHT = 1e-4  # the relative difference of two equal weights that the order of summation can cause


class Consistency(NamedTuple):
    """How far the parts of the state have drifted apart; all 0 in exact arithmetic, `condition` aside."""

    inverse: float  # the largest entry of |U^T R - I|
    gram: float  # ||Q - W^T W|| / ||W^T W||
    total: float  # ||W^T 1 - its kept value|| / (sqrt(V) ||W||)
    condition: float  # the condition number of U with its rows scaled to norm 1


class FactoredState:
    """`W = F U + 1 offset^T`, with `R = U^-T`, `Q = W^T W` and `total = W^T 1` kept up to date with it.

    With the three square matrices a step on N examples costs O(N d^2): the dense part of the gradient multiplies
    `W` from the right, which `U` takes; the sparse part touches the target rows of `F`; `Q` gives `||W h||^2`.
    float64 for a float64 weight, else float32. 3 d^2 + 2 d numbers in addition to the V d of the weight.

    Where several processes divide the rows (`rows_of`), all else is the same in each of them, and they call
    together every method that reads rows: the sums over rows are over those of all.

    Args:
        weight: `(V, d)`, the rows of this process; becomes the factor `F` itself, so pass a copy of what must not
            change.
        rows_of: makes `Rows` of them.
    """

    def __init__(self, weight: Tensor, rows_of: Callable[[Tensor], Rows] = Rows) -> None:
        d = weight.shape[1]
        self.rows = rows_of(weight.to(torch.promote_types(weight.dtype, torch.float32)).contiguous())
        self.reading = self.factor.new_zeros(2 * d + 2, d)  # Q, U, offset, total: one product reads a batch
        self.inverse = self.factor.new_zeros(d, d)  # R
        self._reset_maps()
        self.refresh_gram()

    @property
    def factor(self) -> Tensor:  # (V, d), F; where the rows are divided those of this process
        return self.rows.factor

    @property
    def num_classes(self) -> int:
        return self.rows.num_classes

    @property
    def features(self) -> int:
        return self.factor.shape[1]

    @property
    def gram(self) -> Tensor:  # (d, d), Q
        return self.reading[: self.features]

    @property
    def map(self) -> Tensor:  # (d, d), U
        return self.reading[self.features : 2 * self.features]

    @property
    def offset(self) -> Tensor:  # (d,), what all rows of W have in common
        return self.reading[2 * self.features]

    @property
    def total(self) -> Tensor:  # (d,), W^T 1
        return self.reading[2 * self.features + 1]

    def weight(self) -> Tensor:  # (V, d)
        """The weight itself, computed anew: O(V d^2). Of divided rows, and outputs, this process's own."""
        return torch.addmm(self.offset, self.factor, self.map)

    def outputs(
        self,
        hidden: Tensor,  # (N, d)
    ) -> Tensor:  # (N, V)
        """`hidden @ W.T` without forming W."""
        return (hidden @ self.map.T) @ self.factor.T + (hidden @ self.offset)[:, None]

    def statistics(
        self,
        hidden: Tensor,  # (N, d)
        ids: Tensor,  # (N, K)
    ) -> tuple[Tensor, Tensor, Tensor]:  # (N, K), (N,), (N,)
        """Target scores, squared norm and sum of the outputs in float64, differentiable in `hidden`."""
        return self.read(hidden, ids)[1:]

    def read(
        self,
        hidden: Tensor,  # (N, d)
        ids: Tensor,  # (N, K)
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (N, 2 d + 2), (N, K), (N,), (N,)
        """The same, after the products of `hidden` with Q, U, offset and total."""
        products, d = hidden @ self.reading.T, self.features
        squared_norm = (products[:, :d] * hidden).sum(1).double().clamp(min=0)
        scores = self.rows.target_scores(products[:, d : 2 * d], ids) + products[:, 2 * d, None]
        return products, scores.double(), squared_norm, products[:, 2 * d + 1].double()

    def compiled(self) -> bool:
        """Whether the compiled engine reads F in a pass, which it does where this process has all rows."""
        return self.rows.whole and factored_backend_for(self.factor.device, self.factor.dtype) == "compiled"

    @torch.no_grad()
    def read_copy(
        self,
        hidden: Tensor,  # (N, d)
        ids: Tensor,  # (N, K)
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # (N, d), then as `read`
        """A copy of `hidden`, whose buffer the caller may refill, and what `read` gives, without derivatives."""
        if self.compiled():
            return kernel.read(hidden.contiguous().resolve_neg(), self.reading, self.factor, ids)
        rows = hidden.clone(memory_format=torch.contiguous_format)
        return rows, *self.read(rows, ids)

    def to(self, device: torch.device) -> None:
        """Moves every part, bit for bit."""
        self.rows.factor = self.factor.to(device)
        self.reading, self.inverse = self.reading.to(device), self.inverse.to(device)

    def consistency(self) -> Consistency:
        """The drift, measured from scratch: O(V d^2)."""
        exact = self.map.double()
        gram, total = self._measured_gram()
        return Consistency(
            self.inverse_drift(),
            float((self.gram - gram).norm() / gram.norm().clamp(min=1e-30)),
            float((self.total - total).norm() / _scale(gram, self.num_classes)),
            float(torch.linalg.cond(exact / exact.norm(dim=1, keepdim=True))),
        )

    def inverse_drift(self) -> float:
        """The largest entry of |U^T R - I|, O(d^3): what a step adds to a target row of W is wrong by so much."""
        drift = self.map.T @ self.inverse
        drift.diagonal().sub_(1)
        return float(drift.abs().max())

    def refresh_inverse(self) -> None:
        """R from U: O(d^3)."""
        self.inverse.copy_(inverse_transpose(self.map))

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
        least = (self.negligible() / len(changed) / moved).to(self.factor.dtype)
        change = transform[changed]
        change[torch.arange(len(changed), device=change.device), changed] -= 1
        change = change.to(self.factor.dtype)
        for part in self._row_chunks():
            some = part[:, changed]
            at = (some.abs() > least).any(1).nonzero().squeeze(1)
            part.index_add_(0, at, some[at] @ change)
        self.map.copy_(rows)

    def rescale(
        self,
        scale: Tensor,  # (d,), norms of the rows of U
        far: int,
    ) -> None:
        """Powers of 2 moved from the rows of U to F, so exactly, where they are beyond `2^far`; O(V) each.

        What becomes too small for a number in F adds nothing to W either.
        """
        exponents = scale.log2().round()
        exponents[exponents.abs() < far] = 0
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

    def tensors(self) -> dict[str, Tensor]:
        """All parts by name, not copied: what a checkpoint keeps so that training resumes bit for bit."""
        return {"factor": self.rows.saved(), "reading": self.reading, "inverse": self.inverse}

    def load(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> bool:
        """Parts as `tensors` gave them, where they are those of this very weight, which may have been rounded to
        `dtype` since; whether they are: O(V d^2).

        Raises:
            ValueError: parts of other shapes; nothing has changed then.
        """
        names = self.tensors()
        shapes, saved_shapes = (
            {name: tuple(part.shape) for name, part in parts.items() if name in names}
            for parts in (names, tensors)
        )
        if shapes != saved_shapes:
            raise ValueError(f"the factors of a state must have shapes {shapes}, got {saved_shapes}")
        saved = copy.copy(self)
        saved.rows = self.rows.like(tensors["factor"])
        saved.reading, saved.inverse = (tensors[name].to(self.factor.device) for name in ("reading", "inverse"))
        most = max(SAME_WEIGHT, torch.finfo(dtype).eps)
        if saved.factor.dtype != self.factor.dtype or not self._difference(saved) <= most:
            return False
        for own, part in (
            (self.factor, saved.factor),
            (self.reading, saved.reading),
            (self.inverse, saved.inverse),
        ):
            own.copy_(part)
        return True

    def _difference(self, other: "FactoredState") -> float:
        """`||W - other W|| / ||W||`."""
        squares = torch.zeros(2, dtype=torch.float64, device=self.factor.device)
        for ours, theirs in zip(self._row_chunks(), other._row_chunks(), strict=True):
            weight = torch.addmm(self.offset, ours, self.map)
            squares[0] += (weight - torch.addmm(other.offset, theirs, other.map)).double().square().sum()
            squares[1] += weight.double().square().sum()
        square, norm = self.rows.summed(squares)
        return float((square / norm.clamp(min=1e-300)).sqrt())

    def _reset_maps(self) -> None:
        eye = torch.eye(self.features, dtype=self.factor.dtype, device=self.factor.device)
        self.map.copy_(eye)
        self.inverse.copy_(eye)
        self.offset.zero_()

    def _measured_gram(self) -> tuple[Tensor, Tensor]:
        """`W^T W` and `W^T 1` in float64, from W a piece at a time: `U^T (F^T F) U` would square the condition."""
        sums = torch.zeros(self.features + 1, self.features, dtype=torch.float64, device=self.factor.device)
        for rows in self._row_chunks():
            weight = torch.addmm(self.offset, rows, self.map)
            sums[:-1] += gram_matrix(weight)
            sums[-1] += weight.sum(0, dtype=torch.float64)
        sums = self.rows.summed(sums)
        return sums[:-1], sums[-1]

    def _row_chunks(self) -> tuple[Tensor, ...]:
        return self.factor.split(max(1, CHUNK_NUMBERS // self.features))


def inverse_transpose(
    square: Tensor,  # (d, d), U
) -> Tensor:  # (d, d), U^-T
    """In float64; not finite where U is singular. The scale of the rows would mislead the choice of pivots."""
    exact = square.double()
    scale = exact.norm(dim=1, keepdim=True)
    return torch.linalg.inv_ex(exact / scale).inverse.T / scale


def _scale(gram: Tensor, num_classes: int) -> Tensor:
    """The most that the norm of the sum of the rows can be: the scale on which its error matters."""
    return (num_classes * gram.trace()).sqrt().clamp(min=1e-30)
