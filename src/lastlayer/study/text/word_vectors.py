"""Vectors of words from the words beside them in a text, for `clusters.by_embedding` before any training."""

import numpy as np
import torch
from torch import Tensor

CONTEXTS = 20_000  # the most frequent words, of which it counts which stand beside a word
POWER_ITERATIONS = 2


def word_vectors(
    ids: Tensor,  # (tokens,), sorted by falling frequency: 0 is the most frequent word
    num_classes: int,
    width: int = 64,
    *,
    seed: int = 0,
) -> Tensor:  # (V, width)
    """Words that follow similar words, and are followed by such, get similar unit vectors.

    With `n(w, c)` how often the frequent word c stands just before w (or, as a context of its own, just after it),
    the leading left singular vectors, scaled by the roots of their values, of the positive pointwise mutual
    information `max(0, log n(w, c) n / (n(w) n(c)))` (Levy and Goldberg 2014).
    """
    contexts = min(CONTEXTS, num_classes)
    tokens = ids.numpy()
    before, after = tokens[:-1], tokens[1:]
    pairs = [
        after[before < contexts] * np.int64(2 * contexts) + before[before < contexts],
        before[after < contexts] * np.int64(2 * contexts) + after[after < contexts] + contexts,
    ]
    found, counts = np.unique(np.concatenate(pairs), return_counts=True)
    words, columns = np.divmod(found, 2 * contexts)
    of_word = np.bincount(words, counts, minlength=num_classes)
    of_context = np.bincount(columns, counts, minlength=2 * contexts)
    information = np.log(counts * counts.sum() / (of_word[words] * of_context[columns]))
    kept = information > 0
    table = torch.sparse_coo_tensor(
        torch.from_numpy(np.stack([words[kept], columns[kept]])),
        torch.from_numpy(information[kept].astype(np.float32)),
        (num_classes, 2 * contexts),
        is_coalesced=True,
        check_invariants=False,
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        left, values, _ = torch.svd_lowrank(table, q=min(width, num_classes), niter=POWER_ITERATIONS)
    vectors = left * values.sqrt()
    return vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-12)
