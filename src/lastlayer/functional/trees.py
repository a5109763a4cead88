"""Binary trees over classes: Huffman's from counts, any other as a table of children, paths and levels."""

import heapq
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lastlayer.functional.clusters import positive_counts


def huffman(
    counts: Tensor,  # (V,)
) -> Tensor:  # (V - 1, 2), children
    """The tree of least mean path length: entry y below V is class y, V + n is inner node n; the root is last.

    Zeros count as the smallest other count, as paths would grow without need. Equal counts join in the order of
    their ids, so the tree is the same each time.

    Example:
        >>> huffman(torch.tensor([9.0, 2.0, 1.0])).tolist()
        [[2, 1], [3, 0]]
    """
    weights = positive_counts(counts).tolist()
    heap = [(weight, leaf) for leaf, weight in enumerate(weights)]
    heapq.heapify(heap)
    pairs = []
    for node in range(len(weights), 2 * len(weights) - 1):
        light, one = heapq.heappop(heap)
        heavy, other = heap[0]
        heapq.heapreplace(heap, (light + heavy, node))
        pairs.append((one, other))
    return torch.tensor(pairs, dtype=torch.int64, device="cpu").view(-1, 2)


def balanced(num_classes: int) -> Tensor:  # (V - 1, 2), children
    """The tree of least depth, which is Huffman's of equal counts.

    Example:
        >>> balanced(4).tolist()
        [[0, 1], [2, 3], [4, 5]]
    """
    return torch.arange(2 * (num_classes - 1), device="cpu").view(-1, 2)


class Tree(NamedTuple):
    """The tables derived from the children of each inner node, for traversal in both directions."""

    root: int  # as an id: V + its node
    parents: Tensor  # (2V - 1,) int64, the inner node above each id; -1 above the root
    sides: Tensor  # (2V - 1,) int8, 1 for a first child, -1 for a second
    depths: Tensor  # (V,) int64, the length of each class's path
    levels: list[tuple[Tensor, Tensor, Tensor]]  # nodes; which of their (first, second) children are inner; leaves
    leaves: Tensor  # (V,), the place of each class when the leaves are listed level by level

    @classmethod
    def of(cls, children: Tensor) -> "Tree":
        """The tree, or an error unless `children (V - 1, 2)` is one binary tree over all classes."""
        table = _check_children(children)
        V = len(table) + 1
        parents, sides = np.full(2 * V - 1, -1), np.zeros(2 * V - 1, dtype=np.int8)
        parents[table[:, 0]] = parents[table[:, 1]] = np.arange(V - 1)
        sides[table[:, 0]], sides[table[:, 1]] = 1, -1
        root = int(np.flatnonzero(parents < 0)[0])
        levels, listed, depths, depth = [], [], np.zeros(V, dtype=np.int64), 0
        nodes = np.array([root - V]) if V > 1 else np.empty(0, dtype=np.int64)
        while len(nodes):
            depth += 1
            below = np.concatenate([table[nodes, 0], table[nodes, 1]])
            inner, leaf = np.flatnonzero(below >= V), np.flatnonzero(below < V)
            levels.append(tuple(torch.from_numpy(part) for part in (nodes, inner, leaf)))
            listed.append(below[leaf])
            depths[below[leaf]] = depth
            nodes = below[inner] - V
        order = np.concatenate(listed) if listed else np.zeros(1, dtype=np.int64)
        if len(order) < V:
            raise ValueError("tree must be one binary tree: some classes cannot be reached from the root")
        found = [torch.from_numpy(part) for part in (parents, sides, depths, order.argsort())]
        return cls(root, found[0], found[1], found[2], levels, found[3])


def _check_children(children: Tensor) -> NDArray[np.int64]:
    if not isinstance(children, Tensor) or children.dtype != torch.int64:
        raise TypeError("tree must be a Tensor of children, dtype torch.int64")
    if children.dim() != 2 or children.shape[1] != 2:
        raise ValueError(f"tree must have shape (num_classes - 1, 2), got {tuple(children.shape)}")
    table = children.detach().cpu().numpy()
    ids = np.sort(table, axis=None)
    if len(ids) and (ids[0] < 0 or ids[-1] > 2 * len(table) or (ids[1:] == ids[:-1]).any()):
        raise ValueError("tree must name every class and every inner node but the root as a child exactly once")
    return table
