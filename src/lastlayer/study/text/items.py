"""Sequences of items, such as what was bought in one session: no sequence is the context of another."""

from array import array
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lastlayer.study.errors import StudyError
from lastlayer.study.text.corpus import Corpus
from lastlayer.study.text.lines import read_item_lines
from lastlayer.study.text.sources import find_files

HELD_OUT_EVERY = 20  # of sequences in one piece, every twentieth is held out
MIN_SEQUENCES = 20


def load_items(paths: list[Path], *, min_count: int | None = None, field: str | None = None) -> Corpus:
    """Reads sequences, one a line: ids or names between blanks.

    Items seen fewer than `min_count` times in training (1 if None) are left out of the sequences, and so are
    held-out items that training never has; sequences of fewer than two items are too.

    Args:
        paths: as `sources.find_files` takes them; those with train and valid in their names are the two parts,
            else every twentieth sequence is held out.
        min_count: how often an item must be seen.
        field: of JSON lines, the field that holds the sequence: a list, or a string.

    Raises:
        UsageError: a path that is not there.
        StudyError: a file that cannot be read, or sequences with too little in them.
    """
    files = find_files(paths)
    train = [items for path in files.training for items in read_item_lines(path, field)]
    held_out = [items for path in files.held_out for items in read_item_lines(path, field)]
    if not files.held_out:
        train = [sequence for sequence in train if len(sequence) > 1]  # which have something to predict
        held_out = train[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
        del train[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    return make_items(files.name, train, held_out, min_count=min_count or 1, notes=files.notes())


def make_items(
    name: str,
    train: Iterable[list[str]],
    held_out: Iterable[list[str]],
    *,
    min_count: int = 1,
    notes: Iterable[str] = (),
) -> Corpus:
    """The corpus of sequences of names.

    Raises:
        StudyError: too few sequences, or one kind of item only.
    """
    train, held_out = ([s for s in sequences if len(s) > 1] for sequences in (train, held_out))
    counts = Counter(item for sequence in train for item in sequence)
    kept = [item for item, count in counts.items() if count >= min_count]
    ids = {item: place for place, item in enumerate(kept)}
    train_ids, train_lengths = _encoded(train, ids)
    held_out_ids, held_out_lengths = _encoded(held_out, ids)
    if len(train_lengths) + len(held_out_lengths) < MIN_SEQUENCES or not len(held_out_lengths):
        raise StudyError(
            f"{name} holds {len(train_lengths)} sequences of two items or more to train on and "
            f"{len(held_out_lengths)} to hold out; a comparison needs at least {MIN_SEQUENCES}, one a line"
        )
    if len(kept) < 2:
        raise StudyError(f"{name} holds one kind of item only, so there is nothing to predict")
    said = [f"{len(train_lengths):,} sequences to train on, {len(held_out_lengths):,} held out"]
    absent = sum(map(len, held_out)) - len(held_out_ids)
    if absent:
        said.append(f"{absent:,} held-out items left out, as training does not have them or too rarely")
    seen = torch.bincount(train_ids, minlength=len(kept))  # after what was left out
    order = seen.argsort(descending=True, stable=True)
    ranks = order.argsort()
    return Corpus(
        name,
        [kept[place] for place in order.tolist()],
        seen[order],
        ranks[train_ids],
        ranks[held_out_ids],
        unit="items",
        notes=(*notes, "; ".join(said)),
        lengths=(train_lengths, held_out_lengths),
    )


def _encoded(sequences: list[list[str]], ids: dict[str, int]) -> tuple[Tensor, Tensor]:
    """The known items of all sequences of two or more, and the length of each."""
    flat, lengths = array("q"), array("q")
    for sequence in sequences:
        known = [ids[item] for item in sequence if item in ids]
        if len(known) > 1:
            flat.extend(known)
            lengths.append(len(known))
    return torch.from_numpy(np.array(flat, dtype=np.int64)), torch.from_numpy(np.array(lengths, dtype=np.int64))
