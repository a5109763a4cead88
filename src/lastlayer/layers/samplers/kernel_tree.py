"""Sampling classes in proportion to a kernel of hidden state and class vector, down a tree of feature sums."""

import math
from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lastlayer.functional.checks import check_positive
from lastlayer.layers.samplers.base import Candidates, Sampler

# Numbers that one gathered or multiplied block of features may hold.
BLOCK_NUMBERS = 1 << 23


class _Sums(NamedTuple):
    """The state that `update` keeps of a layer."""

    weight: Tensor  # (V, d), the layer's own memory
    bias: Tensor | None  # (V,)
    centre: Tensor  # (d + 1,): taken off every class, bias last
    features: Tensor  # (2 * num_leaves, F): the sum of phi over the classes below each node
    counts: Tensor  # (2 * num_leaves,): how many classes there are, without barred ones


class KernelTree(Sampler):
    """Draws class i with probability proportional to a kernel `k(hidden, weight_i)`, one set for each row.

    The kernel is a product of F features, `phi(h) . phi(w)`, so that one vector, the sum of `phi(w)` over the
    classes below a node of a binary tree, gives the mass of all of them. A draw descends from the root, each
    time to a child with the probability of its mass; the classes of a leaf are scored one by one.

    - a draw costs `O(F log(V / B) + B d)` with leaves of B classes, memory is `2 F V / B`;
    - `update` recomputes the leaves of changed classes, and the nodes above them, from the weight, so that sums do
      not drift apart from it; and the whole tree, once that has been done for as many classes as there are.

    The probabilities of the descent are what `log_prob` gives, so corrections are right also where the sums lag
    behind the weight, as they do under an optimizer that moves rows without a gradient (momentum, weight decay).

    A class whose bias is -inf is never drawn. Sums are in float32 at least.

    Args:
        num_classes: V.
        in_features: d.
        leaf_size: B.
    """

    follows_weight = True

    def __init__(self, num_classes: int, in_features: int, *, leaf_size: int) -> None:
        super().__init__(num_classes, shared=False)
        self.in_features = check_positive("in_features", in_features)
        self.leaf_size = min(check_positive("leaf_size", leaf_size), self.num_classes)
        self.depth = (math.ceil(self.num_classes / self.leaf_size) - 1).bit_length()
        self._sums: _Sums | None = None
        self._refreshed = 0  # classes, since the whole tree was last recomputed

    @property
    def num_leaves(self) -> int:
        """A power of two; the last may be empty."""
        return 1 << self.depth

    @torch.no_grad()
    def update(self, weight: Tensor, bias: Tensor | None = None, ids: Tensor | None = None) -> None:
        """Takes over a layer's weight, of which only the rows `ids` changed since the last time (None: any may).

        Raises:
            ValueError: a weight of another shape.
        """
        if weight.shape != (self.num_classes, self.in_features):
            raise ValueError(
                f"weight must have shape {(self.num_classes, self.in_features)} for this sampler, "
                f"got {tuple(weight.shape)}"
            )
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        placed = None if self._sums is None else (self._sums.features.dtype, self._sums.features.device)
        leaves = None if ids is None else torch.unique(ids.reshape(-1) // self.leaf_size)
        self._refreshed += 0 if leaves is None else len(leaves) * self.leaf_size
        stale = self._refreshed > self.num_classes
        if self._sums is not None and leaves is not None and placed == (dtype, weight.device) and not stale:
            self._sums = self._sums._replace(weight=weight, bias=bias)
        else:
            self._refreshed = 0
            leaves = torch.arange(math.ceil(self.num_classes / self.leaf_size), device=weight.device)
            num_features = self._features(weight.new_zeros(1, self.in_features + 1, dtype=dtype)).shape[1]
            features = weight.new_zeros(2 * self.num_leaves, num_features, dtype=dtype)
            centre = self._centre(weight, bias).to(dtype)
            self._sums = _Sums(weight, bias, centre, features, features.new_zeros(len(features)))
        self._refresh(self._sums, leaves)

    @torch.no_grad()
    def sample(self, num_samples: int, hidden: Tensor | None = None) -> Candidates:
        """`num_samples` independent draws for each row of `hidden (..., d)`.

        Raises:
            ValueError: no hidden state, or of another width.
            RuntimeError: no weight is known yet: call `update(weight, bias)`.
        """
        num_samples = self.check_num_samples(num_samples)
        rows = self._rows(hidden)
        parts = [self._draw(part, num_samples) for part in self._blocks(rows, num_samples)]
        ids, log_prob = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        shape = (*(() if hidden is None else hidden.shape[:-1]), num_samples)
        return Candidates(ids.reshape(shape), (log_prob + math.log(num_samples)).reshape(shape))

    @torch.no_grad()
    def log_prob(
        self,
        ids: Tensor,  # (..., C)
        hidden: Tensor | None = None,  # (..., d)
    ) -> Tensor:  # (..., C)
        """`log q` of classes, for each row its own: those of the descent of the tree."""
        blocks = self._blocks(self._rows(hidden), ids.shape[-1])
        parts = ids.reshape(-1, ids.shape[-1]).split([len(block) for block in blocks])
        found = [self._log_prob(block, part) for block, part in zip(blocks, parts, strict=True)]
        return torch.cat(found).reshape(ids.shape)

    def _centre(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`(d + 1,)` to take off every class, bias last."""
        return weight.new_zeros(self.in_features + 1)

    # The kernel: rows are (d + 1) wide, with the bias last for a class and 1 last for a hidden state.

    @abstractmethod
    def _features(self, rows: Tensor) -> Tensor:
        """phi of hidden states: `(N, d + 1)` to `(N, F)`."""

    @abstractmethod
    def _feature_sums(self, rows: Tensor, alive: Tensor) -> Tensor:
        """The sum of phi over the classes of each leaf: `(L, B, d + 1)`, 0 or 1 in `alive (L, B)`, to `(L, F)`."""

    @abstractmethod
    def _kernel(self, hidden: Tensor, classes: Tensor) -> Tensor:
        """k itself: `(R, d + 1)` and `(B, d + 1)` to `(R, B)`, positive."""

    floor: float
    """The least that the kernel can be: a mass below it, times the classes, is an error of the features."""

    # The tree: node 1 is the root, 2n and 2n + 1 are the children of node n, leaf l is node num_leaves + l.

    def _draw(self, rows: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:  # (N, d + 1) to (N, S), (N, S)
        leaves, log_prob = self._descend(self._features(rows), None, num_samples)
        masses = self._leaf_masses(rows, leaves)
        cumulative = masses.cumsum(-1)
        total = cumulative[..., -1:]
        wanted = torch.minimum(torch.rand_like(total) * total, total * (1 - 1e-6))  # below the total when rounded
        places = torch.searchsorted(cumulative, wanted, right=True).clamp_(max=self.leaf_size - 1)
        log_prob += (masses.gather(-1, places) / total).log()[..., 0]
        return leaves * self.leaf_size + places[..., 0], log_prob

    def _log_prob(self, rows: Tensor, ids: Tensor) -> Tensor:  # (N, d + 1), (N, S) to (N, S)
        leaves, places = ids // self.leaf_size, ids % self.leaf_size
        _, log_prob = self._descend(self._features(rows), leaves, ids.shape[1])
        masses = self._leaf_masses(rows, leaves)
        return log_prob + (masses.gather(-1, places[..., None]) / masses.sum(-1, keepdim=True)).log()[..., 0]

    def _blocks(self, rows: Tensor, num_draws: int) -> tuple[Tensor, ...]:
        """The rows in blocks whose features, and the kernels of whose leaves, stay small."""
        numbers = self._known().features.shape[1] + num_draws * self.leaf_size
        return rows.split(max(1, 2 * BLOCK_NUMBERS // numbers)) if len(rows) else (rows,)

    def _descend(
        self,
        features: Tensor,  # (N, F)
        leaves: Tensor | None,  # (N, S): where to go; None: at random
        num_draws: int,
    ) -> tuple[Tensor, Tensor]:  # (N, S), leaves and the log-probabilities of the path to them
        nodes = torch.ones(len(features), num_draws, dtype=torch.int64, device=features.device)
        log_prob = features.new_zeros(nodes.shape)
        for level in range(self.depth):
            left, right = (self._masses(features, 2 * nodes + side, level + 1) for side in (0, 1))
            if leaves is None:
                go_right = (torch.rand_like(left) * (left + right) >= left) & (right > 0)
            else:
                go_right = (leaves >> (self.depth - 1 - level) & 1).bool()
            log_prob += (torch.where(go_right, right, left) / (left + right)).log()
            nodes = 2 * nodes + go_right
        return nodes - self.num_leaves, log_prob

    def _masses(self, features: Tensor, nodes: Tensor, level: int) -> Tensor:  # (N, F), (N, S) to (N, S)
        """`phi(h)` times the sum of each node, all of one level; but at least `floor` for every class below."""
        sums = self._known()
        least = self.floor * sums.counts[nodes]
        first = 1 << level
        if first <= 8 * nodes.shape[1]:  # few nodes: the masses of all cost less than gathering for each draw
            masses = torch.mm(features, sums.features[first : 2 * first].T).gather(1, nodes - first)
        else:
            masses = torch.empty_like(least)
            step = max(1, BLOCK_NUMBERS // (features.shape[1] * nodes.shape[1]))
            for part in (slice(start, start + step) for start in range(0, len(nodes), step)):
                gathered = sums.features.index_select(0, nodes[part].reshape(-1)).unflatten(0, nodes[part].shape)
                masses[part] = torch.bmm(gathered, features[part, :, None])[..., 0]
        return torch.maximum(masses, least)

    def _leaf_masses(self, rows: Tensor, leaves: Tensor) -> Tensor:  # (N, d + 1), (N, S) to (N, S, B)
        """The kernel of every row with the classes of its leaves, leaf after leaf; 0 where there is no class."""
        sums = self._known()
        flat, order = leaves.reshape(-1).sort()
        owners = order // max(leaves.shape[1], 1)
        masses = rows.new_zeros(len(flat), self.leaf_size)
        occupied, sizes = torch.unique_consecutive(flat, return_counts=True)
        start = 0
        for leaf, size in zip(occupied.tolist(), sizes.tolist(), strict=True):
            classes, alive = self._classes(sums, torch.tensor([leaf], device=rows.device))
            of_pairs = rows.index_select(0, owners[start : start + size])
            masses[start : start + size] = self._kernel(of_pairs, classes[0]) * alive[0]
            start += size
        return torch.empty_like(masses).index_copy_(0, order, masses).unflatten(0, leaves.shape)

    def _refresh(self, sums: _Sums, leaves: Tensor) -> None:
        """The sums of some leaves from the weight, and of the nodes above them from their children."""
        num_features = sums.features.shape[1]
        for some in leaves.split(max(1, BLOCK_NUMBERS // (self.leaf_size * self.in_features + num_features))):
            classes, alive = self._classes(sums, some)
            sums.features[self.num_leaves + some] = self._feature_sums(classes, alive)
            sums.counts[self.num_leaves + some] = alive.sum(1)
        nodes = self.num_leaves + leaves
        for _ in range(self.depth):
            nodes = torch.unique(nodes >> 1)
            for some in nodes.split(max(1, BLOCK_NUMBERS // num_features)):
                for table in (sums.features, sums.counts):
                    table[some] = table[2 * some] + table[2 * some + 1]

    def _classes(self, sums: _Sums, leaves: Tensor) -> tuple[Tensor, Tensor]:  # (L,) to (L, B, d + 1), (L, B)
        """The classes of some leaves, bias last; and 1 for those that exist and are not barred, else 0."""
        ids = leaves[:, None] * self.leaf_size + torch.arange(self.leaf_size, device=leaves.device)
        alive = ids < self.num_classes
        ids = ids.clamp_(max=self.num_classes - 1).reshape(-1)
        rows = sums.weight.index_select(0, ids).to(sums.features.dtype)
        bias = rows.new_zeros(len(ids)) if sums.bias is None else sums.bias.index_select(0, ids).to(rows.dtype)
        alive &= (bias > -math.inf).view_as(alive)
        rows = torch.cat([rows, bias.masked_fill(bias == -math.inf, 0)[:, None]], 1) - sums.centre
        return rows.view(*alive.shape, -1), alive.to(rows.dtype)

    def _rows(self, hidden: Tensor | None) -> Tensor:  # (..., d) to (N, d + 1), in the dtype of the sums
        if hidden is None:
            raise ValueError(f"hidden must be given: {type(self).__name__} draws one set for each of its rows")
        if hidden.shape[-1] != self.in_features:
            raise ValueError(f"hidden must have shape (..., {self.in_features}), got {tuple(hidden.shape)}")
        rows = hidden.detach().reshape(-1, self.in_features).to(self._known().features.dtype)
        return F.pad(rows, (0, 1), value=1.0)

    def _known(self) -> _Sums:
        if self._sums is None:
            raise RuntimeError(f"{type(self).__name__} has no weight yet: call update(weight, bias)")
        return self._sums

    def __getstate__(self) -> dict[str, Any]:
        """Without what the next `update` recomputes from the layer's weight."""
        return {**self.__dict__, "_sums": None}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, in_features={self.in_features}, leaf_size={self.leaf_size}"
