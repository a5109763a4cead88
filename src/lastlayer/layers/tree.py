"""Binary-tree softmax with Huffman's tree (Morin and Bengio 2005; Mikolov et al. 2013)."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lastlayer.functional.best_classes import GATHERED, SearchCost
from lastlayer.functional.clusters import check_counts
from lastlayer.functional.ordinary import ordinary, readable
from lastlayer.functional.paths import path_log_prob
from lastlayer.functional.precision import as_exact
from lastlayer.functional.row_sparse import GradientMemory
from lastlayer.functional.selection import Selection
from lastlayer.functional.tree_search import CHUNK_NUMBERS, FIRST_WIDTH, sample_tree, topk_tree
from lastlayer.functional.trees import Tree, balanced, huffman
from lastlayer.layers.base import OutputLayer
from lastlayer.layers.search import searched_topk


class TreeSoftmax(OutputLayer):
    r"""Every class is a leaf of a binary tree, every inner node a logistic regression that goes left or right.

    With `n_1, n_2, ...` the inner nodes above class y, and signs s = 1 where its path takes the first child, else
    -1,

        log P(y | h) = sum_j F.logsigmoid(s_j * (h @ layer.weight[n_j]))

    which sums to one by construction. In Huffman's tree frequent classes are near the root: the mean path is at
    most one longer than the entropy of the counts in bits, some 10 for words. Cost of one target: `d` times its
    path's length, by far the least of all likelihood layers; with `sparse=True` a whole training step costs that
    too, with gradients as `nn.Embedding(sparse=True)` gives, coalesced (`SGD`, `Adagrad`; see
    `sparse_parameters`). `log_prob` costs `d (V - 1)` a row. `topk` is exact: a branch is pruned when it cannot
    beat the k-th best class so far.

    When *not* to use it: where quality counts. A decision near the root that no single hyperplane can make costs
    perplexity; and on GPUs its many small products are slow. It is for training on CPUs, online, or as a baseline.

    Args:
        in_features: d.
        num_classes: V. The old form `TreeSoftmax(d, counts)` still works, with a DeprecationWarning.
        counts: `(V,)`, how often each class occurs; zeros count as the smallest other count. None: all equal,
            which makes the tree balanced, of depth `log2(V)`.
        tree: `(V - 1, 2)`, any other binary tree, as the children of each inner node: an entry y below V is class
            y, `V + n` is inner node n. None: Huffman's.
        sparse: row-sparse gradients for `weight`.
        reduction, ignore_index, device, dtype: as in every `OutputLayer`.

    Attributes:
        weight: `(V - 1, d)`, zero at first: every class then has probability `2 ** -length`.
        nodes: `(V - 1, 2)` buffer, the children of each inner node.

    Raises:
        TypeError: counts or a tree of the wrong kind.
        ValueError: counts of another length, negative or not finite; a tree that is not one over V classes.

    Source: F. Morin, Y. Bengio, "Hierarchical probabilistic neural network language model", AISTATS 2005;
    Huffman's tree as in word2vec, but for its skipping of saturated nodes, which biases them.

    Example:
        >>> layer = TreeSoftmax(16, 1000, counts=1 / torch.arange(1, 1001), sparse=True)
        >>> hidden, targets = torch.randn(32, 16), torch.randint(1000, (32,))
        >>> layer(hidden, targets).backward()
        >>> layer.topk(hidden, 5).indices.shape
        torch.Size([32, 5])
    """

    nodes: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int | Tensor | None = None,  # None and a Tensor: the old form, of counts alone
        *,
        counts: Tensor | None = None,
        tree: Tensor | None = None,
        sparse: bool = False,
        reduction: str = "mean",
        ignore_index: int = -100,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        num_classes, counts = _sizes(num_classes, counts)
        super().__init__(in_features, num_classes, reduction=reduction, ignore_index=ignore_index)
        if counts is not None:
            check_counts(counts, self.num_classes)
        if tree is None:
            tree = balanced(self.num_classes) if counts is None else huffman(counts)
        self._tree = Tree.of(tree)
        if len(tree) != self.num_classes - 1:
            raise ValueError(f"tree must have shape ({self.num_classes - 1}, 2), got {tuple(tree.shape)}")
        self.sparse = sparse
        self._memory = GradientMemory()
        self.weight = nn.Parameter(torch.zeros(len(tree), self.in_features, device=device, dtype=dtype))
        self.register_buffer("nodes", tree.detach().to(self.weight.device, copy=True))
        self._planned = {"nodes": tree.detach().clone()} if self.weight.is_meta else None

    def reset_parameters(self) -> None:
        """All branches are equally probable."""
        nn.init.zeros_(self.weight)

    @property
    def path_lengths(self) -> Tensor:  # (V,)
        """How many decisions each class takes."""
        return self._tree.depths.clone()

    def _parameter_shapes(self) -> Iterable[tuple[str, Tensor | None, tuple[int, ...]]]:
        yield "weight", self.weight, (self.num_classes - 1, self.in_features)

    def _target_log_prob(self, hidden: Tensor, targets: Tensor) -> Tensor:
        if not ordinary(hidden, self.weight, targets):
            return self._log_prob(hidden).gather(1, targets[:, None])[:, 0]
        tree, memory = self._tree, self._memory
        return path_log_prob(hidden, self.weight, targets, tree, sparse=self.sparse, memory=memory)

    def _log_prob(self, hidden: Tensor) -> Tensor:
        """By levels: a child's log-probability is its parent's plus that of the branch."""
        scores = as_exact(F.linear(hidden, self.weight))
        branches = torch.cat([F.logsigmoid(scores), F.logsigmoid(-scores)], 1)
        above, leaves = scores.new_zeros(hidden.shape[0], 1), []
        for nodes, inner, leaf in self._tree.levels:
            nodes, inner, leaf = (part.to(hidden.device) for part in (nodes, inner, leaf))
            both = branches.index_select(1, torch.cat([nodes, nodes + len(self.weight)]))
            below = torch.cat([above, above], 1) + both
            leaves.append(below.index_select(1, leaf))
            above = below.index_select(1, inner)
        if not leaves:
            return above
        return torch.cat(leaves, 1).index_select(1, self._tree.leaves.to(hidden.device))

    def _score(self, hidden: Tensor, ids: Tensor) -> Tensor:
        if not readable(hidden, ids, self.weight):
            return super()._score(hidden, ids)
        nodes = int(self._tree.depths[ids.cpu()].sum())
        if nodes * GATHERED >= len(ids) * len(self.weight) and not (self.sparse and torch.is_grad_enabled()):
            return super()._score(hidden, ids)
        columns = ids.split(max(1, CHUNK_NUMBERS // max(1, hidden.numel())), 1)
        of_columns = [
            self._target_log_prob(hidden.repeat_interleave(part.shape[1], 0), part.flatten()).view(part.shape)
            for part in columns
        ]
        return torch.cat(of_columns, 1)

    def _topk(self, hidden: Tensor, k: int, selection: Selection | None) -> tuple[Tensor, Tensor]:
        def search(rows: Tensor, own: Selection | None) -> tuple[Tensor, Tensor, Tensor]:
            return topk_tree(rows, self.weight, self.nodes, self._tree.root, k, own)

        return searched_topk(
            self, search, SearchCost(1 << 23, FIRST_WIDTH * self.num_classes.bit_length()), hidden, k, selection
        )

    def _sample(self, hidden: Tensor, num_samples: int) -> Tensor:
        return sample_tree(hidden, self.weight, self.nodes, self._tree.root, num_samples)

    def _to_load(self, state_dict: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
        """Takes over the saved layer's tree too."""
        table = state_dict.get(f"{prefix}nodes")
        if table is not None and table.shape == self.nodes.shape:  # of others, PyTorch's error names the shapes
            self._tree = Tree.of(table)
        return state_dict


def _sizes(num_classes: int | Tensor | None, counts: Tensor | None) -> tuple[int, Tensor | None]:
    """`(num_classes, counts)`; of the old form too, in which the length of the counts is the number of classes."""
    if isinstance(num_classes, Tensor):
        if counts is not None:
            raise TypeError("num_classes must be a whole number where counts are given, got a Tensor")
        num_classes, counts = None, num_classes
    if num_classes is not None:
        return num_classes, counts
    if counts is None:
        raise TypeError("TreeSoftmax needs num_classes: TreeSoftmax(in_features, num_classes)")
    warnings.warn(
        "TreeSoftmax(in_features, counts) is deprecated: use TreeSoftmax(in_features, num_classes, counts=counts)",
        DeprecationWarning,
        stacklevel=3,
    )
    return len(check_counts(counts)), counts
