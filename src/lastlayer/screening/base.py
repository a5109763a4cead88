"""What every screen does: queries by the engine, by plain PyTorch or by the full layer, and gradients."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lastlayer.functional.checks import check_choice, check_count, check_hidden, check_positive
from lastlayer.functional.logit_map import LogitMap, check_logit_map
from lastlayer.functional.outside_graphs import outside_graphs
from lastlayer.functional.precision import no_autocast
from lastlayer.functional.results import ScreenedTopK
from lastlayer.functional.sampling import sample_classes
from lastlayer.functional.selection import Selection, check_candidates, make_selection
from lastlayer.kernels import engine
from lastlayer.kernels.screening import Query
from lastlayer.screening.backend import Backend, backend_for, engine_takes
from lastlayer.screening.compiled import EngineScreen, Result
from lastlayer.screening.exact import full_logits, logits_at
from lastlayer.screening.plan import BATCHES, USES, Plan, Tally, Use, likely_states, measure_plan
from lastlayer.screening.preview import Preview
from lastlayer.screening.screen import Head, Limits, Screened, class_parts, screen
from lastlayer.screening.watched_head import WatchedHead

CHUNK_NUMBERS = 1 << 25  # of a (rows, V) tensor held at once
IGNORE_INDEX = -100  # in unused places of `exclude` and of the candidates of `score`

NO_GAIN = (
    "the full layer is faster than this screen at every batch size measured on this machine, so it computes the "
    "results (plan() shows the times, lastlayer.show_config() the instruction set); use='screen' forces the screen"
)


class Screen(WatchedHead):
    """A prepared preview of a weight, and the queries it answers; `ScreenedSoftmax` says what they are."""

    def __init__(
        self,
        weight: Tensor,  # (V, d)
        bias: Tensor | None = None,  # (V,)
        *,
        preview: Preview,
        candidates: int,
        logit_map: LogitMap | None = None,
        exact: bool = False,
        use: Use = "fastest",
        gram: Tensor | None = None,  # (d, d)
    ) -> None:
        super().__init__(weight, bias)
        if not isinstance(preview, Preview):
            raise TypeError(f"preview must be a Preview such as SVDPreview(64), got {type(preview).__name__}")
        self.candidates = candidates
        self.preview = preview
        self.logit_map = check_logit_map(logit_map)
        self.exact = exact
        self.use: Use = check_choice("use", use, USES)  # pyright: ignore[reportAttributeAccessIssue]
        self._prepare(gram)

    @property
    def candidates(self) -> int:
        """Classes a row whose exact logits are computed; may be changed, and the plan is then measured anew."""
        return self._candidates

    @candidates.setter
    def candidates(self, candidates: int) -> None:
        self._candidates = check_count("candidates", candidates, 1, self.out_features)
        self._forget_plan()

    @property
    def exact(self) -> bool:
        """The default of `topk`'s `exact`; may be changed as `candidates` may."""
        return self._exact

    @exact.setter
    def exact(self, exact: bool) -> None:
        self._exact = bool(exact)
        self._forget_plan()

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
        ids = check_candidates(ids, hidden.shape[:-1], self.out_features, IGNORE_INDEX)
        padded = ids == IGNORE_INDEX
        most = self._rows_at_once()
        parts = zip(rows.split(most), ids.masked_fill(padded, 0).split(most), strict=True)
        values = torch.cat([self._score(part, own) for part, own in parts]).masked_fill(padded, 0)
        return values.reshape(*hidden.shape[:-1], ids.shape[1])

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
        """Times of the screen and of the full layer for 1, 8 and 64 rows, and which of them answers; a table.

        Measured when the screen was prepared, and again after `candidates` or `exact` was changed, on hidden
        states with the calibration's second moment (without calibration, on rows of the weight); not saved. With
        `hidden` it is measured anew, on these. Where `use="fastest"`, the full layer also answers while so many
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

    @torch.no_grad()
    def refresh(self) -> None:
        """Prepares the preview of the weight as it is now; needed after it was changed, moved or replaced."""
        self._adopt()
        check_count("candidates", self.candidates, 1, self.out_features)
        self._prepare(None)

    @torch.no_grad()
    def _prepare(self, gram: Tensor | None) -> None:
        known = {"gram": gram} if gram is not None and self.preview.uses_gram else {}
        self._prepared = self.preview.prepare(self.weight, self.bias, **known)
        head = self._fixed_head()
        self._limits = Limits.of(head, self._prepared)
        self._compiled: EngineScreen | None = None
        self._mark_fresh()
        self._bars = self.bias is not None and bool(self.bias.isinf().any())
        self._forget_plan()
        self._current_plan()

    def _forget_plan(self) -> None:
        """After something was changed on which the times depend."""
        self._plan: Plan | None = None
        self._tally = Tally()
        self._warned = False

    @torch.no_grad()
    def _current_plan(self) -> Plan:
        """The plan, measured where there is none."""
        plan = self._plan
        if plan is None:
            self._check_fresh()
            plan = self._plan = self._measured_plan(self._likely_states())
        return plan

    def _measured_plan(self, states: Tensor) -> Plan:
        query = self._query(min(10, self.candidates), self.exact, None)
        return measure_plan(
            lambda rows: self._topk(rows, query, "screen"), lambda rows: self._topk(rows, query, "full"), states
        )

    def _likely_states(self) -> Tensor:  # (64, in_features)
        return likely_states(self.weight, getattr(self.preview, "calibration", None))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, candidates={self.candidates}, "
            f"exact={self.exact}, preview={type(self.preview).__name__}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_compiled": None}  # it holds addresses

    # Rows only, from here on.

    def _checked_rows(self, hidden: Tensor) -> Tensor:  # (N, d), contiguous
        check_hidden(hidden, self.in_features, self.weight.dtype)
        self._check_fresh()
        rows = hidden if hidden.dim() == 2 else hidden.reshape(-1, self.in_features)
        return rows.resolve_neg().contiguous()

    def _rows_at_once(self) -> int:
        return max(1, CHUNK_NUMBERS // self.out_features)

    @outside_graphs
    def _each_row(self, hidden: Tensor, answer: Callable[[Tensor], Tensor]) -> Tensor:
        """`answer(rows)` of every chunk of rows, in hidden's leading shape."""
        parts = [answer(rows) for rows in self._checked_rows(hidden).split(self._rows_at_once())]
        together = parts[0] if len(parts) == 1 else torch.cat(parts)
        return together.reshape((*hidden.shape[:-1], *together.shape[1:]))

    def _query(self, k: int, exact: bool, selection: Selection | None) -> Query:
        return Query(k, self.candidates, exact, *(selection or (None, None)))

    def _backend(self, rows: int, use: Use) -> Backend:
        """What answers so many rows, as `backend_for` says."""
        weight, full = self.weight, use == "full"
        if use == "fastest":
            plan = self._current_plan()
            full = self._tally.full_is_faster(plan.of(rows))
            if full and not plan.gains and not self._warned:
                self._warned = True
                warnings.warn(NO_GAIN, RuntimeWarning, stacklevel=2)
        return backend_for(
            rows=rows,
            num_classes=self.out_features,
            candidates=self.candidates,
            width=weight.shape[1],
            dtype=weight.dtype,
            device=weight.device,
            contiguous=weight.is_contiguous() and not weight.is_neg(),
            compiled=self._prepared.normalizer_shift is None and engine.available(),
            full_is_faster=full,
        )

    def _engine(self) -> EngineScreen | None:
        """The screen as the compiled engine takes it; None where the engine does not."""
        weight = self.weight
        as_it_is = weight.is_contiguous() and not weight.is_neg()
        if self._prepared.normalizer_shift is not None or not engine.available():
            return None
        if not engine_takes(weight.shape[1], weight.dtype, weight.device, as_it_is):
            return None
        if self._compiled is None:
            self._compiled = EngineScreen(self._fixed_head(), self._prepared, self._limits)
        return self._compiled

    def _fixed_head(self) -> Head:
        return Head(self.weight.detach(), None if self.bias is None else self.bias.detach())

    def _found(self, rows: Tensor, query: Query, use: Use) -> Result | Screened:
        """What the screen, or the full layer in its place, finds; by the engine an Result. Carries no gradient."""
        rows, compiled, backend = rows.detach(), self._engine(), self._backend(len(rows), use)
        if compiled is not None and len(rows):
            if backend == "full":
                self._tally.forget()
                return compiled.full(rows, query)
            result, unsettled = compiled.query(rows, query)
            self._tally.add(len(rows), unsettled)
            return result
        with no_autocast(rows.device.type):
            if backend == "full":
                return self._fixed_head().full(rows, query)
            return screen(self._fixed_head(), self._prepared, self._limits, rows, query)

    def _topk(self, rows: Tensor, query: Query, use: Use | None = None) -> ScreenedTopK:
        with torch.no_grad():
            found = self._found(rows, query, use or self.use)
            if isinstance(found, Result):
                if self.logit_map is None:
                    return ScreenedTopK(found.log_prob, found.indices, found.certified)
                values = found.logits.gather(-1, found.indices.clamp(min=0))
            else:
                values = found.values
            log_prob = self._normalised(self._mapped(values), found)
            return ScreenedTopK(
                log_prob.masked_fill(found.indices < 0, -torch.inf), found.indices, found.certified
            )

    def _logits(self, rows: Tensor, normalised: bool) -> Tensor:
        """Logits, or log-probabilities, of one chunk of rows."""
        query = self._query(1, self.exact, None)
        found = self._following(rows, query) if self._followed(rows) else self._found(rows, query, self.use)
        logits = self._mapped(found.logits)
        return self._normalised(logits, found) if normalised else logits

    def _score(self, rows: Tensor, ids: Tensor) -> Tensor:  # (N, d), (N, C) to (N, C)
        query = self._query(1, self.exact, None)
        found = self._following(rows, query) if self._followed(rows) else self._found(rows, query, self.use)
        with no_autocast(rows.device.type):
            exact = logits_at(rows, self.weight, self.bias, ids)
        return self._normalised(self._mapped(exact), found)

    def _preview_scores(self, rows: Tensor) -> Tensor:
        compiled = self._engine()
        with no_autocast(rows.device.type):
            return self._prepared.scores(rows) if compiled is None else compiled.scores(rows)

    def _normalizer_error(self, rows: Tensor) -> Tensor:  # (N,)
        query, use = self._query(1, self.exact, None), "full" if self.use == "full" else "screen"
        with no_autocast(rows.device.type):
            screened = screen(self._fixed_head(), self._prepared, self._limits, rows, query)
            error = self._prepared.error(rows).all().masked_fill(screened.rescored, 0.0)
        # the engine's scores are rounded in another way, so where they tie other classes may be candidates
        peak, used = self._normalizer(self._found(rows, query, use))
        above = (self._mapped(screened.logits + error) - peak).logsumexp(-1, keepdim=True) - used
        below = used - (self._mapped(screened.logits - error) - peak).logsumexp(-1, keepdim=True)
        return torch.maximum(above, below).clamp(min=0.0).nan_to_num(nan=torch.inf, posinf=torch.inf).squeeze(-1)

    def _followed(self, rows: Tensor) -> bool:
        """Whether autograd is to follow."""
        tensors = (rows, self.weight, self.bias)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)

    def _following(self, rows: Tensor, query: Query) -> Screened:
        """The screen's answer as a differentiable function, the choice of classes held fixed."""
        fixed = self._fixed_head()
        with no_autocast(rows.device.type):
            with torch.no_grad():
                if self._backend(len(rows), self.use) == "full":
                    screened = fixed.full(rows, query)
                else:
                    screened = screen(fixed, self._prepared, self._limits, rows, query)
            full = full_logits(rows, self.weight, self.bias)
            if bool(screened.rescored.all()):
                return screened._replace(logits=full)
            approximate = self._prepared.follow(rows, self.weight, self.bias)
            return screened._replace(logits=torch.where(screened.rescored, full, approximate))

    def _normalised(self, logits: Tensor, found: Result | Screened) -> Tensor:
        peak, log_mass = self._normalizer(found)
        return logits - peak - log_mass

    def _normalizer(self, found: Result | Screened) -> tuple[Tensor, Tensor]:  # (N, 1) each
        """The log-normaliser as two terms: one near the largest logit, and the rest, which a sum could lose."""
        if isinstance(found, Result):
            if self.logit_map is None:
                peak = found.log_normalizer.float()
                return peak, (found.log_normalizer - peak).float()
            logits = self._mapped(found.logits)  # the engine does not know the map
            peak = logits.amax(-1, keepdim=True)
            return peak, (logits - peak).logsumexp(-1, keepdim=True)
        shift, of_parts = self._prepared.normalizer_shift, []
        peak = torch.stack(
            [self._mapped(found.logits[:, at]).amax(-1) for at in class_parts(self.out_features)], -1
        )
        peak = peak.amax(-1, keepdim=True).detach()
        for at in class_parts(self.out_features):
            logits = found.logits[:, at]
            if shift is not None:
                logits = torch.where(found.rescored[:, at], logits, logits + shift[at])
            of_parts.append((self._mapped(logits) - peak).logsumexp(-1, keepdim=True))
        return peak, torch.cat(of_parts, dim=-1).logsumexp(-1, keepdim=True)

    def _mapped(self, logits: Tensor) -> Tensor:
        if self.logit_map is None:
            return logits
        if not self._bars:
            return self.logit_map(logits)
        barred = logits == -torch.inf
        return self.logit_map(logits.masked_fill(barred, 0.0)).masked_fill(barred, -torch.inf)
