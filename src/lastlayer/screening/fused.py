"""Top-k by the fused kernels: what they serve, and the launch. `screen.screen` is the plain form of the same."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lastlayer.screening.exact import full_logits, no_autocast
from lastlayer.screening.preview import PreparedPreview
from lastlayer.screening.screen import Head
from lastlayer.screening.summary import BLOCK, Asked, Summary, kernels, moderate

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.uint16}  # numpy, or numba, has not these types
SMALL = 1 << 18  # bytes that one thread has read before a second wakes up


def serves(weight: Tensor) -> bool:
    """Whether the kernels take this layer: float32 or shorter on a CPU, rows one after another."""
    return (
        weight.dtype in (torch.float32, *BITS)
        and weight.device.type == "cpu"
        and weight.is_contiguous()
        and kernels() is not None
    )


class Fused(NamedTuple):
    """What the kernels say of some rows."""

    log_prob: Tensor  # (N, k)
    indices: Tensor  # (N, k)
    certified: Tensor  # (N,)
    logits: Tensor  # (N, V), exact where rescored; (N, 0) if not asked for
    log_normalizer: Tensor  # (N, 1)


class Outputs(NamedTuple):
    """Arrays that the kernels fill."""

    log_prob: np.ndarray  # (N, k) float32
    indices: np.ndarray  # (N, k) int64
    log_normalizer: np.ndarray  # (N, 1) float32
    final: np.ndarray  # (N, V) float32; or (N, 0)

    @classmethod
    def empty(cls, rows: int, k: int, classes: int) -> "Outputs":
        """Room for the answers to some rows."""
        values = np.empty((rows, k), dtype=np.float32), np.empty((rows, k), dtype=np.int64)
        return cls(*values, np.empty((rows, 1), dtype=np.float32), torch.empty(rows, classes).numpy())

    def fused(self, certified: np.ndarray) -> Fused:
        """The same as tensors."""
        arrays = self.log_prob, self.indices, certified, self.final, self.log_normalizer
        return Fused._make(torch.from_numpy(array) for array in arrays)


class FusedScreen:
    """One screen as the kernels take it: views of layer and bounds, and room for the scores of one query.

    Nobody but a kernel touches that room, and a kernel holds the interpreter's lock.
    """

    def __init__(self, head: Head, preview: PreparedPreview, candidates: int) -> None:
        self.head, self.preview, self.candidates = head, preview, candidates
        of_classes = preview.of_classes.contiguous()
        blocks = F.pad(of_classes, (0, -of_classes.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK)).amax(-1)
        weight = head.weight.view(BITS.get(head.weight.dtype, torch.float32))
        bias = torch.zeros(len(weight)) if head.bias is None else head.bias.float()
        self.arrays = tuple(t.detach().contiguous().numpy() for t in (of_classes, blocks, weight, bias))
        self.room = Summary.empty(1, len(head.weight)).row()
        self.no_logits = torch.empty(1, 0)

    def answer(
        self,
        hidden: Tensor,  # (N, d)
        k: int,
        exact: bool,
        with_logits: bool = False,
    ) -> Fused | None:
        """The rows screened by the kernels; None where they are not for the kernels.

        Where gathering the candidates' rows would move more than the full layer reads, the full layer runs.
        """
        hidden = hidden.float()
        count, classes = len(hidden), len(self.head.weight)
        if count * self.candidates >= classes:
            return self._all_dense(hidden, k)
        if count == 1:
            return self._one(hidden, k, exact, with_logits)
        outputs = Outputs.empty(count, k, classes if with_logits else 0)
        run, workers = kernels(), torch.get_num_threads()
        if not moderate(hidden.numpy()):
            return None
        with no_autocast(hidden):
            summary, of_rows = self.preview.summary(hidden, workers)
        status = np.empty(count, dtype=np.int64)
        choice = self.candidates, exact
        run.answer_rows(workers, *summary, BLOCK, of_rows, *self.arrays, hidden.numpy(), *choice, *outputs, status)
        dense = status == run.DENSE
        if dense.any():
            self._dense(hidden[torch.from_numpy(dense)], outputs, dense)
        return outputs.fused(status != run.UNCERTIFIED)

    def _one(self, hidden: Tensor, k: int, exact: bool, with_logits: bool) -> Fused | None:
        """One row. Python is a fifth of a query's time, as the rows that were read displaced it from the cache."""
        log_prob, indices = torch.empty(1, k), torch.empty(1, k, dtype=torch.int64)
        certified = torch.empty(1, dtype=torch.bool)
        logits = torch.empty(1, len(self.arrays[3])) if with_logits else self.no_logits
        log_normalizer, run = torch.empty(1, 1), kernels()
        outputs = Outputs(*(tensor.numpy() for tensor in (log_prob, indices, log_normalizer, logits)))
        of_row, proved = np.empty(len(self.arrays[0]), dtype=np.float32), certified.numpy()
        row, into = hidden.numpy()[0], [array[0] for array in outputs]
        workers = torch.get_num_threads() if self.preview.bytes_read > SMALL else 1
        asked = (*self.room, BLOCK, of_row, *self.arrays, row, self.candidates, exact, workers, *into)
        status = self.preview.query(Asked._make(asked))
        if status == run.BAD:
            return None
        if status == run.DENSE:
            self._dense(hidden, outputs, np.ones(1, dtype=np.bool_))
        proved[0] = status != run.UNCERTIFIED
        return Fused(log_prob, indices, certified, logits, log_normalizer)

    def _all_dense(self, hidden: Tensor, k: int) -> Fused | None:
        if not len(hidden) or not moderate(hidden.numpy()):
            return None
        everything = np.ones(len(hidden), dtype=np.bool_)
        outputs = Outputs.empty(len(hidden), k, 0)
        return outputs._replace(final=self._dense(hidden, outputs, everything)).fused(everything)

    def _dense(self, hidden: Tensor, outputs: Outputs, at: np.ndarray) -> np.ndarray:
        """The full layer, its best selected by the kernels: answers into `outputs` at some rows; its logits."""
        with no_autocast(hidden):
            summary = Summary.of(full_logits(hidden, self.head.weight, self.head.bias))
        found = Outputs.empty(len(hidden), outputs.log_prob.shape[1], 0)
        kernels().answer_dense(torch.get_num_threads(), *summary, BLOCK, *found[:3])
        for mine, theirs in zip(outputs[:3], found[:3], strict=True):
            mine[at] = theirs
        if outputs.final.size:
            outputs.final[at] = summary.scores
        return summary.scores
