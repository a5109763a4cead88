"""Int4Rows: rows in 4-bit steps, their first coordinates in 8-bit ones, packed as the kernels read them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lastlayer.kernels.screening import BLOCK, CHUNK, GROUP
from lastlayer.screening.quantised import IntegerRows, rounded_up

AT_ONCE = 2048  # rows rounded at once: few enough that the allocator reuses the same memory
FINER = 16  # 8-bit steps in a 4-bit one
MOST = 7.5  # steps from zero to the last 4-bit code; codes stand for -7.5, -6.5, ..., 7.5
REACHES = 1.0, 0.85, 0.7, 0.6, 0.5  # shares of a row's largest number at which its last code may stand
NOTHING = 1e-30  # the step of a row of zeros, as no code is 0
TRIED_AT_ONCE = 1024  # rows whose steps are looked for while they are in the cache


class Int4Rows(IntegerRows):
    """Rows `w_i` in steps `s_i`, 16 of them by 4-bit codes; the first `fine` coordinates in 8 bits.

    A coordinate in 8 bits has two codes, one for whole steps and one for sixteenths; so all codes have 4 bits, and
    a hidden state is multiplied as `widened` gives it. With `q_i` what the codes of a row stand for, and any
    positive `balance` of the coordinates,

        |w_i . h - q_i . h'|  <=  ||balance (w_i - q_i)|| ||h / balance||  +  ||q_i|| ||h - h'||

    where the second norms are of codes and hidden states as they are multiplied; `of_classes` holds both of each
    row.
    """

    def __init__(
        self,
        weight: Tensor,  # (V, d)
        to_rows: Tensor,  # (d, d), float64: the rows are `weight @ to_rows`
        balance: Tensor,  # (d,), float64
        fine: int,
        dtype: torch.dtype,
    ) -> None:
        classes, self.fine, self.dtype = len(weight), fine, dtype
        self.width = _padded(len(balance) + fine, CHUNK)
        packed = _padded(classes, BLOCK), self.width // 2
        self.packed = torch.zeros(packed, dtype=torch.int8, device=weight.device).view(-1)
        self.scale = torch.empty(classes, dtype=torch.float32, device=weight.device)  # of half a step
        norms = torch.empty(2, classes, dtype=torch.float64, device=weight.device)
        for start in range(0, classes, AT_ONCE):
            at = slice(start, min(start + AT_ONCE, classes))
            rows = weight[at].double() @ to_rows
            levels, steps = nearest(rows, balance, fine)
            norms[0, at] = torch.linalg.vector_norm((levels * steps - rows) * balance, dim=-1)
            codes = codes_of(levels, fine)
            norms[1, at] = torch.linalg.vector_norm(codes.double() - MOST, dim=-1) * steps[:, 0]
            self.scale[at] = steps[:, 0] / 2
            codes = F.pad(codes, (0, self.width - codes.shape[-1], 0, -len(codes) % GROUP))
            begin = start * self.width // 2
            self.packed[begin : begin + codes.numel() // 2] = pack(codes)
        self.of_classes = rounded_up(norms).to(dtype)  # (2, V)
        self.bytes_read = self.packed.nbytes + self.scale.nbytes

    def widened(self, hidden: Tensor) -> Tensor:  # (N, d) -> (N, d + fine)
        """Hidden states as they are multiplied: the sixteenths of the first coordinates, then all coordinates."""
        return torch.cat([hidden[:, : self.fine] / FINER, hidden], dim=-1)

    def integers(self, start: int, stop: int) -> Tensor:
        stop = min(stop, len(self.scale))
        packed = self.packed[start * self.width // 2 : _padded(stop, GROUP) * self.width // 2]
        return unpack(packed, self.width)[: stop - start]


def nearest(
    rows: Tensor,  # (n, d), float64
    balance: Tensor,  # (d,), float64: how much an error in each coordinate weighs
    fine: int,
) -> tuple[Tensor, Tensor]:  # (n, d), (n, 1), both float64
    """What codes stand for, in steps, and the step of each row, which fits float32.

    A row's step is the one, of some, with the least error: cutting off its few largest numbers may serve the rest.
    """
    most = rows.abs().amax(dim=-1, keepdim=True)
    tried = [torch.where(most > 0, most * (reach / MOST), NOTHING).float() for reach in REACHES]
    errors = []
    for step in tried:
        parts = []
        for block, own in zip(rows.split(TRIED_AT_ONCE), step.split(TRIED_AT_ONCE), strict=True):
            block = block.float()
            off = _levels(block / own, fine).mul_(own).sub_(block)
            parts.append(off.mul_(balance.float()).square_().sum(-1))
        errors.append(torch.cat(parts))
    best = torch.stack(errors).argmin(0)
    steps = torch.cat(tried, dim=-1).gather(-1, best[:, None]).double()
    return _levels(rows / steps, fine), steps


def _levels(steps: Tensor, fine: int) -> Tensor:  # (n, d)
    """The nearest that codes can stand for."""
    head, tail = steps[:, :fine] * FINER, steps[:, fine:]
    reach = FINER * MOST + MOST
    head = head.sub_(0.5).round_().add_(0.5).clamp_(-reach, reach).div_(FINER)
    return torch.cat([head, (tail - 0.5).round_().add_(0.5).clamp_(-MOST, MOST)], dim=-1)


def codes_of(
    levels: Tensor,  # (n, d)
    fine: int,
) -> Tensor:  # (n, d + fine), uint8 below 16
    """Codes of the sixteenths, of the whole steps of the same coordinates, and of the other coordinates."""
    sixteenths = levels[:, :fine] * FINER + (FINER * MOST + MOST)  # 0 to 255
    upper = (sixteenths / FINER).floor()
    return torch.cat([sixteenths - FINER * upper, upper, levels[:, fine:] + MOST], dim=-1).to(torch.uint8)


def pack(codes: Tensor) -> Tensor:  # (n, w) uint8 -> (n * w / 2,) int8
    """GROUP rows interleaved, four bytes of each a chunk: codes 0, 2, 4, 6 in two of them, 1, 3, 5, 7 in two."""
    chunks = codes.view(-1, GROUP, codes.shape[-1] // CHUNK, CHUNK // 4, 2, 2)  # of a chunk: byte, nibble, parity
    both = chunks[..., 0, :] | (chunks[..., 1, :] << 4)  # (groups, rows, chunks, byte, parity)
    return both.permute(0, 2, 1, 4, 3).reshape(-1).view(torch.int8)


def unpack(packed: Tensor, width: int) -> Tensor:  # (n * w / 2,) int8 -> (n, w) int8
    """`2 code - 15`: odd numbers from -15 to 15, in units of half a step."""
    both = packed.view(torch.uint8).view(-1, width // CHUNK, GROUP, 2, CHUNK // 4)
    codes = torch.stack([both & 15, both >> 4], dim=-1)  # (groups, chunks, rows, parity, byte, nibble)
    codes = codes.permute(0, 2, 1, 4, 5, 3).reshape(-1, width)
    return codes.view(torch.int8).mul_(2).sub_(15)


def _padded(size: int, unit: int) -> int:
    return -(-size // unit) * unit
