"""Top-k by the fused kernels: what they serve, and the launch. `screen.screen` is the plain form of the same."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lastlayer.screening.exact import full_logits
from lastlayer.screening.preview import PreparedPreview
from lastlayer.screening.screen import Head
from lastlayer.screening.summary import BLOCK, Summary, kernels

MOST = 1e30  # larger hidden states could overflow float32, which the kernels do not look for


class HeadArrays(NamedTuple):
    """The layer and its preview's bounds as the kernels take them; views, where they can be."""

    weight: np.ndarray  # (V, d) float32
    bias: np.ndarray  # (V,) float32
    of_classes: np.ndarray  # (m, V) float32
    of_blocks: np.ndarray  # (m, blocks) float32: the largest in each block

    @classmethod
    def of(cls, head: Head, preview: PreparedPreview) -> "HeadArrays":
        """Made once a weight."""
        of_classes = preview.of_classes.contiguous()
        blocks = F.pad(of_classes, (0, -of_classes.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK)).amax(-1)
        bias = head.weight.new_zeros(len(head.weight)) if head.bias is None else head.bias
        return cls(*(t.detach().contiguous().numpy() for t in (head.weight, bias, of_classes, blocks)))


def serves(weight: Tensor) -> bool:
    """Whether the kernels take this layer: float32 on a CPU, rows one after another."""
    return (
        weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and weight.is_contiguous()
        and kernels() is not None
    )


def set_workers() -> int:
    """How many threads the kernels use: PyTorch's number, as far as numba has them."""
    from numba import config, set_num_threads

    count = min(torch.get_num_threads(), config.NUMBA_NUM_THREADS)  # pyright: ignore[reportAttributeAccessIssue]
    set_num_threads(count)
    return count


class Fused(NamedTuple):
    """What the kernels say of some rows."""

    log_prob: Tensor  # (N, k)
    indices: Tensor  # (N, k)
    certified: Tensor  # (N,)
    logits: Tensor  # (N, V), exact where rescored; (N, 0) if not asked for
    log_normalizer: Tensor  # (N, 1)

    @classmethod
    def of(cls, values: np.ndarray, log_normalizer: np.ndarray, *others: np.ndarray) -> "Fused":
        """Tensors over the kernels' arrays: raw logits of the best, normaliser, then the other fields."""
        indices, certified, logits = (torch.from_numpy(part) for part in others)
        normalizer = torch.from_numpy(log_normalizer)
        return cls(torch.from_numpy(values - log_normalizer), indices, certified, logits, normalizer)


def fused_answer(
    head: Head,
    arrays: HeadArrays,
    preview: PreparedPreview,
    hidden: Tensor,  # (N, d) float32
    candidates: int,
    k: int,
    exact: bool,
    with_logits: bool = False,
) -> Fused | None:
    """Some rows screened by the kernels; None where they are not for the kernels."""
    rows = hidden.numpy()
    if not max(rows.max(), -rows.min()) < MOST:  # NaN as well
        return None
    count, workers, run = len(rows), set_workers(), kernels()
    summary, of_rows = preview.summary(hidden, workers)
    final = summary.scores.copy() if with_logits else np.empty((count, 0), dtype=np.float32)
    values, indices = np.empty((count, k), dtype=np.float32), np.empty((count, k), dtype=np.int64)
    log_normalizer, status = np.empty((count, 1), dtype=np.float32), np.empty(count, dtype=np.int64)
    bounds = arrays.of_classes, arrays.of_blocks, arrays.weight, arrays.bias
    if count == 1:  # workers share the row
        outputs = values[0], indices[0], final[0]
        log_normalizer[0, 0], status[0] = run.answer(
            *summary.row(), BLOCK, of_rows[0], *bounds, rows[0], candidates, exact, workers, *outputs
        )
    else:  # rows are spread over workers
        outputs = values, indices, final, log_normalizer[:, 0], status
        run.answer_rows(*summary, BLOCK, of_rows, *bounds, rows, candidates, exact, *outputs)
    dense = status == run.DENSE
    if dense.any():
        full = _dense(head, hidden[torch.from_numpy(dense)], k)
        values[dense], indices[dense], log_normalizer[dense] = full[:3]
        if with_logits:
            final[dense] = full[3]
    return Fused.of(values, log_normalizer, indices, status != run.UNCERTIFIED, final)


def dense_answer(
    head: Head,
    hidden: Tensor,  # (N, d) float32
    k: int,
) -> Fused | None:
    """The full layer, its best selected by the kernels; None where the rows are not for the kernels."""
    if not len(hidden) or not hidden.abs().amax() < MOST:
        return None
    set_workers()
    values, indices, log_normalizer, logits = _dense(head, hidden, k)
    return Fused.of(values, log_normalizer, indices, np.ones(len(hidden), dtype=np.bool_), logits)


def _dense(head: Head, hidden: Tensor, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    summary = Summary.of(full_logits(hidden, head.weight.detach(), head.bias))
    values, indices = np.empty((len(hidden), k), dtype=np.float32), np.empty((len(hidden), k), dtype=np.int64)
    log_normalizer = np.empty((len(hidden), 1), dtype=np.float32)
    kernels().answer_dense(*summary, BLOCK, values, indices, log_normalizer[:, 0])
    return values, indices, log_normalizer, summary.scores
