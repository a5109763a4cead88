"""SVDPreview: the first coordinates of a rotated weight (Shim et al., NIPS 2017), plain or calibrated."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lastlayer.functional.checks import check_choice, check_positive
from lastlayer.functional.gram import Rotation
from lastlayer.functional.precision import exact_dtype
from lastlayer.screening.calibration import Calibration, SecondMoment, rotation_of, second_moment, shares_of
from lastlayer.screening.exact import CAST_ROWS, bias_and_size, full_logits, rounding_share
from lastlayer.screening.preview import ErrorBound, PreparedPreview, Preview
from lastlayer.screening.quantised import Int8Rows

STORAGES = ("float32", "bfloat16", "int8")


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

    def __init__(
        self,
        window: int,
        *,
        calibration: Calibration | None = None,
        storage: str | None = None,
    ) -> None:
        moment = None if calibration is None else second_moment(calibration)
        settings = {
            "window": check_positive("window", window),
            "calibration": moment,
            "storage": storage if storage is None else check_choice("storage", storage, STORAGES),
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
        return PreparedSVD(self, weight.detach(), bias, rotation_of(weight, self.calibration, gram))


class PreparedSVD(PreparedPreview):
    """The rotated window of one weight, and the norms that bound what it leaves out."""

    def __init__(self, settings: SVDPreview, weight: Tensor, bias: Tensor | None, rotation: Rotation) -> None:
        window, dtype = settings.window, exact_dtype(weight.dtype)
        self.dtype, self.rotation, self.window = dtype, rotation, window
        head = torch.empty(len(weight), window, dtype=torch.float64, device=weight.device)
        balance = self._balance(settings.calibration)
        tail = torch.empty(len(weight), dtype=dtype, device=weight.device)
        for start in range(0, len(weight), CAST_ROWS):
            at = slice(start, start + CAST_ROWS)
            kept, dropped = (weight[at].double() @ rotation.weight_side).tensor_split([window], dim=1)
            head[at] = kept
            # from the tail itself: the difference of two squared norms would cancel
            tail[at] = torch.linalg.vector_norm(dropped / balance, dim=-1)
        if settings.storage == "int8":
            self.rows: FloatRows | Int8Rows = Int8Rows(head, dtype)
        else:
            self.rows = FloatRows(head, torch.bfloat16 if settings.storage == "bfloat16" else dtype, dtype)
        self.bias, size = bias_and_size(weight, bias)
        self.of_classes = torch.cat([self.rows.of_classes, torch.stack([tail, size])])
        self.bytes_read = self.rows.bytes_read
        self.to_head = rotation.hidden_side[:, :window].T.contiguous()  # (window, d), float64
        to_tail = (rotation.hidden_side[:, window:] * balance).T
        self.to_tail = to_tail.to(dtype).contiguous()  # for a norm, whose rounding `tail_rounding` bounds
        self.tail_rounding = 2 * rounding_share(len(rotation.hidden_side), dtype) * float(self.to_tail.norm())

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


class FloatRows:
    """Rows in a floating-point dtype; products are summed in the working dtype."""

    def __init__(
        self,
        rows: Tensor,  # (V, w), float64
        storage: torch.dtype,
        dtype: torch.dtype,
    ) -> None:
        stored = rows.to(storage)
        self.columns = stored.T.contiguous()  # (w, V): sums over the width then run beside each other
        self.dtype = dtype
        self.bytes_read = self.columns.nbytes
        rounded = torch.linalg.vector_norm(rows - stored.double(), dim=-1)
        share = rounding_share(rows.shape[-1], dtype)
        self.of_classes = (rounded + share * torch.linalg.vector_norm(rows, dim=-1)).to(dtype)[None]  # (1, V)

    def of_rows(self, hidden: Tensor) -> Tensor:  # (N, w) -> (N, 1)
        """What `of_classes` is multiplied by to bound the error of `scores`."""
        return torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)

    def scores(
        self,
        hidden: Tensor,  # (N, w)
        bias: Tensor,  # (V,)
    ) -> Tensor:  # (N, V)
        """`hidden @ rows.T + bias`, summed in the working dtype."""
        hidden = hidden.to(self.dtype)
        if self.columns.dtype == self.dtype:
            return torch.addmm(bias, hidden, self.columns)
        scores = hidden.new_empty(len(hidden), self.columns.shape[-1])
        for start in range(0, scores.shape[-1], CAST_ROWS):
            block = self.columns[:, start : start + CAST_ROWS].to(self.dtype)
            torch.matmul(hidden, block, out=scores[:, start : start + CAST_ROWS])
        return scores.add_(bias)
