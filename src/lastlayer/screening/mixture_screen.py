"""A mixture of softmaxes over one weight, screened: one preview of the weight serves every component."""

from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from lastlayer.functional.precision import exact_dtype, no_autocast
from lastlayer.functional.results import ScreenedTopK
from lastlayer.kernels.screening import Query
from lastlayer.screening.base import Screen
from lastlayer.screening.exact import full_logits
from lastlayer.screening.plan import BATCHES, Plan, Use
from lastlayer.screening.preview import Preview
from lastlayer.screening.saved import MIXTURE, load_screen, save_screen
from lastlayer.screening.screen import MOST_WIDENED, permitted


class Mixed(NamedTuple):
    """What is known of some rows' components."""

    logits: Tensor  # (N, K, V), raw; exact where `rescored`
    error: Tensor  # (N, K, V), the most by which they are wrong; 0 where exact
    rescored: Tensor  # (N, V), bool
    log_prior: Tensor  # (N, K)
    peak: Tensor  # (N, K), near the largest mapped logit: subtracted first, as large logits leave sums no digits


class Ranked(NamedTuple):
    """The best of the rescored classes."""

    log_prob: Tensor  # (N, k), best first
    indices: Tensor  # (N, k)
    certified: Tensor  # (N,), bool
    in_play: Tensor  # (N, V), bool: could be among the k best, as far as is proved


class Normalizers(NamedTuple):
    """Each component's log-sum-exp, less `peak`: as used, and between what it is proved to be; `(N, K)` each."""

    used: Tensor
    low: Tensor
    high: Tensor


