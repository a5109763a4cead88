"""The best classes of a tree, and samples from it: traversals from the root, many rows at a time."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lastlayer.functional.best_classes import LARGEST_SHARE, gathered_scores, merge
from lastlayer.functional.precision import exact_dtype
from lastlayer.functional.selection import Selection

# Numbers of a gathered (pairs, d) that are held at once.
CHUNK_NUMBERS = 1 << 22
# Branches of a level that a row follows at first.
FIRST_WIDTH = 16


def topk_tree(
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (V - 1, d)
    children: Tensor,  # (V - 1, 2): ids, a class below V, else V + node
    root: int,
    k: int,
    selection: Selection | None,
) -> tuple[Tensor, Tensor, Tensor]:  # log-probabilities and classes, (N, k) each, best first; rows given up
    """The k most probable classes, exactly: a log-probability only falls along a path.

    All rows descend together, each along the most probable branches of every level. The result of a row is exact
    where no branch that was pruned can beat its k-th best class; the other rows descend again, with four times as
    many branches. A row is given up when it would have to visit more than a sixteenth of all nodes: the indices of
    those rows are returned, `(n,)`, and their entries of the other results are not valid.
    """
    num_classes = len(children) + 1
    most = LARGEST_SHARE * num_classes
    least = -math.log(most)
    mask = None if selection is None else selection.mask(num_classes)
    best = hidden.new_empty(len(hidden), k, dtype=exact_dtype(hidden.dtype))
    classes = children.new_empty(len(hidden), k)
    active, given_up = torch.arange(len(hidden), device=hidden.device), []
    width, looked, next_look = max(k, FIRST_WIDTH), 0, 0
    while len(active) and looked + next_look <= most:
        own = mask if mask is None or len(mask) == 1 else mask[active]
        found, left, nodes = _descend(hidden[active], weight, children, root, width, k, own, least)
        best[active], classes[active] = found
        last = found[0][:, -1]
        # As many branches of a level may be more probable than the k-th best class as its probability goes into 1:
        # too many, below `least`.
        hopeless = last < least
        again = ~(left <= last)
        given_up.append(active[again & hopeless])
        active = active[again & ~hopeless]
        width, looked, next_look = 4 * width, looked + nodes, 4 * nodes
    return best, classes, torch.cat([*given_up, active])


def _descend(
    hidden: Tensor,  # (n, d)
    weight: Tensor,
    children: Tensor,
    root: int,
    width: int,
    k: int,
    mask: Tensor | None,  # (n, V) or (1, V), bool: classes that must not be returned
    least: float,
) -> tuple[tuple[Tensor, Tensor], Tensor, int]:
    """The best classes along `width` branches of each level, (n, k) each; the most probable branch that was pruned
    for each row, (n,); and how many nodes a row visited. Ends where no row has a branch above `least`."""
    num_rows, num_classes = len(hidden), len(children) + 1
    log_prob = hidden.new_zeros(num_rows, 1, dtype=exact_dtype(hidden.dtype))
    ids = torch.full((num_rows, 1), root, device=hidden.device)
    nothing = log_prob.new_full((num_rows, k), -torch.inf)
    best, left, looked = (nothing, torch.zeros_like(nothing, dtype=torch.int64)), nothing[:, 0], 0
    while ids.shape[1]:
        nodes = ids - num_classes
        looked += nodes.shape[1]
        scores = gathered_scores(hidden, weight, nodes)
        log_prob = torch.cat([log_prob + F.logsigmoid(scores), log_prob + F.logsigmoid(-scores)], 1)
        ids = children[nodes].transpose(1, 2).flatten(1)
        leaf = ids < num_classes
        if bool(leaf.any()):
            found = log_prob.masked_fill(~leaf, -torch.inf)
            if mask is not None:
                barred = mask.expand(num_rows, -1).gather(1, ids.masked_fill(~leaf, 0))
                found = found.masked_fill(barred, -torch.inf)
            best = merge(best, (found, ids))
            log_prob = log_prob.masked_fill(leaf | (log_prob <= best[0][:, -1:]), -torch.inf)
            ids = ids.clamp(min=num_classes)  # any node: its branch has probability 0
        elif 2 * nodes.shape[1] <= width:  # all branches are followed
            continue
        log_prob, order = log_prob.topk(min(width + 1, ids.shape[1]))
        # A row without a branch above `least` will give up, as no class below can be above it either.
        alive = min(width, int((log_prob > least).sum(1).max()))
        if log_prob.shape[1] > alive:
            left = torch.maximum(left, log_prob[:, alive])
        left = left.masked_fill(log_prob[:, 0].isnan(), torch.inf)
        log_prob, ids = log_prob[:, :alive], ids.gather(1, order[:, :alive])
    return best, left, looked


def sample_tree(
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (V - 1, d)
    children: Tensor,  # (V - 1, 2)
    root: int,
    num_samples: int,
) -> Tensor:  # (N, num_samples)
    """Descends from the root to a leaf, each branch drawn with its node's probability."""
    num_classes = len(children) + 1
    rows = torch.arange(len(hidden), device=hidden.device).repeat_interleave(num_samples)
    ids = torch.full_like(rows, root)
    active = torch.arange(len(rows), device=rows.device)[ids >= num_classes]
    while len(active):
        for some in active.split(max(1, CHUNK_NUMBERS // hidden.shape[1])):
            nodes = ids[some] - num_classes
            scores = gathered_scores(hidden[rows[some]], weight, nodes[:, None])[:, 0]
            # in float32 no branch would have a probability between 0 and 6e-8
            first = scores.double().sigmoid()
            second = (torch.rand_like(first) >= first).long()
            ids[some] = children[nodes, second]
        active = active[ids[active] >= num_classes]
    return ids.reshape(len(hidden), num_samples)
