"""The state of `FactoredOutput`: a weight kept as a product, so that an exact SGD step need not touch its rows."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lastlayer.functional.gram import gram_matrix
from lastlayer.functional.ordinary import ordinary
from lastlayer.kernels import factored as kernel
from lastlayer.kernels.backends import factored_backend_for

CHUNK_NUMBERS = 1 << 22  # numbers of the (V, d) factor that one pass over its rows holds at once
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

    A subclass may divide the rows of F among processes: all else is the same in each of them, and they call
    together every method that reads rows. It overrides what reads or changes the rows of targets, and `summed`,
    `first`, `own_rows` and `tensors`.

    Args:
        weight: `(V, d)`, the rows of this process; becomes the factor `F` itself, so pass a copy of what must not
            change.
    """

    groups: tuple[Any, ...] = ()  # groups of processes that together hold this state, and make each step together
    copies: Any = None  # the one among them whose processes take batches of their own

    def __init__(self, weight: Tensor) -> None:
        d = weight.shape[1]
        self.factor = weight.to(torch.promote_types(weight.dtype, torch.float32)).contiguous()  # F
        self.reading = self.factor.new_zeros(2 * d + 2, d)  # Q, U, offset, total: one product reads a batch
        self.inverse = self.factor.new_zeros(d, d)  # R
        self._reset_maps()
        self.refresh_gram()

    def like(self, weight: Tensor) -> "FactoredState":
        """The state of another weight of these classes."""
        return FactoredState(weight)

    @property
    def num_classes(self) -> int:
        """V, of all processes."""
        return len(self.factor)

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

    def read(
        self,
        hidden: Tensor,  # (N, d)
        ids: Tensor,  # (N, K)
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (N, 2 d + 2), (N, K), (N,), (N,)
        """The products of `hidden` with Q, U, offset and total; then in float64 target scores, squared norms and
        sums of the outputs. Differentiable in `hidden`."""
        if self.compiled() and not torch.is_grad_enabled() and ordinary(hidden, ids):
            return kernel.read(hidden.resolve_neg().contiguous(), self.reading, self.factor, ids.contiguous())
        products, d = hidden @ self.reading.T, self.features
        squared_norm = (products[:, :d] * hidden).sum(1).double().clamp(min=0)
        scores = self.target_scores(products[:, d : 2 * d], ids) + products[:, 2 * d, None]
        return products, scores.double(), squared_norm, products[:, 2 * d + 1].double()

    def compiled(self) -> bool:
        """Whether the compiled engine reads F, which it does where this process has all rows."""
        return factored_backend_for(self.factor.device, self.factor.dtype) == "compiled"

    # The rows of targets.

    def target_scores(
        self,
        mapped: Tensor,  # (N, d), hidden @ U^T
        ids: Tensor,  # (N, K)
    ) -> Tensor:  # (N, K)
        """`F_t (U h)`, differentiable; rows of F are gathered in pieces."""
        factor, (count, d) = self.factor, (ids.shape[1], self.features)

        def of_rows(ids: Tensor, mapped: Tensor) -> Tensor:
            return (factor.index_select(0, ids.reshape(-1)).view(-1, count, d) * mapped[:, None]).sum(2)

        if not ordinary(ids, mapped):  # a split would fix the batch of an export
            return of_rows(ids, mapped)
        rows = max(1, CHUNK_NUMBERS // (count * d))
        return torch.cat([of_rows(*parts) for parts in zip(ids.split(rows), mapped.split(rows), strict=True)])

    def target_sums(
        self,
        ids: Tensor,  # (N, K)
        by_score: Tensor,  # (N, K)
    ) -> Tensor:  # (N, d)
        """`Y F`."""
        return F.embedding_bag(ids, self.factor, per_sample_weights=by_score, mode="sum")

    def move(
        self,
        ids: Tensor,  # (N, K)
        by_score: Tensor,  # (N, K)
        solution: Tensor,  # (N, d), X
        rate: float,
    ) -> None:
        """`F <- F - rate Y^T X`."""
        if factored_backend_for(self.factor.device, self.factor.dtype) == "compiled":
            kernel.move_targets(self.factor, ids, by_score, solution, rate)
            return
        for classes, values in zip(ids.T, by_score.T, strict=True):  # one target of every row at a time
            self.factor.index_add_(0, classes, values[:, None] * solution, alpha=-rate)

    # Over all processes that divide the rows.

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum over the processes of what each has of its own rows."""
        return tensor

    def first(self, tensor: Tensor) -> Tensor:
        """What the first process has, for decisions that all must make alike, whatever their rounding."""
        return tensor

    def own_rows(self, tensor: Tensor) -> Tensor:
        """Of a `(V, ...)` tensor the rows of this process."""
        return tensor

    # Drift, and the parts that are computed anew.

    def consistency(self) -> Consistency:
        """The drift, measured from scratch: O(V d^2)."""
        exact = self.map.double()
        gram, total = self._measured_gram()
        most = (self.num_classes * gram.trace()).sqrt()  # that the norm of the sum of the rows can be
        return Consistency(
            self.inverse_drift(),
            float((self.gram - gram).norm() / gram.norm().clamp(min=1e-30)),
            float((self.total - total).norm() / most.clamp(min=1e-30)),
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
        for rows, weight in self._row_chunks():
            rows.copy_(weight)
        self._reset_maps()

    # Moves and checkpoints.

    def to(self, device: torch.device) -> None:
        """Moves every part, bit for bit."""
        self.factor, self.reading, self.inverse = (
            part.to(device) for part in (self.factor, self.reading, self.inverse)
        )

    def tensors(self) -> dict[str, Tensor]:
        """All parts by name, not copied: what a checkpoint keeps so that training resumes bit for bit."""
        return {"factor": self.factor, "reading": self.reading, "inverse": self.inverse}

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
        saved.factor = self.own_rows(tensors["factor"])
        saved.reading, saved.inverse = tensors["reading"], tensors["inverse"]
        saved.to(self.factor.device)
        same = saved.factor.dtype == self.factor.dtype
        if not same or not self._difference(saved) <= max(SAME_WEIGHT, torch.finfo(dtype).eps):
            return False
        self.factor.copy_(saved.factor)
        self.reading.copy_(saved.reading)
        self.inverse.copy_(saved.inverse)
        return True

    def _difference(self, other: "FactoredState") -> float:
        """`||W - other W|| / ||W||`."""
        squares = torch.zeros(2, dtype=torch.float64, device=self.factor.device)
        for (_, weight), (_, theirs) in zip(self._row_chunks(), other._row_chunks(), strict=True):
            squares += torch.stack([(weight - theirs).double().square().sum(), weight.double().square().sum()])
        square, norm = self.summed(squares)
        return float((square / norm.clamp(min=1e-300)).sqrt())

    def _reset_maps(self) -> None:
        eye = torch.eye(self.features, dtype=self.factor.dtype, device=self.factor.device)
        self.map.copy_(eye)
        self.inverse.copy_(eye)
        self.offset.zero_()

    def _measured_gram(self) -> tuple[Tensor, Tensor]:
        """`W^T W` and `W^T 1` in float64, from W a piece at a time: `U^T (F^T F) U` would square the condition."""
        sums = torch.zeros(self.features + 1, self.features, dtype=torch.float64, device=self.factor.device)
        for _, weight in self._row_chunks():
            sums[:-1] += gram_matrix(weight)
            sums[-1] += weight.sum(0, dtype=torch.float64)
        sums = self.summed(sums)
        return sums[:-1], sums[-1]

    def _row_chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Some rows of F after the other, and the same rows of W."""
        for rows in self.factor.split(max(1, CHUNK_NUMBERS // self.features)):
            yield rows, torch.addmm(self.offset, rows, self.map)


def inverse_transpose(
    square: Tensor,  # (d, d), U
) -> Tensor:  # (d, d), U^-T
    """In float64; not finite where U is singular. The scale of the rows would mislead the choice of pivots."""
    exact = square.double()
    scale = exact.norm(dim=1, keepdim=True)
    return torch.linalg.inv_ex(exact / scale).inverse.T / scale


def in_range(
    gram: Tensor,  # (d, d), Q
) -> bool:
    """Whether the weight is finite, and its squares far from the end of the range of their dtype."""
    return float(gram.diagonal().max()) < torch.finfo(gram.dtype).max / 16  # False for NaN
