"""Int4Preview: rows in 4 bits, in coordinates chosen by real hidden states, with a bound that proves results."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lastlayer.functional.gram import Rotation
from lastlayer.functional.precision import exact_dtype
from lastlayer.screening.calibration import Calibration, SecondMoment, rotation_of, second_moment, shares_of
from lastlayer.screening.exact import bias_and_size, rounding_share
from lastlayer.screening.int4_rows import FINER, Int4Rows
from lastlayer.screening.preview import ErrorBound, PreparedPreview, Preview
from lastlayer.screening.quantised import whole_numbers

SUMMED = 192  # products of a rotation that the engine sums in float32
FINE = 16  # one coordinate of so many has 8 bits
CHANGED = 0.3  # of a coordinate, by rounding a rotation to bfloat16


@dataclass(frozen=True, init=False)
class Int4Preview(Preview):
    """Scores all classes by 4-bit rows in calibrated coordinates: half the bytes of `Int8Preview`, still proof.

    The rotation of a calibrated `SVDPreview`, at full width, and every coordinate measured in its own units:

        score = q_i . B^T h + b_i,    q_i: the 4-bit steps nearest to A^T w_i,    A B^T = I

        |w_i . h - q_i . B^T h|  <=  ||t (A^T w_i - q_i)|| ||B^T h / t||  +  rounding of B^T h to two 8-bit parts

    In coordinates as the weight comes in, 4 bits prove nothing: nearly all classes stay in play. Rotated, a
    coordinate's step is as fine as its share of the logits requires; the first sixteenth of the coordinates has 8
    bits; and with `t` the square roots of those shares, the bound is the smallest that Cauchy and Schwarz give. It
    leaves some hundreds of classes in play, whose exact logits cost little beside the bytes that are saved.

    Args:
        calibration: hidden states `(..., d)` that the layer really meets, or an iterable of such batches, which is
            read once and not kept. Without it the rotation is the weight's own, the bound is looser, and
            `Int8Preview` usually faster.

    Cost: a query reads `17/32 V d` bytes, and `d^2` numbers to rotate the hidden state; preparing takes
    `2 V d^2` multiply-adds and some passes over the weight. When NOT to use it: without calibration data; for
    several hidden states at once (`Int8Preview` is faster from some four on); where probabilities must be proved
    close (the normaliser takes the scores of the classes that were not rescored: `log_normalizer_error` was 14
    times that of `Int8Preview` on SmolLM2's head, the error itself 0.0006).

    >>> import torch
    >>> from lastlayer import Int4Preview, ScreenedSoftmax
    >>> hidden, weight = torch.randn(500, 16), torch.randn(1000, 16)
    >>> preview = Int4Preview(calibration=hidden)
    >>> screened = ScreenedSoftmax(weight, preview=preview, candidates=32, exact=True)
    >>> torch.equal(screened.topk(hidden[0], 5).indices, (hidden[0] @ weight.T).topk(5).indices)
    True
    """

    uses_gram = True

    calibration: SecondMoment | None

    def __init__(self, *, calibration: Calibration | None = None) -> None:
        moment = None if calibration is None else second_moment(calibration)
        object.__setattr__(self, "calibration", moment)  # frozen: set once, here

    def prepare(
        self,
        weight: Tensor,  # (V, d)
        bias: Tensor | None,  # (V,)
        gram: Tensor | None = None,  # (d, d), weight.T @ weight where it is at hand
    ) -> "PreparedInt4":
        rotation = rotation_of(weight, self.calibration, gram)
        return PreparedInt4(weight.detach(), bias, rotation)


class PreparedInt4(PreparedPreview):
    """One weight in rotated 4-bit rows, and its norms."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rotation: Rotation) -> None:
        self.dtype, width = exact_dtype(weight.dtype), weight.shape[-1]
        shares = shares_of(rotation)
        kept, inverse = _rounded(rotation.hidden_side * (shares / shares[0]))  # (d, d) both, B and its inverse
        self.rotation = kept.T.contiguous()  # (d, d), B^T
        exact = kept.double()
        fine = width // FINE
        balance = (shares / shares[0]).sqrt()
        balance[:fine] *= FINER**0.5
        self.rows = Int4Rows(weight, inverse.T, balance, fine, self.dtype)
        self.unbalance = (1 / balance).float()
        self.bias, size = bias_and_size(weight, bias)
        both = float(inverse.norm() * exact.norm()) * rounding_share(width, torch.float64)
        inverted = float(_from_identity(inverse @ exact)) + both
        self.of_classes = torch.cat(
            [self.rows.of_classes, (rounding_share(width, self.dtype) + inverted) * size[None]]
        )
        self.bytes_read = self.rows.bytes_read + self.rotation.nbytes
        # of B^T h in float32, as shares of ||h||: in the balanced norm, and in that of what is multiplied
        share = rounding_share(SUMMED, torch.float32)
        lengths = exact.norm(dim=0)
        self.rounding = torch.tensor(
            [
                share * float((lengths / balance).norm()),
                share * float(lengths.norm()),
                rounding_share(8, torch.float32),  # of scores, which are put together in float32
            ],
            dtype=torch.float64,
            device="cpu",
        )

    def scores(self, hidden: Tensor) -> Tensor:
        return self.rows.scores(self._widened(hidden), self.bias)

    def error(self, hidden: Tensor) -> ErrorBound:
        widened = self._widened(hidden)
        left_over = whole_numbers(widened).left_over
        norm = torch.linalg.vector_norm(hidden.double(), dim=-1, keepdim=True)
        rotated = widened[:, self.rows.fine :]
        balanced = torch.linalg.vector_norm(rotated * self.unbalance, dim=-1, keepdim=True)
        of_all = torch.linalg.vector_norm(widened, dim=-1, keepdim=True)
        first, second, third = self.rounding
        parts = [balanced + first * norm, left_over + second * norm + third * of_all, norm + 1]
        return ErrorBound(torch.cat(parts, dim=-1).to(self.dtype), self.of_classes)

    def _widened(self, hidden: Tensor) -> Tensor:  # (N, d) -> (N, d + fine), float64
        return self.rows.widened(hidden.double() @ self.rotation.double().T)


def _rounded(rotation: Tensor) -> tuple[Tensor, Tensor]:  # (d, d) float64
    """A rotation as it is kept, in bfloat16 where that hardly changes it, and the inverse of what is kept.

    Rounded first and inverted then: what hidden states are multiplied by is what the rows are made for.
    """
    rotation = rotation / rotation.abs().max()
    for storage in (torch.bfloat16, torch.float32):
        kept = rotation.to(storage).contiguous()
        inverse, singular = torch.linalg.inv_ex(kept.double())
        changed = _from_identity(inverse @ rotation) / len(rotation) ** 0.5
        if not singular and changed < CHANGED:
            break
    return kept, inverse


def _from_identity(product: Tensor) -> Tensor:  # (d, d), a new one
    """The norm of what the product of a matrix and its inverse is beside the identity."""
    product.diagonal().sub_(1)
    return product.norm()
