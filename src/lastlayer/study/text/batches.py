"""Batches of a text or of sequences: what each target is predicted from, and where a state is carried on."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

NO_TARGET = -100  # every layer's ignore_index
SHUFFLED_BY = 0  # the seed of the order of sequences, the same for every layer


class Batches(ABC):
    """Windows of inputs and targets, `(batch, length)` each; a target that is `NO_TARGET` does not count."""

    ids: Tensor  # (tokens,)
    batch: int  # rows of a window, at most
    window: int  # tokens of a row, at most
    device: torch.device
    windows: int  # of one pass
    tokens: int  # targets of one pass

    @property
    def tokens_a_window(self) -> float:
        """Targets of a window, on average."""
        return self.tokens / self.windows

    @abstractmethod
    def starts_anew(self, number: int) -> bool:
        """Whether window `number` does not go on where the window before it ended."""

    @abstractmethod
    def _places(self, number: int) -> tuple[Tensor, Tensor]:  # (batch, length + 1) each
        """Where the tokens of a window are among all ids, 0 after the end of a row, and which are inside."""

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:  # (batch, length) each
        """Inputs and targets of window `number` of a pass; each target is the token after its input."""
        if not 0 <= number < self.windows:
            raise IndexError(f"number must be between 0 and {self.windows - 1}, got {number}")
        places, inside = self._places(number)
        tokens = self.ids[places].masked_fill(~inside, NO_TARGET)
        return tokens[:, :-1].clamp(min=0).to(self.device), tokens[:, 1:].to(self.device)

    def examples(self, number: int) -> Tensor:  # (batch, length)
        """Where each target of window `number` stands among all ids, which tells training examples apart; 0, the
        place of no target, where there is none."""
        return self._places(number)[0][:, 1:].to(self.device)


class Streams(Batches):
    """`batch` parallel streams through a text; window `i` goes on where window `i - 1` ended.

    Args:
        ids: the text.
        batch: streams, fewer where the text is too short for two tokens in each.
        window: tokens a stream gives at once.
        device: where batches are put.
    """

    def __init__(self, ids: Tensor, batch: int, window: int, device: torch.device) -> None:
        self.ids, self.window, self.device = ids, window, device
        self.batch = max(1, min(batch, (len(ids) - 1) // 2))
        self.length = (len(ids) - 1) // self.batch  # targets in each stream
        self.windows = -(-self.length // window)  # the last may be shorter
        self.tokens = self.batch * self.length

    def starts_anew(self, number: int) -> bool:
        """Only the first."""
        return number == 0

    def _places(self, number: int) -> tuple[Tensor, Tensor]:
        start = number * self.window
        stop = min(start + self.window, self.length)
        places = self.length * torch.arange(self.batch)[:, None] + torch.arange(start, stop + 1)
        return places, torch.ones_like(places, dtype=torch.bool)


class Sequences(Batches):
    """Sequences that have nothing to do with one another, `batch` at a time, each from its beginning.

    Every item of a sequence but its first is a target once. A sequence of more than `window + 1` items is cut into
    pieces, each of which begins with the last item of the piece before it. Pieces are shuffled, the same way in
    every pass; the shorter ones of a batch are padded at their ends.

    Args:
        ids: all sequences, one after another.
        lengths: of each, at least 2.
        batch: sequences of a window, fewer where there are not so many.
        window: the most items that a prediction is made from.
        device: where batches are put.
    """

    def __init__(self, ids: Tensor, lengths: Tensor, batch: int, window: int, device: torch.device) -> None:
        self.ids, self.window, self.device = ids, window, device
        ends = lengths.cumsum(0)
        pieces = [
            (begin, min(begin + window + 1, end))
            for start, end in zip((ends - lengths).tolist(), ends.tolist(), strict=True)
            for begin in range(start, end - 1, window)
        ]
        order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(SHUFFLED_BY))
        self.pieces = torch.tensor(pieces)[order]
        self.batch = max(1, min(batch, len(pieces)))
        self.windows = -(-len(pieces) // self.batch)
        self.tokens = int((lengths - 1).sum())

    def starts_anew(self, number: int) -> bool:
        """All of them."""
        return True

    def _places(self, number: int) -> tuple[Tensor, Tensor]:
        begins, ends = self.pieces[number * self.batch : (number + 1) * self.batch].unbind(1)
        places = begins[:, None] + torch.arange(int((ends - begins).max()))
        inside = places < ends[:, None]
        return places.masked_fill(~inside, 0), inside


def num_targets(targets: Tensor) -> int:
    """How many count."""
    return int((targets != NO_TARGET).sum())
