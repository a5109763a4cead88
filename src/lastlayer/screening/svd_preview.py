"""SVDPreview: the first coordinates of a rotated weight (Shim et al., NIPS 2017), plain or calibrated."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lastlayer.functional.checks import check_choice, check_not_negative, check_positive
from lastlayer.functional.gram import Rotation
from lastlayer.functional.precision import exact_dtype
from lastlayer.screening.calibration import Calibration, SecondMoment, rotation_of, second_moment, shares_of
from lastlayer.screening.exact import CAST_ROWS, full_logits, rounding_share, row_norms, size_of
from lastlayer.screening.preview import ErrorBound, PreparedPreview, Preview
from lastlayer.screening.stored_rows import STORAGES, store_rows


@dataclass(frozen=True, init=False)
class SVDPreview(Preview):
    """Scores all classes by the first `window` coordinates of the rotated weight and hidden state.

        B = W E        h' = h E        score = h'[:window] . B[i, :window] + b_i

    `E` are the eigenvectors of `W^T W` (the right singular vectors of `W`), from a d x d problem in float64. With
    `calibration` the eigenproblem is weighted by the second moment of real hidden states, so that the window keeps
    the most of the logits that do occur instead of the most of the weight; the moment is drawn towards the plain
    SVD when the hidden states are few.

    Args:
        window: coordinates kept, at most d; at d the scores are the logits. The paper recommends d/8.
        calibration: hidden states `(..., d)`, or an iterable of such batches, which is read once and not kept.
        storage: "float32" (None; "float64" under a float64 weight), "bfloat16" or "int8" numbers.
        tail_correction: adds this times half the variance of the dropped coordinates to the scores of the classes
            that were not rescored, in the normaliser only. The normaliser is otherwise biased low. 0 is the paper;
            1 is right for calibrated coordinates and Gaussian hidden states. Unless it is 0, probabilities do not
            sum to one.

    Cost: preparing takes `V d^2` multiply-adds for the Gram matrix, as much for the rotated rows, and `O(d^3)`; a
    query reads `V * window` numbers. When NOT to use it: where proof is wanted; its bound is loose, and
    `exact=True` rescores thousands of classes.

    Source: Shim, Lee, Choi, Boo and Sung, SVD-Softmax (NIPS 2017); the calibrated form: Monte-Carlo-AI-Inference.

    >>> import torch
    >>> from lastlayer import SVDPreview
    >>> hidden, weight = torch.randn(500, 16), torch.randn(100, 16)
    >>> prepared = SVDPreview(4, calibration=hidden).prepare(weight, None)
    >>> prepared.scores(hidden).shape, prepared.bytes_read
    (torch.Size([500, 100]), 1600)
    """

    uses_gram = True

    window: int
    calibration: SecondMoment | None
    storage: str | None
    tail_correction: float

    def __init__(
        self,
        window: int,
        *,
        calibration: Calibration | None = None,
        storage: str | None = None,
        tail_correction: float = 0.0,
    ) -> None:
        moment = None if calibration is None else second_moment(calibration)
        settings = {
            "window": check_positive("window", window),
            "calibration": moment,
            "storage": storage if storage is None else check_choice("storage", storage, STORAGES),
            "tail_correction": check_not_negative("tail_correction", float(tail_correction)),
        }
        for name, value in settings.items():
            object.__setattr__(self, name, value)  # frozen: set once, here

    def prepare(
        self,
        weight: Tensor,  # (V, d)
        bias: Tensor | None,  # (V,)
        gram: Tensor | None = None,  # (d, d), weight.T @ weight where it is at hand
    ) -> "PreparedSVD":
        width = weight.shape[-1]
        if self.window > width:
            raise ValueError(f"window must be between 1 and the weight's width {width}, got {self.window}")
        bias = bias if bias is None else bias.detach()
        return PreparedSVD(self, weight.detach(), bias, rotation_of(weight, self.calibration, gram))


class PreparedSVD(PreparedPreview):
    """The rotated window of one weight, and the norms that bound what it leaves out."""

    def __init__(self, settings: SVDPreview, weight: Tensor, bias: Tensor | None, rotation: Rotation) -> None:
        window, dtype = settings.window, exact_dtype(weight.dtype)
        self.dtype, self.rotation, self.window = dtype, rotation, window
        head = torch.empty(len(weight), window, dtype=torch.float64, device=weight.device)
        balance = self._balance(settings.calibration)
        tail, squares = torch.empty(2, len(weight), dtype=dtype, device=weight.device)
        for start in range(0, len(weight), CAST_ROWS):
            at = slice(start, start + CAST_ROWS)
            kept, dropped = (weight[at].double() @ rotation.weight_side).tensor_split([window], dim=1)
            head[at] = kept
            # from the tail itself: the difference of two squared norms would cancel
            tail[at] = torch.linalg.vector_norm(dropped / balance, dim=-1)
            squares[at] = dropped.square().sum(-1)
        self.rows = store_rows(head, settings.storage, dtype)
        self.bias = tail.new_zeros(len(weight)) if bias is None else bias.to(dtype)
        size = row_norms(weight) + size_of(bias, tail)
        self.of_classes = torch.cat([self.rows.of_classes, torch.stack([tail, size])])
        self.bytes_read = self.rows.bytes_read
        self.to_head = rotation.hidden_side[:, :window].T.contiguous()  # (window, d), float64
        to_tail = (rotation.hidden_side[:, window:] * balance).T
        self.to_tail = to_tail.to(dtype).contiguous()  # for a norm, whose rounding `tail_rounding` bounds
        self.tail_rounding = 2 * rounding_share(len(rotation.hidden_side), dtype) * float(self.to_tail.norm())
        if settings.tail_correction:
            moment = settings.calibration
            of_coordinate = 1.0 if moment is None else float(moment.moment.trace()) / len(moment.moment)
            self.normalizer_shift = 0.5 * settings.tail_correction * of_coordinate * squares

    def _balance(self, calibration: SecondMoment | None) -> Tensor:  # (d - window,), float64
        """What divides the rows' dropped coordinates and multiplies the hidden state's.

        Cauchy and Schwarz bound `|Σ_j w_j h_j| <= ||w / balance|| ||h balance||` for any balance. In calibrated
        coordinates, of second moment I, the square roots of the coordinates' shares make the bound least.
        """
        if calibration is None:
            return torch.ones_like(self.rotation.squares[self.window :])
        shares = shares_of(self.rotation)
        return (shares / shares[0]).sqrt()[self.window :]

    def scores(self, hidden: Tensor) -> Tensor:
        return self.rows.scores(hidden.double() @ self.to_head.T, self.bias)

    def error(self, hidden: Tensor) -> ErrorBound:
        """By the stored rows' own rounding, the dropped coordinates, and the full layer's rounding."""
        of_rows = self.rows.of_rows(hidden.double() @ self.to_head.T)
        norm = torch.linalg.vector_norm(hidden.double(), dim=-1, keepdim=True)
        tail = torch.linalg.vector_norm(hidden.to(self.dtype) @ self.to_tail.T, dim=-1, keepdim=True)
        rounding = rounding_share(hidden.shape[-1], self.dtype) * (norm + 1)
        parts = [of_rows, tail + self.tail_rounding * norm, rounding]
        return ErrorBound(torch.cat(parts, dim=-1).to(self.dtype), self.of_classes)

    def follow(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # (h A) (W B)^T with both rotations held fixed is h (A B^T) W^T: linear in h and in W
        both = self.to_head.T @ self.rotation.weight_side[:, : self.window].T
        return full_logits(hidden.to(self.dtype) @ both.to(self.dtype), weight, bias)
