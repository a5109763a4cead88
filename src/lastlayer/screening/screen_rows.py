"""A prepared screen and its results for rows: by the engine, by plain PyTorch or by the full layer; gradients."""

import warnings
from typing import Any

import torch
from torch import Tensor

from lastlayer.functional.checks import check_choice, check_count
from lastlayer.functional.logit_map import LogitMap, check_logit_map
from lastlayer.functional.precision import no_autocast
from lastlayer.functional.results import ScreenedTopK
from lastlayer.functional.selection import Selection
from lastlayer.kernels import engine
from lastlayer.kernels.screening import Query, Screened
from lastlayer.screening.compiled import EngineScreen, PreparedByLibrary
from lastlayer.screening.exact import full_logits, logits_at
from lastlayer.screening.plan import (
    USES,
    Backend,
    Plan,
    Tally,
    Use,
    backend_for,
    engine_takes,
    likely_states,
    measure_plan,
)
from lastlayer.screening.preview import Preview
from lastlayer.screening.screen import Head, Limits, full_layer, log_sum_exp, screen
from lastlayer.screening.watched_head import WatchedHead

NO_GAIN = (
    "the full layer is faster than this screen at every batch size measured on this machine, so it computes the "
    "results (plan() shows the times, lastlayer.show_config() the instruction set); use='screen' forces the screen"
)


class ScreenRows(WatchedHead):
    """What a screen holds, and what it computes for rows `(N, d)` that are already checked."""

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
        self._limits = Limits.of(self._fixed_head(), self._prepared)
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

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_compiled": None}  # it holds addresses

    def _fixed_head(self) -> Head:
        return Head(self.weight.detach(), None if self.bias is None else self.bias.detach())

    def _query(self, k: int, exact: bool, selection: Selection | None) -> Query:
        return Query(k, self.candidates, exact, *(selection or (None, None)))

    def _is_compiled(self) -> bool:
        return isinstance(self._prepared, PreparedByLibrary) and engine.available()

    def _backend(self, rows: int, use: Use) -> Backend:
        """What computes the results of so many rows, as `backend_for` says."""
        full = use == "full"
        if use == "fastest":
            plan = self._current_plan()
            full = self._tally.full_is_faster(plan.of(rows))
            if full and not plan.gains and not self._warned:
                self._warned = True
                warnings.warn(NO_GAIN, RuntimeWarning, stacklevel=2)
        sizes = {"rows": rows, "candidates": self.candidates}
        return backend_for(self.weight, **sizes, compiled=self._is_compiled(), full_is_faster=full)

    def _engine(self) -> EngineScreen | None:
        """The screen as the compiled engine takes it; None where the engine does not."""
        if not (self._is_compiled() and engine_takes(self.weight)):
            return None
        if self._compiled is None:
            self._compiled = EngineScreen(self._fixed_head(), self._prepared, self._limits)
        return self._compiled

    def _found(self, rows: Tensor, query: Query, use: Use, *, plain: bool = False) -> Screened:
        """What the screen, or the full layer in its place, finds, without a gradient.

        The plain code also tells which classes were rescored.
        """
        rows, backend = rows.detach(), self._backend(len(rows), use)
        if backend == "full":
            self._tally.forget()
            with no_autocast(rows.device.type):
                return full_layer(self._fixed_head(), rows, query)
        compiled = None if plain else self._engine()
        if compiled is not None and len(rows):
            found, unsettled = compiled.query(rows, query)
            self._tally.add(len(rows), unsettled)
            return found
        with no_autocast(rows.device.type):
            return screen(self._fixed_head(), self._prepared, self._limits, rows, query)

    def _topk(self, rows: Tensor, query: Query, use: Use | None = None) -> ScreenedTopK:
        with torch.no_grad():
            found = self._found(rows, query, use or self.use)
            log_prob = found.log_prob
            if self.logit_map is not None:
                logits = found.logits.gather(-1, found.indices.clamp(min=0))
                log_prob = self._normalised(self._mapped(logits), found)
                log_prob = log_prob.masked_fill(found.indices < 0, -torch.inf)
            return ScreenedTopK(log_prob, found.indices, found.certified)

    def _logits(self, rows: Tensor, normalised: bool) -> Tensor:
        """Logits, or log-probabilities, of one chunk of rows."""
        found = self._whole(rows)
        logits = self._mapped(found.logits)
        return self._normalised(logits, found) if normalised else logits

    def _score(self, rows: Tensor, ids: Tensor) -> Tensor:  # (N, d), (N, C) to (N, C)
        found = self._whole(rows)
        with no_autocast(rows.device.type):
            exact = logits_at(rows, self.weight, self.bias, ids)
        return self._normalised(self._mapped(exact), found)

    def _preview_scores(self, rows: Tensor) -> Tensor:
        compiled = self._engine()
        with no_autocast(rows.device.type):
            return self._prepared.scores(rows) if compiled is None else compiled.scores(rows)

    def _normalizer_error(self, rows: Tensor) -> Tensor:  # (N,)
        query, use = self._query(1, self.exact, None), "full" if self.use == "full" else "screen"
        found = self._found(rows, query, use, plain=True)
        logits, error = found.logits, torch.zeros_like(found.logits)
        if found.rescored is not None:
            with no_autocast(rows.device.type):
                error = self._prepared.error(rows).all().masked_fill(found.rescored, 0.0)
        # the engine's scores are rounded in another way, so where they tie other classes may be candidates
        used = self._log_normalizer(self._found(rows, query, use))
        above = log_sum_exp(self._mapped(logits + error)) - used
        below = used - log_sum_exp(self._mapped(logits - error))
        most = torch.maximum(above, below).clamp(min=0.0).nan_to_num(nan=torch.inf, posinf=torch.inf)
        return most.squeeze(-1).to(logits.dtype)

    def _whole(self, rows: Tensor) -> Screened:
        """The result for all classes; where autograd is to follow, differentiable for the choice of classes."""
        query, tensors = self._query(1, self.exact, None), (rows, self.weight, self.bias)
        if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
            return self._found(rows, query, self.use)
        with torch.no_grad():
            found = self._found(rows, query, self.use, plain=True)
        with no_autocast(rows.device.type):
            logits = full_logits(rows, self.weight, self.bias)
            if found.rescored is not None and not bool(found.rescored.all()):
                approximate = self._prepared.follow(rows, self.weight, self.bias)
                logits = torch.where(found.rescored, logits, approximate)
        return found._replace(logits=logits, log_normalizer=log_sum_exp(logits))

    def _normalised(self, logits: Tensor, found: Screened) -> Tensor:
        """In two subtractions, as a large log-normaliser has no digits left for the rest in float32."""
        log_normalizer = self._log_normalizer(found)
        near = log_normalizer.to(logits.dtype)
        return logits - near - (log_normalizer - near).to(logits.dtype)

    def _log_normalizer(self, found: Screened) -> Tensor:  # (N, 1), float64
        return found.log_normalizer if self.logit_map is None else log_sum_exp(self._mapped(found.logits))

    def _mapped(self, logits: Tensor) -> Tensor:
        if self.logit_map is None:
            return logits
        if not self._bars:
            return self.logit_map(logits)
        barred = logits == -torch.inf
        return self.logit_map(logits.masked_fill(barred, 0.0)).masked_fill(barred, -torch.inf)
