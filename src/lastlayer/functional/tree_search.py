"""The best classes of a tree, and samples from it: walks from the root down, many rows at a time."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lastlayer.functional.linear_chunks import as_exact, exact_dtype

# Numbers of a gathered (pairs, d) that are held at once.
CHUNK_NUMBERS = 1 << 22


def node_scores(
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (V - 1, d)
    rows: Tensor,  # (P,)
    nodes: Tensor,  # (P,)
) -> Tensor:  # (P,)
    """`hidden[rows] . weight[nodes]`, a chunk of pairs at a time."""
    step = max(1, CHUNK_NUMBERS // hidden.shape[1])
    parts = [
        (as_exact(hidden.index_select(0, r)) * as_exact(weight.index_select(0, n))).sum(1)
        for r, n in zip(rows.split(step), nodes.split(step), strict=True)
    ]
    return torch.cat(parts)


def topk_tree(
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (V - 1, d)
    children: Tensor,  # (V - 1, 2): ids, a class below V, else V + node
    root: int,
    k: int,
) -> tuple[Tensor, Tensor]:  # log-probabilities and classes, both (N, k), best first
    """The k most probable classes, exactly, a level at a time.

    A log-probability only falls along a path, so a branch no better than the k-th best class so far is left.
    """
    num_classes = len(children) + 1
    best = hidden.new_full((len(hidden), k), -torch.inf, dtype=exact_dtype(hidden.dtype))
    classes = children.new_zeros(len(hidden), k)
    found = children.new_zeros(len(hidden))
    rows = torch.arange(len(hidden), device=hidden.device)
    ids, log_prob = torch.full_like(rows, root), best.new_zeros(len(hidden))
    while len(rows):
        leaf = ids < num_classes
        if bool(leaf.any()):
            best, classes = _merge(best, classes, rows[leaf], ids[leaf], log_prob[leaf])
            found.index_add_(0, rows[leaf], torch.ones_like(rows[leaf]))
        alive = ~leaf & ((log_prob > best[rows, -1]) | (found[rows] < k))
        rows, nodes, log_prob = rows[alive], ids[alive] - num_classes, log_prob[alive]
        scores = node_scores(hidden, weight, rows, nodes)
        log_prob = torch.stack([log_prob + F.logsigmoid(scores), log_prob + F.logsigmoid(-scores)], 1).flatten()
        rows, ids = rows.repeat_interleave(2), children.index_select(0, nodes).flatten()
    return best, classes


def _merge(best: Tensor, classes: Tensor, rows: Tensor, ids: Tensor, log_prob: Tensor) -> tuple[Tensor, Tensor]:
    """`best` and `classes` with further leaves `(row, id, log_prob)`, whose rows rise."""
    counts = torch.bincount(rows, minlength=len(best))
    rank = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    width = int(counts.max())
    values = best.new_full((len(best), width), -torch.inf).index_put((rows, rank), log_prob)
    more = classes.new_zeros(len(best), width).index_put((rows, rank), ids)
    merged = torch.cat([best, values], 1).topk(best.shape[1])
    return merged.values, torch.cat([classes, more], 1).gather(1, merged.indices)


def sample_tree(
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (V - 1, d)
    children: Tensor,  # (V - 1, 2)
    root: int,
    num_samples: int,
) -> Tensor:  # (N, num_samples)
    """Walks from the root to a leaf, each turn drawn from its node's probability."""
    num_classes = len(children) + 1
    rows = torch.arange(len(hidden), device=hidden.device).repeat_interleave(num_samples)
    ids = torch.full_like(rows, root)
    walking = torch.arange(len(rows), device=rows.device)[ids >= num_classes]
    while len(walking):
        nodes = ids[walking] - num_classes
        # in float32 no turn would have a probability between 0 and 6e-8
        first = node_scores(hidden, weight, rows[walking], nodes).double().sigmoid()
        second = (torch.rand_like(first) >= first).long()
        ids[walking] = children[nodes, second]
        walking = walking[ids[walking] >= num_classes]
    return ids.reshape(len(hidden), num_samples)
