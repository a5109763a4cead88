"""Contiguous batches: parallel streams through one text, a window at a time, so that a state can be carried."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Streams:
    """`batch` parallel streams through a text; window `i` goes on where window `i - 1` ended.

    Args:
        ids: the text.
        batch: streams, fewer where the text is too short for two tokens in each.
        window: tokens a stream gives at once.
        device: where batches are put.
    """

    ids: Tensor  # (tokens,)
    batch: int
    window: int
    device: torch.device

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch", max(1, min(self.batch, (len(self.ids) - 1) // 2)))

    @property
    def length(self) -> int:
        """Targets in each stream."""
        return (len(self.ids) - 1) // self.batch

    @property
    def windows(self) -> int:
        """Windows of one pass through the text; the last may be shorter."""
        return -(-self.length // self.window)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:  # (batch, window) each
        """Inputs and targets of window `number` of a pass; each target is the token after its input."""
        if not 0 <= number < self.windows:
            raise IndexError(f"number must be between 0 and {self.windows - 1}, got {number}")
        start = number * self.window
        stop = min(start + self.window, self.length)
        used = self.batch * self.length
        inputs = self.ids[:used].view(self.batch, -1)[:, start:stop]
        targets = self.ids[1 : used + 1].view(self.batch, -1)[:, start:stop]
        return inputs.to(self.device), targets.to(self.device)