class ScreenedMixture(Screen):
    """A `MixtureOfSoftmaxes` queried by one preview of its weight; `ScreenedSoftmax.from_layer(mixture)` makes it.

    The preview scores all classes for the K latents of a query in one pass over its rows. The `candidates` best
    classes of the approximate mixture get exact logits in every component, for one read of their rows of the
    weight. Log-probabilities are mixed in log space, each component under its own normaliser: the log-sum-exp of
    the exact logits and the scores of the rest.

    `certified` says that the classes and their order are proved to be the full mixture's, ties aside. With
    `z_k` the logits, `e_k` their error bounds (0 where exact) and `Z_k` the true normalisers,

        Z_k is between lse_c f(z_kc - e_kc) and lse_c f(z_kc + e_kc)
        log P(c) <= lse_k (log π_k + f(z_kc + e_kc) - low Z_k)                  what was not rescored is below this
        P(a) - P(b) = Σ_k π_k exp(-Z_k) (exp f(z_ka) - exp f(z_kb))              at its least for each pair of best

    where the last takes the low end of `exp(-Z_k)` for the components that prefer a, the high one for the others:
    normalisers matter only where components disagree. `exact=True` rescores the classes in play, and where that
    proves too little computes the full mixture.

    `forward` gives log-probabilities, which are logits. `log_normalizer_error` bounds the error of any component's
    normaliser, and with it that of a rescored class's log-probability. While a query runs, it holds some
    `(N, K, V)` numbers, a chunk of rows at a time. Not for large batches, where the full mixture runs.
    """

    def __init__(self, layer: Any, *, preview: Preview, candidates: int, **settings: Any) -> None:
        if not is_mixture(layer):
            raise TypeError(f"layer must be a mixture with latents() and log_prior(), got {type(layer).__name__}")
        settings = {"logit_map": layer.logit_map, **settings}
        super().__init__(layer.weight, layer.bias, preview=preview, candidates=candidates, **settings)
        self.layer = layer
        self.in_features = layer.in_features
        self.watch(layer)
        self._plan = self._measured_plan(self._likely_states())

    def save(self, folder: str | Path, include_weight: bool = False) -> None:
        """Writes the screen as `ScreenedSoftmax.save` does, but never its layer: keep the layer's `state_dict`."""
        if include_weight:
            raise TypeError("a screened mixture is saved without its layer: save the layer's state_dict beside it")
        save_screen(self, Path(folder), False, MIXTURE)

    @classmethod
    def load(cls, folder: str | Path, layer: Any) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Reads what `save` wrote, for a layer with the weight and bias that it was saved for.

        Raises ValueError as `ScreenedSoftmax.load` does.
        """
        if not is_mixture(layer):
            raise TypeError(f"layer must be a mixture with latents() and log_prior(), got {type(layer).__name__}")
        return cls(layer, **load_screen(Path(folder), layer.weight, layer.bias, MIXTURE)[2])

    def _adopt(self) -> None:
        super()._adopt()
        self.in_features = self.layer.in_features

    def _head_of(self, source: Any) -> tuple[Tensor, Tensor | None]:
        return source.weight, source.bias

    def _measured_plan(self, states: Tensor) -> Plan:
        return (
            super()._measured_plan(states) if hasattr(self, "layer") else Plan(())
        )  # made again when it is there

    def _likely_states(self) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(0)
        states = torch.randn(BATCHES[-1], self.in_features, generator=generator, device="cpu")
        return states.to(self.weight.dtype).to(self.weight.device)

    def _rows_at_once(self) -> int:
        components = self.layer.latents(self.weight.new_zeros(1, self.in_features)).shape[1]
        return max(1, super()._rows_at_once() // max(1, components))

    def _topk(self, rows: Tensor, query: Query, use: Use | None = None) -> ScreenedTopK:
        with torch.no_grad():
            ranked = self._mixed(rows, query, use or self.use)[1]
        return ScreenedTopK(ranked.log_prob, ranked.indices, ranked.certified)

    def _score(self, rows: Tensor, ids: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # the candidates' exact logits alone would lose the normaliser's gradient
            return self._logits(rows, True).gather(1, ids)
        mixed, _ = self._mixed(rows, self._query(1, self.exact, None), self.use)
        shares = mixed.log_prior - self._used_normalizers(mixed)  # of the mixture that `log_prob` is of
        with no_autocast(rows.device.type):
            exact = self._exact_logits(self._components(rows)[0], ids)
        return (self._below_peak(mixed, exact) + shares[..., None]).logsumexp(1)

    def _normalizer_error(self, rows: Tensor) -> Tensor:
        used, low, high = self._normalizers(self._mixed(rows, self._query(1, self.exact, None), self.use)[0])
        return torch.maximum(high - used, used - low).amax(-1).nan_to_num(nan=torch.inf, posinf=torch.inf)

    def _preview_scores(self, rows: Tensor) -> Tensor:
        """The log-probabilities of the mixture of the preview's scores, no candidate rescored."""
        return self._log_prob(self._scored(*self._components(rows)))

    def _logits(self, rows: Tensor, normalised: bool) -> Tensor:
        with torch.no_grad():
            mixed, _ = self._mixed(rows, self._query(1, self.exact, None), self.use)
        if torch.is_grad_enabled():
            with no_autocast(rows.device.type):
                latents, log_prior = self._components(rows)
                flat = latents.flatten(0, 1)
                full = full_logits(flat, self.weight, self.bias).view_as(mixed.logits)
                approximate = self._prepared.follow(flat, self.weight, self.bias).view_as(mixed.logits)
            logits = torch.where(mixed.rescored[:, None], full, approximate)
            mixed = mixed._replace(logits=logits, log_prior=log_prior)
        return self._log_prob(mixed)

    def _components(self, rows: Tensor) -> tuple[Tensor, Tensor]:  # (N, K, d), (N, K)
        return self.layer.latents(rows), self.layer.log_prior(rows)

    def _mixed(self, rows: Tensor, query: Query, use: Use) -> tuple[Mixed, Ranked]:
        """The candidates rescored, and with `exact` whatever else must be; and the k best."""
        latents, log_prior = self._components(rows)
        with no_autocast(rows.device.type):
            if self._backend(len(rows), use) == "full":
                mixed = self._full(latents, log_prior)
                return mixed, self._rank(mixed, query)
            mixed = self._scored(latents, log_prior)
            allowed = permitted(query, self._log_prob(mixed))
            self._rescore(latents, mixed, allowed.topk(query.candidates, sorted=False).indices)
            ranked = self._rank(mixed, query)
            if query.exact and not bool(ranked.certified.all()):
                self._widen(latents, mixed, ranked, query)
                ranked = self._rank(mixed, query)
                finite = self._used_normalizers(mixed).isfinite().all(-1)
                ranked = ranked._replace(certified=finite)
            return mixed, ranked

    def _scored(self, latents: Tensor, log_prior: Tensor) -> Mixed:
        """Every logit by the preview."""
        shape, compiled = (*latents.shape[:2], self.out_features), self._engine()
        flat = latents.flatten(0, 1).contiguous()
        scores = (self._prepared if compiled is None else compiled).scores(flat).view(shape)
        error = self._prepared.error(flat).all().view(shape)
        rescored = torch.zeros(shape[0], shape[2], dtype=torch.bool, device=scores.device)
        return Mixed(scores, error, rescored, log_prior.to(scores.dtype), self._mapped(scores).amax(-1))

    def _full(self, latents: Tensor, log_prior: Tensor) -> Mixed:
        """Every logit exact."""
        logits = full_logits(latents.flatten(0, 1), self.weight, self.bias).view(
            *latents.shape[:2], len(self.weight)
        )
        rescored = torch.ones(len(logits), self.out_features, dtype=torch.bool, device=logits.device)
        peak = self._mapped(logits).amax(-1)
        return Mixed(logits, torch.zeros_like(logits), rescored, log_prior.to(logits.dtype), peak)

    def _exact_logits(self, latents: Tensor, classes: Tensor) -> Tensor:  # (N, C) to (N, K, C)
        """Exact logits of some classes of each row, in all components, from one copy of their weight rows."""
        dtype = exact_dtype(self.weight.dtype)
        rows = self.weight.index_select(0, classes.reshape(-1)).to(dtype)
        exact = latents.to(dtype) @ rows.view(*classes.shape, self.weight.shape[1]).transpose(1, 2)
        return exact if self.bias is None else exact + self.bias.to(dtype)[classes][:, None]

    def _rescore(self, latents: Tensor, mixed: Mixed, classes: Tensor) -> None:  # (N, C)
        exact = self._exact_logits(latents, classes)
        at = classes[:, None].expand_as(exact)
        mixed.logits.scatter_(2, at, exact)
        mixed.error.scatter_(2, at, 0.0)
        mixed.rescored.scatter_(1, classes, True)

    def _widen(self, latents: Tensor, mixed: Mixed, ranked: Ranked, query: Query) -> None:
        """Rescores, in open rows, what is in play; and where that proves too little, everything."""
        for row in (~ranked.certified).nonzero().squeeze(1).tolist():
            own = slice(row, row + 1)
            one = Mixed(*(part[own] for part in mixed))
            more = (ranked.in_play[own] & ~one.rescored)[0].nonzero().T
            if more.shape[1] <= self.out_features // MOST_WIDENED:
                self._rescore(latents[own], one, more)
                if bool(self._rank(one, query.rows(own)).certified):
                    continue
            for part, exact in zip(one, self._full(latents[own], one.log_prior), strict=True):
                part.copy_(exact)

    def _normalizers(self, mixed: Mixed) -> Normalizers:
        logits, error = mixed.logits, mixed.error
        slack = _slack(logits)
        low = self._below_peak(mixed, logits - error).logsumexp(-1) - slack
        high = self._below_peak(mixed, logits + error).logsumexp(-1) + slack
        return Normalizers(self._used_normalizers(mixed), low, high)

    def _used_normalizers(self, mixed: Mixed) -> Tensor:  # (N, K)
        return self._below_peak(mixed, mixed.logits).logsumexp(-1)

    def _log_prob(self, mixed: Mixed) -> Tensor:  # (N, V)
        shares = mixed.log_prior - self._used_normalizers(mixed)
        return (self._below_peak(mixed, mixed.logits) + shares[..., None]).logsumexp(1)

    def _below_peak(self, mixed: Mixed, logits: Tensor) -> Tensor:  # (N, K, V)
        return self._mapped(logits) - mixed.peak[..., None]

    def _rank(self, mixed: Mixed, query: Query) -> Ranked:
        """The k best of the rescored classes, and what is proved of them."""
        k = query.k
        used, low, high = self._normalizers(mixed)
        joint = self._below_peak(mixed, mixed.logits) + mixed.log_prior[..., None]  # (N, K, V)
        log_prob = (joint - used[..., None]).logsumexp(1).masked_fill_(~mixed.rescored, -torch.inf)
        best, indices = permitted(query, log_prob).topk(query.candidates)
        missing = best == -torch.inf  # no class is left for that place
        joint = joint.gather(2, indices[:, None].expand(-1, joint.shape[1], -1))

        least = (
            (joint[..., k - 1] - high).logsumexp(1, keepdim=True).masked_fill(missing[:, k - 1 : k], -torch.inf)
        )
        most = self._below_peak(mixed, mixed.logits + mixed.error) + (mixed.log_prior - low)[..., None]
        below = most.logsumexp(1) + _slack(most) < least  # written as "not below" so that nan stays in play
        barred = permitted(query, mixed.logits[:, 0]) == -torch.inf
        in_play = below.logical_or_(barred).logical_not_().scatter_(1, indices, False)

        after = torch.arange(1, query.candidates, device=indices.device)
        ordered = _not_worse(joint[..., (after - 1).clamp(max=k - 1)], joint[..., after], low, high)
        ordered = (ordered | missing[:, 1:]).all(-1)
        certified = (ordered & ~in_play.any(-1)) | (mixed.rescored.all(-1) & used.isfinite().all(-1))
        return Ranked(best[:, :k], indices[:, :k].masked_fill(missing[:, :k], -1), certified, in_play)


