"""Hidden states of SmolLM2 over WikiText-2's validation text, and its head, kept in STORE."""

import lzma
import os
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file

from lastlayer.transformers import hidden_states
from screens.common import CALIBRATION, HELD_OUT, ROW, STORE, chunks, smollm2

# the set's own spelling, undone
SPELLING = ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" ,", ","), (" .", "."), (" <unk>", ""))


def states() -> None:
    """Runs the model over what is not there yet; a run that is killed goes on where it was."""
    head = smollm2()
    save_file({"weight": head.weight}, STORE / "weight.safetensors")
    (path,) = (Path(os.environ["LASTLAYER_DATA"]) / "wikitext-2").glob("*valid*")
    text = lzma.decompress(path.read_bytes()).decode("utf-8")
    for written, plain in SPELLING:
        text = text.replace(written, plain)
    ids = head.tokenizer(text, return_tensors="pt").input_ids[0][: CALIBRATION + HELD_OUT]
    starts = [int(path.stem.split("-")[1]) for path in chunks()]
    for path, (start, stop) in zip(chunks(), pairwise([*starts, len(ids)]), strict=True):
        if path.exists():
            continue
        found = torch.cat(list(hidden_states(head.model, ids[start:stop].view(-1, ROW).split(2))))
        temporary = path.with_suffix(".partial")
        save_file({"hidden": found}, temporary)
        temporary.replace(path)
        print(f"{stop:,} of {len(ids):,} hidden states", flush=True)
