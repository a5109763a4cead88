"""ScreenedSoftmax: a trained layer queried by a cheap preview of all classes and exact logits of the best.

SVDSoftmax is the paper's method under its own name.
"""

from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from lastlayer.screening.base import Screen
from lastlayer.screening.calibration import Calibration
from lastlayer.screening.mixture_screen import ScreenedMixture, is_mixture
from lastlayer.screening.saved import load_screen, save_screen
from lastlayer.screening.svd_preview import SVDPreview


class ScreenedSoftmax(Screen):
    """Computes what `nn.Linear(d, V)` followed by a softmax does, reading a preview and a few rows of the weight.

    A preview scores every class approximately; the `candidates` best get their exact logits, from the weight's own
    rows. The normaliser is the log-sum-exp of the exact logits of the candidates and the preview's scores of the
    rest. Where the preview can bound its error, a result has a certificate: `topk(...).certified` says
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
        bias: `(V,)` or None; -inf bars a class.
        preview: how all classes are scored: `SVDPreview(...)`, `Int8Preview()`, `Int4Preview(...)`.
        candidates: classes a row whose exact logits are computed, from 1 to V.
        logit_map: a `LogitMap`, an increasing function of one logit, before the softmax; candidates are chosen by
            raw logits.
        exact: the default of `topk`'s `exact`; also makes the argmax of `forward` the full layer's.
        use: "fastest": the screen, or the full layer where `plan()` says that it is faster; "screen" or "full":
            always that one, so that the same numbers come from the same code on every machine.
        gram: `weight.T @ weight` where it is known: an `SVDPreview` then skips the `V d^2` multiply-adds of making
            it. A wrong one makes a worse preview, and no wrong certificate: any rotation keeps the bound.

    Raises:
        TypeError, ValueError: a weight that is not a finite floating `(V, d)` matrix, a bias that does not fit it,
            `candidates` out of range, a preview that does not fit the weight, a map that decreases, an inference
            tensor (its changes are not counted, so that a stale preview could not be noticed).
        RuntimeError: at a query, when the weight has changed since the last `refresh()`.

    Cost: a row reads the preview and `candidates * d` numbers of the weight. Memory: the preview, and a few
    numbers a class while a query runs. When NOT to use it: in training (the weight changes every step), for large
    batches (the full layer is then the cheapest exact way), for a few thousand classes.

    Source: Shim, Lee, Choi, Boo and Sung, SVD-Softmax (NIPS 2017); certificates by Cauchy-Schwarz.

    >>> import torch
    >>> from lastlayer import ScreenedSoftmax, SVDPreview
    >>> linear = torch.nn.Linear(16, 1000)
    >>> screened = ScreenedSoftmax.from_linear(linear, preview=SVDPreview(4), candidates=50, exact=True)
    >>> hidden = torch.randn(3, 16)
    >>> result = screened.topk(hidden, 5)
    >>> bool((result.indices == linear(hidden).topk(5).indices).all())
    True
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear, **settings: Any) -> Self:
        """Screens an `nn.Linear`, sharing its parameters; `settings` as for the class."""
        screen = cls(linear.weight, linear.bias, **settings)
        screen.watch(linear)
        return screen

    @classmethod
    def from_layer(cls, layer: Any, **settings: Any) -> Screen:
        """Screens any layer that ends in one matrix and offers `linear_head() -> (weight, bias, logit_map)`.

        A mixture of softmaxes over one matrix (it has `latents` and `log_prior`) is screened by one preview for
        all components. Of a layer that computes its matrix, such as `FactoredOutput`, the screen has a copy;
        where the layer also offers `head_version()`, which differs after every change, the screen notices that its
        copy is stale, and `refresh()` takes another.
        """
        if is_mixture(layer):
            return ScreenedMixture(layer, **settings)
        if not hasattr(layer, "linear_head"):
            raise TypeError(f"layer must offer linear_head(), which {type(layer).__name__} does not")
        weight, bias, logit_map = layer.linear_head()
        known = {"gram": layer.gram()} if hasattr(layer, "gram") else {}  # `FactoredOutput` keeps it
        screen = cls(weight, bias, **{"logit_map": logit_map, **known, **settings})
        screen.watch(layer)
        return screen

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


class SVDSoftmax(ScreenedSoftmax):
    """`ScreenedSoftmax` with `SVDPreview(window, calibration=calibration)`: SVD-softmax.

    The first `window` coordinates of the rotated weight score all classes, the `candidates` best get exact logits,
    and the softmax is taken over both.

    Args:
        weight, bias: the trained layer, `(V, d)` and `(V,)`.
        window: rotated coordinates in the preview; the paper recommends d/8.
        candidates: classes a row with exact logits; a few per cent of V.
        calibration: hidden states to weight the rotation by; without them the plain method.
        logit_map, exact, use, gram: as for `ScreenedSoftmax`.

    Cost: `(V * window + candidates * d) / (V * d)` of the full layer's multiply-adds. When NOT to use it: without
    calibration on a modern language model's head, whose weight's directions say little about its logits.

    Source: Shim, Lee, Choi, Boo and Sung, "SVD-Softmax: Fast Softmax Approximation on Large Vocabulary Neural
    Networks", NIPS 2017.

    >>> import torch
    >>> from lastlayer import SVDSoftmax
    >>> layer = SVDSoftmax(torch.randn(1000, 64), window=8, candidates=100)
    >>> layer.topk(torch.randn(64), 3).indices.shape
    torch.Size([3])
    """

    def __init__(
        self,
        weight: Tensor,  # (V, d)
        bias: Tensor | None = None,  # (V,)
        *,
        window: int,
        candidates: int,
        calibration: Calibration | None = None,
        **settings: Any,
    ) -> None:
        preview = SVDPreview(window, calibration=calibration)
        super().__init__(weight, bias, preview=preview, candidates=candidates, **settings)