def is_mixture(layer: object) -> bool:
    """Whether a layer is a mixture over one weight: `Σ_k exp(log_prior_k) softmax(f(weight @ latents_k + bias))`.

    `latents(hidden (N, D))` are `(N, K, d)`, `log_prior(hidden)` is `(N, K)`.
    """
    return hasattr(layer, "latents") and hasattr(layer, "log_prior")


def _slack(logits: Tensor) -> float:
    """What rounding may do to a log-sum-exp."""
    return 64 * torch.finfo(logits.dtype).eps


def _not_worse(
    left: Tensor,  # (N, K, P), log of prior and of exp f, before the normaliser
    right: Tensor,  # (N, K, P)
    low: Tensor,  # (N, K), what the normalisers are at least
    high: Tensor,  # (N, K), and at most
) -> Tensor:  # (N, P), bool
    """Whether the mixture at `left` is proved to be no less than at `right`, up to rounding."""
    tolerance = _slack(left)
    normalizer = torch.where(left >= right, high[..., None], low[..., None]).double()
    left, right = left - normalizer, right - normalizer
    peak = torch.maximum(left, right).amax(1, keepdim=True)
    left, right = (left - peak).exp(), (right - peak).exp()
    return (left - right).sum(1) >= -tolerance * (left + right).sum(1)
