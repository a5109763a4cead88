"""Screened queries of a layer whose classes are divided among ranks: each screens its own rows."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lastlayer.distributed.collectives import gathered, largest, summed
from lastlayer.distributed.full import ShardedSoftmaxHead
from lastlayer.distributed.one_vs_all import ShardedOneVsAll
from lastlayer.distributed.queries import best_of_ranks, sample_of_ranks, selection_of
from lastlayer.distributed.ranks import Ranks, local, places_in
from lastlayer.functional.changes import count_of_changes
from lastlayer.functional.checks import check_count, check_hidden, check_positive
from lastlayer.functional.partial_softmax import LEAST, mapped
from lastlayer.functional.precision import exact_dtype
from lastlayer.functional.results import ScreenedTopK
from lastlayer.functional.selection import Selection, candidate_scores, make_selection
from lastlayer.screening.base import IGNORE_INDEX
from lastlayer.screening.exact import logits_at
from lastlayer.screening.preview import Preview
from lastlayer.screening.screened import ScreenedSoftmax


class ShardedScreen(nn.Module):
    """`ScreenedSoftmax` over ranks: each screens its own rows of a sharded layer, and the best of all are merged.

    `topk` is certified where every rank has proved its own k best: then the k best of these are the full
    layer's, by exact logits. The log-normaliser is that of all ranks' screens, and `log_normalizer_error` adds
    their bounds up. All ranks must call it together, with the same hidden states; it carries no gradient. Of N
    rows `topk` sends `2 N k` numbers of each rank (logits and ids) and 3 N.

    The weight is the sharded layer's own, kept by reference: after it was trained on, `refresh()` on all ranks.

    Args:
        layer: a `FullSoftmax`, `SampledSoftmax` or `OneVsAll` that was sharded.
        preview: as for `ScreenedSoftmax`: each rank prepares its own.
        candidates: classes a row and rank whose exact logits are computed; at most V.
        exact, use: as for `ScreenedSoftmax`.

    Raises:
        TypeError, ValueError: a layer that is not sharded or does not end in one matrix; as `ScreenedSoftmax`.

    When not to use it: in training, for large batches, for a few thousand classes a rank.
    """

    def __init__(self, layer: Any, *, preview: Preview, candidates: int, **settings: Any) -> None:
        super().__init__()
        if not isinstance(layer, ShardedSoftmaxHead | ShardedOneVsAll):
            raise TypeError(
                "layer must be a FullSoftmax, SampledSoftmax or OneVsAll that shard has divided, got "
                f"{type(layer).__name__}; of one process use ScreenedSoftmax.from_layer"
            )
        self.ranks: Ranks = layer.ranks
        self.in_features, self.out_features = layer.in_features, layer.num_classes
        self.candidates = check_count("candidates", candidates, 1, self.out_features)
        self.exact = bool(settings.get("exact", False))
        self._layer = (layer,)  # of a tuple, so that it is no submodule
        self._preview, self._settings = preview, settings
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Prepares the previews of the weight as it is now; needed on all ranks after it was changed."""
        (layer,) = self._layer
        weight, bias = (None if p is None else local(p) for p in (layer.weight, layer.bias))
        assert weight is not None
        self.dtype, self.screen = weight.dtype, None
        self.logit_map = _plain(getattr(layer, "logit_map", None))
        self._prepared_for = self._stamp()
        if len(weight) and (bias is None or bool((bias > -torch.inf).any())):
            settings = {"preview": self._preview, "logit_map": self.logit_map, **self._settings}
            least = min(self.candidates, len(weight))  # of a rank with fewer classes, all
            self.screen = ScreenedSoftmax(weight, bias, candidates=least, **settings)

    def _stamp(self) -> list[tuple[int, int]]:
        """Changes with the weight and bias: which DTensors, and how often these were written."""
        (layer,) = self._layer
        return [
            (id(tensor), count_of_changes(tensor)) for tensor in (layer.weight, layer.bias) if tensor is not None
        ]

    @torch.no_grad()
    def topk(
        self,
        hidden: Tensor,  # (..., d)
        k: int,
        exact: bool | None = None,
        *,
        exclude: Tensor | None = None,  # (..., E)
        allowed: Tensor | None = None,  # (V,) bool, or (A,) class ids
    ) -> ScreenedTopK:
        """The k best, as `ScreenedSoftmax.topk`; `1 <= k <= candidates`."""
        k = check_count("k", k, 1, self.candidates)
        rows, shape = self._rows(hidden), hidden.shape[:-1]
        selection = make_selection(exclude, allowed, shape, self.out_features, IGNORE_INDEX, hidden.device)
        values, ids, certified, peak, log_mass = self._own_best(rows, k, exact, selection)
        values, ids = best_of_ranks(values, ids, self.ranks)
        peak, log_mass = self._of_ranks(peak, log_mass)
        log_prob = mapped(values, self.logit_map) - peak[:, None] - log_mass[:, None]
        ids = ids.masked_fill(values == -torch.inf, -1)
        proved = -largest(-certified.to(values.dtype), self.ranks) > 0
        return ScreenedTopK(log_prob.reshape(*shape, k), ids.reshape(*shape, k), proved.reshape(shape))

    @torch.no_grad()
    def log_prob(
        self,
        hidden: Tensor,  # (..., d)
    ) -> Tensor:  # (..., V)
        """Log-probabilities under the screens' own normaliser, on every rank: sends as many numbers."""
        rows = self._rows(hidden)
        logits, peak, log_mass = self._own_logits(rows)
        whole = gathered(logits, self.ranks.spans(self.out_features), self.ranks)
        peak, log_mass = self._of_ranks(peak, log_mass)
        return (whole - peak[:, None] - log_mass[:, None]).reshape(*hidden.shape[:-1], self.out_features)

    @torch.no_grad()
    def score(
        self,
        hidden: Tensor,  # (..., d)
        ids: Tensor,  # (..., C), class ids, padded with -100
    ) -> Tensor:  # (..., C), 0 where padded
        """Log-probabilities of given candidates: their exact logits, under the screens' own normaliser."""
        rows = self._rows(hidden)

        def score(ids: Tensor) -> Tensor:
            _, _, _, peak, log_mass = self._own_best(rows, 1, None, None)
            peak, log_mass = self._of_ranks(peak, log_mass)
            (places, here), values = places_in(self._own(), ids), peak.new_zeros(ids.shape)
            if self.screen is not None:
                at = self._logits_at(rows, places)
                values = torch.where(here, mapped(at, self.logit_map) - peak[:, None], 0.0)
            return summed(values, self.ranks) - log_mass[:, None]

        return candidate_scores(score, ids, hidden.shape[:-1], self.out_features, IGNORE_INDEX)

    @torch.no_grad()
    def sample(
        self,
        hidden: Tensor,  # (..., d)
        num_samples: int = 1,
    ) -> Tensor:  # (..., num_samples)
        """Class ids drawn from `log_prob`, with the first rank's random numbers."""
        num_samples = check_positive("num_samples", num_samples)
        logits, _, _ = self._own_logits(self._rows(hidden))
        own = self._own()
        classes = torch.arange(own.start, own.stop, device=hidden.device)
        drawn = sample_of_ranks(logits, classes, num_samples, self.ranks)
        return drawn.reshape(*hidden.shape[:-1], num_samples)

    @torch.no_grad()
    def log_normalizer_error(
        self,
        hidden: Tensor,  # (..., d)
    ) -> Tensor:  # (...)
        """The most by which the log-normaliser of `log_prob` can differ from the full layer's, for every row.

        With L_r a rank's log-normaliser and e_r the bound of its error, that of all is within
        `logsumexp(L_r ± e_r)`.
        """
        rows = self._rows(hidden)
        _, _, _, peak, log_mass = self._own_best(rows, 1, None, None)
        error = torch.zeros_like(peak) if self.screen is None else self.screen.log_normalizer_error(rows).to(peak)
        whole = self._of_ranks(peak, log_mass)[1]
        above = self._of_ranks(peak, log_mass + error)[1] - whole
        below = whole - self._of_ranks(peak, log_mass - error)[1]
        found = torch.maximum(above, below).clamp(min=0).nan_to_num(nan=torch.inf, posinf=torch.inf)
        return found.reshape(hidden.shape[:-1])

    def extra_repr(self) -> str:
        return f"out_features={self.out_features}, candidates={self.candidates}, ranks={self.ranks.size}"

    # Rows only, from here on.

    def _rows(self, hidden: Tensor) -> Tensor:
        check_hidden(hidden, self.in_features, self.dtype)
        if self._stamp() != self._prepared_for:
            raise RuntimeError(
                "the weight was changed since the preview was prepared: call refresh() on all ranks"
            )
        return hidden.reshape(-1, self.in_features)

    def _own(self) -> slice:
        return self.ranks.span(self.out_features)

    def _of_ranks(self, peak: Tensor, log_mass: Tensor) -> tuple[Tensor, Tensor]:  # (N,) each
        """The log-normaliser of all ranks as two terms, one of them a large one."""
        whole = largest(peak, self.ranks)
        return whole, summed((log_mass + peak - whole).exp(), self.ranks).log()

    def _own_best(
        self, rows: Tensor, k: int, exact: bool | None, selection: Selection | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Of this rank: raw logits and classes `(N, k)`, certificates, and its log-normaliser in two terms."""
        dtype, own = exact_dtype(rows.dtype), self._own()
        values = rows.new_full((len(rows), k), -torch.inf, dtype=dtype)
        ids = torch.zeros_like(values, dtype=torch.int64)
        certified = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        peak, log_mass = (rows.new_full((len(rows),), LEAST, dtype=dtype) for _ in range(2))
        if self.screen is None or not len(rows):
            return values, ids, certified, peak, log_mass
        count = min(k, own.stop - own.start)
        best = self._selected(self.screen, rows, count, exact, selection_of(selection, own))
        found = self._logits_at(rows, best.indices.clamp(min=0)).masked_fill(best.indices < 0, -torch.inf)
        values[:, :count], ids[:, :count] = found, best.indices.clamp(min=0) + own.start
        # The best one's logit and log-probability give the normaliser; of a row with none left, its best without.
        peak, log_mass = mapped(found[:, 0], self.logit_map), -best.log_prob[:, 0].to(dtype)
        at = (best.indices[:, 0] < 0).nonzero()[:, 0]
        if len(at):
            again = self.screen.topk(rows[at], 1, exact)
            peak[at] = mapped(self._logits_at(rows[at], again.indices), self.logit_map)[:, 0]
            log_mass[at] = -again.log_prob[:, 0].to(dtype)
        return values, ids, best.certified, peak, log_mass

    def _selected(
        self, screen: ScreenedSoftmax, rows: Tensor, k: int, exact: bool | None, selection: Selection | None
    ) -> ScreenedTopK:
        """The best of this rank's classes, by their rows."""
        if selection is None:
            return screen.topk(rows, k, exact)
        exclude, barred = selection
        if barred is not None and bool(barred.all()):  # none of this rank's classes
            nothing = rows.new_full((len(rows), k), -torch.inf)
            proved = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
            return ScreenedTopK(nothing, torch.full_like(nothing, -1, dtype=torch.int64), proved)
        if exclude is not None:
            exclude = exclude.masked_fill(exclude == screen.out_features, IGNORE_INDEX)
        return screen.topk(rows, k, exact, exclude=exclude, allowed=None if barred is None else ~barred)

    def _own_logits(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mapped logits `(N, W)`, approximate but for the candidates, and the log-normaliser in two terms."""
        dtype = exact_dtype(rows.dtype)
        nothing = rows.new_full((len(rows),), LEAST, dtype=dtype)
        if self.screen is None or not len(rows):
            return rows.new_zeros(len(rows), self._own().stop - self._own().start, dtype=dtype), nothing, nothing
        log_prob = self.screen.log_prob(rows).to(dtype)
        _, _, _, peak, log_mass = self._own_best(rows, 1, None, None)
        return log_prob + log_mass[:, None] + peak[:, None], peak, log_mass

    def _logits_at(self, rows: Tensor, places: Tensor) -> Tensor:  # (N, M)
        assert self.screen is not None
        return logits_at(rows, self.screen.weight, self.screen.bias, places)


def _plain(logit_map: Any) -> Any:
    """A logit map with plain parameters, in place of DTensors."""
    if logit_map is None:
        return None

    made = copy.deepcopy(logit_map)
    for module in made.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            with torch.no_grad():
                module.register_parameter(name, nn.Parameter(local(parameter), requires_grad=False))
    return made
