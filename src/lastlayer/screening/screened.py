"""ScreenedSoftmax: a trained layer queried by a cheap preview of all classes and exact logits of the best."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from lastlayer.functional.answers import ScreenedTopK
from lastlayer.functional.checks import check_count, check_hidden, check_positive
from lastlayer.functional.logit_map import LogitMap, check_logit_map
from lastlayer.functional.outside_graphs import outside_graphs
from lastlayer.functional.sampling import sample_classes
from lastlayer.screening.exact import full_logits, no_autocast
from lastlayer.screening.fused import Fused, FusedScreen, serves
from lastlayer.screening.preview import Preview
from lastlayer.screening.saved import load_screen, save_screen
from lastlayer.screening.screen import Head, Screened, class_parts, screen
from lastlayer.screening.watched_head import WatchedHead, check_head

CHUNK_NUMBERS = 1 << 25  # of a (rows, V) tensor held at once


class ScreenedSoftmax(WatchedHead):
    """Answers as `nn.Linear(d, V)` followed by a softmax would, reading a preview and a few rows of the weight.

    A preview scores every class approximately; the `candidates` best get their exact logits, from the weight's own
    rows. The normaliser is the log-sum-exp of the exact logits of the candidates and the preview's scores of the
    rest. Where the preview can bound its error, an answer comes with a certificate: `topk(...).certified` says
    that indices and logits are proved equal to the full layer's (ties aside; a half-precision weight counts as the
    float32 layer of the same numbers). `exact=True` rescores whatever else could be among the best, until all are.

    Where gathering the candidates' rows would move more than the full layer does (large batches), the full layer
    runs, and everything is exact.

    The weight is kept by reference. When it was changed or moved, the next query raises `RuntimeError` until
    `refresh()` prepares the preview anew (a change through `.data` goes unnoticed, as PyTorch does not tell).

    `forward` and `log_prob` are differentiable, with the preview's rotation held fixed; they then cost at least
    what the full layer does. `topk` and `sample` are queries and carry no gradient. Inside a model that
    `torch.compile` compiles, all of them run as they do outside: the graph breaks there.

    Args:
        weight: `(V, d)`, float16, bfloat16, float32 or float64.
        bias: `(V,)` or None.
        preview: how all classes are scored: `SVDPreview(...)`, `Int8Preview()`, `Int4Preview(...)`.
        candidates: classes a row whose exact logits are computed, from 1 to V.
        logit_map: a `LogitMap`, an increasing function of one logit, before the softmax; candidates are chosen by
            raw logits.
        exact: the default of `topk`'s `exact`; also makes the argmax of `forward` the full layer's.
        gram: `weight.T @ weight` where it is known: an `SVDPreview` then skips the `V d^2` multiply-adds of making
            it. A wrong one makes a worse preview, and no wrong certificate: any rotation keeps the bound.

    Raises:
        TypeError, ValueError: a weight that is not a finite floating `(V, d)` matrix, a bias that does not fit it,
            `candidates` out of range, a preview that does not fit the weight, a map that decreases.
        RuntimeError: at a query, when the weight has changed since the last `refresh()`.

    Cost: a row reads the preview and `candidates * d` numbers of the weight. Memory: the preview, and a few
    numbers a class while a query runs. When NOT to use it: in training (the weight changes every step), for large
    batches (the full layer is then the cheapest exact answer), for a few thousand classes.

    Source: Shim, Lee, Choi, Boo and Sung, SVD-Softmax (NIPS 2017); certificates by Cauchy-Schwarz.

    >>> import torch
    >>> from lastlayer import ScreenedSoftmax, SVDPreview
    >>> linear = torch.nn.Linear(16, 1000)
    >>> screened = ScreenedSoftmax.from_linear(linear, preview=SVDPreview(4), candidates=50, exact=True)
    >>> hidden = torch.randn(3, 16)
    >>> answer = screened.topk(hidden, 5)
    >>> bool((answer.indices == linear(hidden).topk(5).indices).all())
    True
    """

    def __init__(
        self,
        weight: Tensor,  # (V, d)
        bias: Tensor | None = None,  # (V,)
        *,
        preview: Preview,
        candidates: int,
        logit_map: LogitMap | None = None,
        exact: bool = False,
        gram: Tensor | None = None,  # (d, d)
    ) -> None:
        super().__init__(weight, bias)
        if not isinstance(preview, Preview):
            raise TypeError(f"preview must be a Preview such as SVDPreview(64), got {type(preview).__name__}")
        self.candidates = check_count("candidates", candidates, 1, len(weight))
        self.preview = preview
        self.logit_map = check_logit_map(logit_map)
        self.exact = bool(exact)
        self._prepare(gram)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **settings: Any) -> Self:
        """Screens an `nn.Linear`, sharing its parameters; `settings` as for the class."""
        return cls(linear.weight, linear.bias, **settings)

    @classmethod
    def from_layer(cls, layer: Any, **settings: Any) -> "ScreenedSoftmax":
        """Screens any layer that ends in one matrix and offers `linear_head() -> (weight, bias, logit_map)`.

        A mixture of softmaxes over one matrix (it has `latents` and `log_prior`) is screened by one preview for
        all components.
        """
        if hasattr(layer, "latents") and hasattr(layer, "log_prior"):
            from lastlayer.screening.mixture_screen import ScreenedMixture  # a subclass of this class

            return ScreenedMixture(layer, **settings)
        if not hasattr(layer, "linear_head"):
            raise TypeError(f"layer must offer linear_head(), which {type(layer).__name__} does not")
        weight, bias, logit_map = layer.linear_head()
        known = {"gram": layer.gram()} if hasattr(layer, "gram") else {}  # `FactoredOutput` keeps it
        return cls(weight, bias, **{"logit_map": logit_map, **known, **settings})

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
    ) -> ScreenedTopK:
        """The k best of the rescored classes, best first; `1 <= k <= candidates`; `exact` as for the class.

        The more classes `exact` had to rescore, the closer the normaliser: for k > 1 log-probabilities may differ
        from those of `log_prob`, which rescores for the best class alone, and be nearer to the full layer's.
        """
        k = check_count("k", k, 1)
        if k > self.candidates:
            raise ValueError(
                f"k must be at most candidates, {self.candidates} of {self.out_features} classes; got {k}"
            )
        exact = self.exact if exact is None else bool(exact)
        quick = self._quick_way(hidden)
        if quick is not None and (fused := quick.answer_one(hidden, k, exact)) is not None:
            return ScreenedTopK(*fused[:3])
        answers = [self._topk(rows, k, exact) for rows in self._chunks(hidden)]
        log_prob, indices, certified = answers[0]
        if len(answers) > 1:
            log_prob, indices, certified = (torch.cat(parts) for parts in zip(*answers, strict=True))
        if hidden.dim() == 2:
            return ScreenedTopK(log_prob, indices, certified)
        shape = hidden.shape[:-1]
        return ScreenedTopK(log_prob.view(*shape, k), indices.view(*shape, k), certified.reshape(shape))

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

        A `topk` that rescores more classes has another normaliser, as a rule a nearer one.
        """

        def answer(rows: Tensor) -> Tensor:
            screened = self._screened(rows, 1, self.exact)
            error = self._prepared.error(rows).all().masked_fill(screened.rescored, 0.0)
            peak, used = self._log_normalizer(screened)
            fused = self._by_kernels(rows, 1, self.exact, with_logits=True)
            if fused is not None:
                # the kernels' scores are rounded in another way, so where they tie other classes may be candidates
                used = (self._mapped(fused.logits) - peak).logsumexp(-1, keepdim=True)
            above = (self._mapped(screened.logits + error) - peak).logsumexp(-1, keepdim=True) - used
            below = used - (self._mapped(screened.logits - error) - peak).logsumexp(-1, keepdim=True)
            return torch.maximum(above, below).clamp(min=0.0).squeeze(-1)

        return self._each_row(hidden, answer)

    @outside_graphs
    @torch.no_grad()
    def preview_scores(
        self,
        hidden: Tensor,  # (..., d)
    ) -> Tensor:  # (..., V)
        """The preview's approximate logits of all classes, no candidate rescored."""
        with no_autocast(hidden):
            scores = [self._prepared.scores(rows) for rows in self._chunks(hidden)]
        return torch.cat(scores).reshape(*hidden.shape[:-1], self.out_features)

    @property
    def bytes_read(self) -> int:
        """Bytes that one query reads: the preview, and the candidates' rows."""
        return self._prepared.bytes_read + self.candidates * self.in_features * self.weight.element_size()

    @torch.no_grad()
    def refresh(self) -> None:
        """Prepares the preview of the weight as it is now; needed after the weight was changed or moved."""
        check_head(self.weight, self.bias)
        self._prepare(None)

    @torch.no_grad()
    def _prepare(self, gram: Tensor | None) -> None:
        known = {"gram": gram} if gram is not None and self.preview.uses_gram else {}
        self._prepared = self.preview.prepare(self.weight, self.bias, **known)
        self._mark_fresh()
        # the layer as the kernels take it; None: not asked for yet, False: they do not serve
        self._for_kernels: FusedScreen | bool | None = None

    def save(self, folder: str | Path, include_weight: bool = True) -> None:
        """Writes the screen's settings, calibration and logit map, and its weight if wanted: safetensors and JSON.

        The preview is prepared again by `load`. Raises TypeError for a preview or a logit map of one's own.
        """
        save_screen(self, Path(folder), include_weight)

    @classmethod
    def load(
        cls, folder: str | Path, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> "ScreenedSoftmax":
        """Reads what `save` wrote, for `weight` (and `bias`) where given, which must be the ones it was saved for.

        Raises ValueError when files are missing, truncated, changed or of another version, or the weight differs.
        """
        weight, bias, settings = load_screen(Path(folder), weight, bias)
        return ScreenedSoftmax(weight, bias, **settings)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, candidates={self.candidates}, "
            f"exact={self.exact}, preview={type(self.preview).__name__}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_for_kernels": None}  # they hold views of memory

    @outside_graphs
    def _each_row(self, hidden: Tensor, answer: Callable[[Tensor], Tensor]) -> Tensor:
        """`answer(rows)` of every chunk of rows, in hidden's leading shape."""
        parts = [answer(rows) for rows in self._chunks(hidden)]
        together = parts[0] if len(parts) == 1 else torch.cat(parts)
        return together.reshape((*hidden.shape[:-1], *together.shape[1:]))

    def _chunks(self, hidden: Tensor) -> tuple[Tensor, ...]:
        check_hidden(hidden, self.in_features, self.weight.dtype)
        self._check_fresh()
        rows = (hidden if hidden.dim() == 2 else hidden.reshape(-1, self.in_features)).contiguous()
        most = max(1, CHUNK_NUMBERS // self.out_features)
        return rows.split(most) if len(rows) > most else (rows,)

    def _quick_way(self, hidden: Tensor) -> FusedScreen | None:
        """The kernels, where `hidden` is what most queries are: one row that they take as it is."""
        kernels = self._for_kernels
        if (
            isinstance(kernels, FusedScreen)
            and kernels.takes(hidden, self.candidates)
            and self.logit_map is None
            and self._prepared_for == self._stamp()
        ):
            return kernels
        return None

    def _topk(self, rows: Tensor, k: int, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
        """`(log_prob, indices, certified)` of one chunk of rows."""
        fused = self._by_kernels(rows, k, exact, with_logits=self.logit_map is not None)
        if fused is not None and self.logit_map is None:
            return fused[:3]
        with torch.no_grad():
            if fused is not None:
                log_prob = self._mapped(fused.logits).log_softmax(-1).gather(-1, fused.indices)
                return log_prob, fused.indices, fused.certified
            screened = self._screened(rows, k, exact)
            peak, log_mass = self._log_normalizer(screened)
            log_prob = self._mapped(screened.values) - peak - log_mass
        return log_prob, screened.indices, screened.certified

    def _logits(self, rows: Tensor, normalised: bool) -> Tensor:
        """Logits, or log-probabilities, of one chunk of rows."""
        fused = None if self._followed(rows) else self._by_kernels(rows, 1, self.exact, with_logits=True)
        if fused is None:
            screened = self._screened(rows, 1, self.exact)
            logits = self._mapped(screened.logits)
            if not normalised:
                return logits
            peak, log_mass = self._log_normalizer(screened)
            return logits - peak - log_mass
        logits = self._mapped(fused.logits)
        return logits.log_softmax(-1) if normalised else logits

    def _by_kernels(self, rows: Tensor, k: int, exact: bool, with_logits: bool = False) -> Fused | None:
        """What the fused kernels say; None where they do not serve."""
        kernels = self._for_kernels
        if kernels is None or (isinstance(kernels, FusedScreen) and kernels.candidates != self.candidates):
            kernels = self._prepared.normalizer_shift is None and serves(self.weight) and self._views()
            self._for_kernels = kernels
        if isinstance(kernels, bool):
            return None
        return kernels.answer(rows.detach(), k, exact, with_logits)

    def _views(self) -> FusedScreen:
        head = Head(self.weight.detach(), None if self.bias is None else self.bias.detach())
        return FusedScreen(head, self._prepared, self.candidates)

    def _followed(self, rows: Tensor) -> bool:
        """Whether autograd is to follow."""
        tensors = (rows, self.weight, self.bias)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)

    def _screened(self, rows: Tensor, k: int, exact: bool) -> Screened:
        head = Head(self.weight, self.bias)
        with no_autocast(rows):
            fixed = Head(head.weight.detach(), None if head.bias is None else head.bias.detach())
            with torch.no_grad():
                screened = screen(fixed, self._prepared, rows, self.candidates, k, exact)
            if self._followed(rows):
                full = full_logits(rows, *head)
                approximate = self._prepared.follow(rows, *head)
                screened = screened._replace(logits=torch.where(screened.rescored, full, approximate))
        return screened

    def _mapped(self, logits: Tensor) -> Tensor:
        return logits if self.logit_map is None else self.logit_map(logits)

    def _log_normalizer(self, screened: Screened) -> tuple[Tensor, Tensor]:  # (N, 1) each
        """As two terms: one near the largest logit, and the rest, whose digits their sum could lose."""
        shift, of_parts = self._prepared.normalizer_shift, []
        peak = self._mapped(screened.values[:, :1]).detach()
        for at in class_parts(self.out_features):
            logits = screened.logits[:, at]
            if shift is not None:
                logits = torch.where(screened.rescored[:, at], logits, logits + shift[at])
            of_parts.append((self._mapped(logits) - peak).logsumexp(-1, keepdim=True))
        return peak, torch.cat(of_parts, dim=-1).logsumexp(-1, keepdim=True)
