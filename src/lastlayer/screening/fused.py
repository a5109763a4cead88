"""Top-k by the fused kernels: what they serve, and the launch. `screen.screen` is the plain form of the same."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lastlayer.screening.exact import full_logits, no_autocast
from lastlayer.screening.preview import PreparedPreview
from lastlayer.screening.screen import Head
from lastlayer.screening.summary import BLOCK, Summary, kernels, moderate

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
    log_normalizer: Tensor  # (N, 1)
    logits: Tensor  # (N, V), exact where rescored; (N, 0) if not asked for


class Outputs(NamedTuple):
    """Arrays that the kernels fill."""

    log_prob: np.ndarray  # (N, k) float32
    indices: np.ndarray  # (N, k) int64
    certified: np.ndarray  # (N,) bool
    log_normalizer: np.ndarray  # (N, 1) float32
    final: np.ndarray  # (N, V) float32; or (N, 0)

    @classmethod
    def empty(cls, rows: int, k: int, classes: int) -> "Outputs":
        """Room for the answers to some rows."""
        values = np.empty((rows, k), dtype=np.float32), np.empty((rows, k), dtype=np.int64)
        certified, normalizer = np.ones(rows, dtype=np.bool_), np.empty((rows, 1), dtype=np.float32)
        return cls(
            *values, certified, normalizer, torch.empty(rows, classes, dtype=torch.float32, device="cpu").numpy()
        )

    def fused(self) -> Fused:
        """The same as tensors."""
        return Fused._make(map(torch.from_numpy, self))


class FusedScreen:
    """One screen as the kernels take it: views of layer and bounds, and room for the scores of one query.

    Nobody but a kernel touches that room, and a kernel holds the interpreter's lock.
    """

    def __init__(self, head: Head, preview: PreparedPreview, candidates: int) -> None:
        self.head, self.preview, self.candidates, run = head, preview, candidates, kernels()
        of_classes = preview.of_classes.contiguous()
        blocks = F.pad(of_classes, (0, -of_classes.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK)).amax(-1)
        weight = head.weight.view(BITS.get(head.weight.dtype, torch.float32))
        bias = head.weight.new_zeros(len(weight), dtype=torch.float32) if head.bias is None else head.bias.float()
        arrays = (t.detach().contiguous().numpy() for t in (of_classes, blocks, weight, bias))
        self.layer, self.room = run.Layer(BLOCK, candidates, *arrays), Summary.empty(1, len(weight)).row()
        self.small = preview.bytes_read <= SMALL
        self.bad, self.dense = run.BAD, run.DENSE
        self.no_logits, one = bias.new_empty(1, 0), preview.one_call()
        self.ask = one and run.Bound(
            one.kernel, (*one.kept, run.Room(*self.room, one.of_row), self.layer), run.ASKED
        )
        self.one_row = (1, head.weight.shape[1])
        self.takes_one = bool(self.ask) and head.weight.dtype == torch.float32 and candidates < len(weight)

    def takes(self, hidden: Tensor, candidates: int) -> bool:
        """Whether `answer_one` serves: a row as most queries have it, which kernels take as it is."""
        return (
            self.takes_one
            and self.candidates == candidates
            and type(hidden) is Tensor
            and hidden.dtype is torch.float32
            and hidden.shape == self.one_row
            and hidden.is_cpu
            and hidden.is_contiguous()
        )

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
        if count == 1 and self.ask is not None:
            return self.answer_one(hidden, k, exact, with_logits)
        outputs = Outputs.empty(count, k, classes if with_logits else 0)
        run, workers = kernels(), torch.get_num_threads()
        if not moderate(hidden.numpy()):
            return None
        with no_autocast(hidden):
            summary, of_rows = self.preview.summary(hidden, workers)
        status = np.empty(count, dtype=np.int64)
        asked = run.Asked(hidden.numpy(), exact, *outputs)
        run.answer_rows(workers, run.Room(*summary, of_rows), self.layer, asked, status)
        dense = status == run.DENSE
        if dense.any():
            self._dense(hidden[torch.from_numpy(dense)], outputs, dense)
        return outputs.fused()

    def answer_one(
        self,
        hidden: Tensor,  # (1, d), float32, contiguous
        k: int,
        exact: bool,
        with_logits: bool = False,
    ) -> Fused | None:
        """One row, in one call; `answer` has seen that the full layer is not the quicker way.

        What Python does here is paid for with cold caches: the rows that were read have displaced it.
        """
        log_prob, indices = hidden.new_empty(1, k), hidden.new_empty(1, k, dtype=torch.int64)
        certified, log_normalizer = hidden.new_empty(1, dtype=torch.bool), hidden.new_empty(1, 1)
        logits = hidden.new_empty(1, len(self.head.weight)) if with_logits else self.no_logits
        fused = Fused(log_prob, indices, certified, log_normalizer, logits)
        workers = 1 if self.small else torch.get_num_threads()
        into = [tensor.data_ptr() for tensor in fused]
        assert self.ask is not None
        status = self.ask(hidden.data_ptr(), k, exact, workers, *into, with_logits)
        if status == self.bad:
            return None
        if status == self.dense:
            outputs = Outputs(*(tensor.numpy() for tensor in fused))
            self._dense(hidden, outputs, np.ones(1, dtype=np.bool_))
        return fused

    def _all_dense(self, hidden: Tensor, k: int) -> Fused | None:
        if not len(hidden) or not moderate(hidden.numpy()):
            return None
        outputs = Outputs.empty(len(hidden), k, 0)
        logits = self._dense(hidden, outputs, np.ones(len(hidden), dtype=np.bool_))
        return outputs._replace(final=logits).fused()

    def _dense(self, hidden: Tensor, outputs: Outputs, at: np.ndarray) -> np.ndarray:
        """The full layer, its best selected by the kernels: answers into `outputs` at some rows; its logits."""
        with no_autocast(hidden):
            summary = Summary.of(full_logits(hidden, self.head.weight, self.head.bias))
        found = Outputs.empty(len(hidden), outputs.log_prob.shape[1], 0)
        values = found.log_prob, found.indices, found.log_normalizer
        kernels().answer_dense(torch.get_num_threads(), *summary, BLOCK, *values)
        for mine, theirs in zip(outputs, found._replace(final=summary.scores), strict=True):
            if mine.size:
                mine[at] = theirs
        return summary.scores
