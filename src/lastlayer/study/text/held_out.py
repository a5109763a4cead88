"""Which part of a text that comes in one piece is held out."""

from itertools import pairwise

import numpy as np

HELD_OUT_SHARE, HELD_OUT_PLACES = 0.05, 10


def hold_out(ids: np.ndarray, end: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Cuts the text into ten pieces and holds out the last 5% of each, at the end of a line where one is near."""
    places = max(1, min(HELD_OUT_PLACES, len(ids) // 2000))
    line_ends = np.array([0]) if end is None else np.append(0, np.flatnonzero(ids == end) + 1)

    def near_line_end(position: int) -> int:
        after = int(np.searchsorted(line_ends, position))
        near = after < len(line_ends) and line_ends[after] - position <= 0.01 * len(ids) / places
        return int(line_ends[after]) if near else position

    train, held_out = [], []
    borders = [near_line_end(len(ids) * place // places) for place in range(places)] + [len(ids)]
    for start, stop in pairwise(borders):
        cut = near_line_end(stop - max(2, int(HELD_OUT_SHARE * (stop - start))))
        train.append(ids[start:cut])
        held_out.append(ids[cut:stop])
    return np.concatenate(train), np.concatenate(held_out)
