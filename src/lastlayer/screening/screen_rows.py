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
from lastlayer.kernels.screening import Outputs, Query
from lastlayer.screening.backend import Backend, backend_for, engine_takes
from lastlayer.screening.compiled import EngineScreen
from lastlayer.screening.exact import full_logits, logits_at
from lastlayer.screening.plan import USES, Plan, Tally, Use, likely_states, measure_plan
from lastlayer.screening.preview import Preview
from lastlayer.screening.screen import Head, Limits, Screened, class_parts, screen
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

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_compiled": None}  # it holds addresses

    def _query(self, k: int, exact: bool, selection: Selection | None) -> Query:
        return Query(k, self.candidates, exact, *(selection or (None, None)))

    def _backend(self, rows: int, use: Use) -> Backend:
        """What computes the results of so many rows, as `backend_for` says."""
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

    def _found(self, rows: Tensor, query: Query, use: Use) -> Outputs | Screened:
        """What the screen, or the full layer in its place, finds, without a gradient; `Outputs` of the engine."""
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
            if isinstance(found, Outputs):
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
        """The result as a differentiable function, the choice of classes held fixed."""
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

    def _normalised(self, logits: Tensor, found: Outputs | Screened) -> Tensor:
        peak, log_mass = self._normalizer(found)
        return logits - peak - log_mass

    def _normalizer(self, found: Outputs | Screened) -> tuple[Tensor, Tensor]:  # (N, 1) each
        """The log-normaliser as two terms: one near the largest logit, and the rest, which a sum could lose."""
        if isinstance(found, Outputs):
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
