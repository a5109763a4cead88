"""The queries of every screen: any leading shape, checked arguments, batches by parts."""

from collections.abc import Callable

import torch
from torch import Tensor

from lastlayer.functional.checks import check_count, check_hidden, check_positive
from lastlayer.functional.operators import outside_graphs
from lastlayer.functional.results import ScreenedTopK
from lastlayer.functional.sampling import sample_classes
from lastlayer.functional.selection import candidate_scores, make_selection
from lastlayer.screening.plan import BATCHES, Plan
from lastlayer.screening.screen_rows import ScreenRows

CHUNK_NUMBERS = 1 << 25  # of a (rows, V) tensor held at once
IGNORE_INDEX = -100  # in unused places of `exclude` and of the candidates of `score`


class Screen(ScreenRows):
    """A prepared preview of a weight, and its queries; `ScreenedSoftmax` says what they are."""

    def forward(
        self,
        hidden: Tensor,  # (..., d)
    ) -> Tensor:  # (..., V)
        """Logits, in hidden's dtype: exact for the candidates, the preview's for the rest; `logit_map` applied."""
        return self._each_row(hidden, lambda rows: self._logits(rows, False)).to(hidden.dtype)

    def log_prob(
        self,
        hidden: Tensor,  # (..., d)
    ) -> Tensor:  # (..., V)
        """Log-probabilities under the screen's own normaliser (float32, or float64)."""
        return self._each_row(hidden, lambda rows: self._logits(rows, True))

    @outside_graphs
    def topk(
        self,
        hidden: Tensor,  # (..., d)
        k: int,
        exact: bool | None = None,
        *,
        exclude: Tensor | None = None,  # (..., E)
        allowed: Tensor | None = None,  # (V,) bool, or (A,) class ids
    ) -> ScreenedTopK:
        """The k best of the rescored classes, best first; `1 <= k <= candidates`; `exact` as for the class.

        Args:
            exclude: class ids that must not be returned for their row, padded with -100.
            allowed: the only classes that may be returned, for all rows alike: a mask, or ids.

        Certificates are for the classes that are left, log-probabilities of the whole model. Where fewer than `k`
        classes are left, the last indices are -1 and their log-probabilities -inf.

        The more classes `exact` had to rescore, the closer the normaliser: for k > 1 log-probabilities may differ
        from those of `log_prob`, which rescores for the best class alone, and be nearer to the full layer's.
        """
        k = check_count("k", k, 1)
        if k > self.candidates:
            raise ValueError(
                f"k must be at most candidates, {self.candidates} of {self.out_features} classes; got {k}"
            )
        rows = self._checked_rows(hidden)
        shape = hidden.shape[:-1]
        selection = None
        if exclude is not None or allowed is not None:
            selection = make_selection(exclude, allowed, shape, self.out_features, IGNORE_INDEX, hidden.device)
        query = self._query(k, self.exact if exact is None else bool(exact), selection)
        most = self._rows_at_once()
        if len(rows) <= most:
            result = self._topk(rows, query)
        else:
            starts = range(0, len(rows), most)
            parts = (self._topk(rows[at : at + most], query.rows(slice(at, at + most))) for at in starts)
            result = ScreenedTopK(*(torch.cat(column) for column in zip(*parts, strict=True)))
        if hidden.dim() == 2:
            return result
        return ScreenedTopK(
            result.log_prob.view(*shape, k), result.indices.view(*shape, k), result.certified.reshape(shape)
        )

    def score(
        self,
        hidden: Tensor,  # (..., d)
        ids: Tensor,  # (..., C), class ids, padded with -100
    ) -> Tensor:  # (..., C), 0 where padded
        """Log-probabilities of given candidates: their exact logits, under the screen's own normaliser.

        Raises:
            TypeError, ValueError, IndexError: ids of another dtype or shape, or that are no classes.
        """
        rows = self._checked_rows(hidden)
        most = self._rows_at_once()

        def score(own: Tensor) -> Tensor:
            return torch.cat([self._score(*part) for part in zip(rows.split(most), own.split(most), strict=True)])

        return candidate_scores(score, ids, hidden.shape[:-1], self.out_features, IGNORE_INDEX)

    @torch.no_grad()
    def sample(
        self,
        hidden: Tensor,  # (..., d)
        num_samples: int = 1,
    ) -> Tensor:  # (..., num_samples)
        """Class ids drawn from `log_prob`, with replacement; seeded by `torch.manual_seed`."""
        num_samples = check_positive("num_samples", num_samples)
        return self._each_row(hidden, lambda rows: sample_classes(self._logits(rows, False), num_samples))

    @torch.no_grad()
    def log_normalizer_error(
        self,
        hidden: Tensor,  # (..., d)
    ) -> Tensor:  # (...)
        """The most by which the log-normaliser of `log_prob` can differ from the full layer's, for every row.

        Infinite where nothing is known. A `topk` that rescores more classes has another normaliser, as a rule a
        nearer one.
        """
        return self._each_row(hidden, self._normalizer_error)

    @outside_graphs
    @torch.no_grad()
    def preview_scores(
        self,
        hidden: Tensor,  # (..., d)
    ) -> Tensor:  # (..., V)
        """The preview's approximate logits of all classes, no candidate rescored."""
        return self._each_row(hidden, self._preview_scores)

    @torch.no_grad()
    def plan(
        self,
        hidden: Tensor | None = None,  # (..., d)
    ) -> Plan:
        """Times of the screen and of the full layer for 1, 8 and 64 rows, and which of them is used; a table.

        Measured when the screen was prepared, and again after `candidates` or `exact` was changed, on hidden
        states with the calibration's second moment (without calibration, on rows of the weight); not saved. With
        `hidden` it is measured anew, on these. Where `use="fastest"`, the full layer is also used while so many
        rows need it after the screen that the screen gains nothing.
        """
        if hidden is not None:
            rows = self._checked_rows(hidden)
            if not len(rows):
                raise ValueError(f"hidden must hold at least one hidden state, got shape {tuple(hidden.shape)}")
            self._plan = self._measured_plan(rows.repeat(-(-BATCHES[-1] // len(rows)), 1))
        return self._current_plan()

    @property
    def bytes_read(self) -> int:
        """Bytes that one query reads: the preview, and the candidates' rows."""
        return self._prepared.bytes_read + self.candidates * self.weight.shape[1] * self.weight.element_size()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, candidates={self.candidates}, "
            f"exact={self.exact}, preview={type(self.preview).__name__}"
        )

    def _checked_rows(self, hidden: Tensor) -> Tensor:  # (N, d), contiguous
        check_hidden(hidden, self.in_features, self.weight.dtype)
        self._check_fresh()
        rows = hidden if hidden.dim() == 2 else hidden.reshape(-1, self.in_features)
        return rows.resolve_neg().contiguous()

    def _rows_at_once(self) -> int:
        return max(1, CHUNK_NUMBERS // self.out_features)

    @outside_graphs
    def _each_row(self, hidden: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """`compute(rows)` of every chunk of rows, in hidden's leading shape."""
        parts = [compute(rows) for rows in self._checked_rows(hidden).split(self._rows_at_once())]
        together = parts[0] if len(parts) == 1 else torch.cat(parts)
        return together.reshape((*hidden.shape[:-1], *together.shape[1:]))
