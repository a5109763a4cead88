"""What goes into the fused kernels: scores summarised by blocks of classes."""

import functools
import logging
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK = 64  # classes a summary stands for


class Summary(NamedTuple):
    """Scores of some rows, and of every block their maximum and sum of exponentials; numpy arrays."""

    scores: np.ndarray  # (N, V) float32
    block_max: np.ndarray  # (N, blocks) float32
    block_sum: np.ndarray  # (N, blocks) float32: of exponentials relative to block_max

    @classmethod
    def empty(cls, rows: int, classes: int) -> "Summary":
        """Room for one."""
        blocks = -(-classes // BLOCK)
        # PyTorch's allocator hands the same pages out again, which numpy's would fault in anew
        shapes = ((rows, classes), (rows, blocks), (rows, blocks))
        return cls(*(torch.empty(shape, dtype=torch.float32, device="cpu").numpy() for shape in shapes))

    @classmethod
    def of(cls, scores: Tensor) -> "Summary":  # (N, V)
        """The summary of scores that PyTorch made."""
        room = cls.empty(len(scores), scores.shape[-1])._replace(scores=scores.contiguous().numpy())
        kernels().summarise(torch.get_num_threads(), room.scores, BLOCK, room.block_max, room.block_sum)
        return room

    def row(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The arrays of the only row."""
        return self.scores[0], self.block_max[0], self.block_sum[0]


def moderate(vectors: np.ndarray) -> bool:
    """Whether there are numbers, all of them finite and so small that float32 does not overflow."""
    return vectors.size > 0 and bool(max(vectors.max(), -vectors.min()) < kernels().MOST)  # False for NaN as well


@functools.cache
def kernels() -> Any:
    """The numba kernels, imported at first use; None where numba does not serve."""
    try:
        from lastlayer.kernels import screening
    except ImportError:
        return None
    except RuntimeError as problem:  # numba may write neither beside this package nor into a user's own cache
        logging.getLogger("lastlayer").warning(
            f"lastlayer: queries run without compiled kernels, several times slower; setting NUMBA_CACHE_DIR to a "
            f"folder that can be written helps ({problem})"
        )
        return None
    return screening
