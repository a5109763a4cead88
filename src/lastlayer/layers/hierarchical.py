"""Two-level hierarchical softmax: choose a cluster, then a class inside it (Goodman 2001)."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lastlayer.functional.best_classes import SearchCost
from lastlayer.functional.checks import check_vector
from lastlayer.functional.cluster_softmax import cluster_log_prob
from lastlayer.functional.clusters import check_clusters, even
from lastlayer.functional.linear_statistics import linear_score
from lastlayer.functional.logit_map import barred_classes
from lastlayer.functional.ordinary import readable
from lastlayer.functional.precision import as_exact
from lastlayer.functional.row_sparse import GradientMemory
from lastlayer.functional.segments import cluster_sums, row_clusters
from lastlayer.functional.selection import Selection
from lastlayer.functional.two_level_parameters import (
    TheanoParameters,
    blocks_of,
    check_theano,
    class_rows,
    means_above,
    one_level,
)
from lastlayer.functional.two_level_queries import sample_two_level, topk_two_level
from lastlayer.layers.base import OutputLayer
from lastlayer.layers.full import FullSoftmax
from lastlayer.layers.parts import draw
from lastlayer.layers.search import searched_topk


class HierarchicalSoftmax(OutputLayer):
    r"""Each class belongs to one of C clusters; `P(class | h) = P(cluster | h) P(class | cluster, h)`.

    With `c = clusters[y]`, equals

        head = F.log_softmax(F.linear(h, layer.head_weight, layer.head_bias))[c]
        tail = F.log_softmax(F.linear(h, rows of c in layer.weight, their biases))[place of y in c]
        log P(y | h) = head + tail

    A different model from the full softmax, with its own parameters, and exact in itself: its probabilities sum to
    one. Cost of one target, or of a candidate of `score`: `d (C + size of its cluster)`, about `3.3 d sqrt(V)`,
    against `d V`. Memory beyond parameters: the batch, and the gradient of the touched clusters. `log_prob` costs
    `d (V + C)` a row. `topk` opens clusters best first until the next cannot beat the k-th best.

    With `sparse=True` the gradients of `weight` and `bias` hold the touched clusters' rows only (coalesced), and a
    whole training step costs what those rows cost. `torch.optim.SGD` (no weight decay) and `Adagrad` take them,
    also together with dense parameters; `SparseAdam` takes them alone: `sparse_parameters()` splits the groups.
    AdamW, weight decay, `clip_grad_norm_` and `DistributedDataParallel` do not.

    When *not* to use it: below a few thousand classes, where the full softmax costs no more; and where the last
    few percent of perplexity count more than training time.

    Args:
        in_features: d.
        num_classes: V.
        clusters: `(V,)` cluster ids, each from 0 to the highest used at least once; see `lastlayer.clusters`.
            None: even ones of neighbouring ids, about `3 sqrt(V)` of them, so that the step costs least.
        bias: whether clusters and classes have one.
        sparse: row-sparse gradients for `weight` and `bias`.
        reduction, ignore_index, device, dtype: as in every `OutputLayer`.

    A bias of -inf bars a class: the others of its cluster share its probability, and its loss is infinite. A
    cluster whose classes are all barred has no probability either.

    Attributes:
        head_weight: `(C, d)`; head_bias: `(C,)`.
        weight: `(V, d)`, cluster after cluster; bias: `(V,)`, in this order. `class_weight()` gives class order.
        order: `(V,)` buffer, the class at each row of `weight`.
        offsets: `(C + 1,)` buffer; cluster c holds the rows from `offsets[c]` up to `offsets[c + 1]`.

    Raises:
        TypeError: clusters that are not int64 ids.
        ValueError: clusters of another length, negative, or with an empty cluster.

    Source: J. Goodman, "Classes for fast maximum entropy training", 2001.

    Example:
        >>> layer = HierarchicalSoftmax(16, 10_000, sparse=True)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> hidden, targets = torch.randn(32, 16), torch.randint(10_000, (32,))
        >>> layer(hidden, targets).backward()
        >>> optimizer.step()
        >>> layer.topk(hidden, 5).indices.shape
        torch.Size([32, 5])
    """

    order: Tensor
    offsets: Tensor
    _slots: Tensor  # (V,), the row of each class
    _clusters: Tensor  # (V,), the cluster of each class

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        clusters: Tensor | None = None,
        bias: bool = True,
        sparse: bool = False,
        reduction: str = "mean",
        ignore_index: int = -100,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, reduction=reduction, ignore_index=ignore_index)
        ids = even(self.num_classes) if clusters is None else check_clusters(clusters, self.num_classes)
        sizes = torch.bincount(ids)
        self.sparse = sparse
        self.num_clusters = len(sizes)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.head_weight = nn.Parameter(torch.empty(self.num_clusters, self.in_features, **factory))
        self.weight = nn.Parameter(torch.empty(self.num_classes, self.in_features, **factory))
        self.head_bias = nn.Parameter(torch.empty(self.num_clusters, **factory)) if bias else None
        self.bias = nn.Parameter(torch.empty(self.num_classes, **factory)) if bias else None
        clustering = {"order": ids.argsort(stable=True), "offsets": F.pad(sizes.cumsum(0), (1, 0))}
        for name, buffer in clustering.items():
            self.register_buffer(name, buffer.to(self.weight.device))
        self._planned = clustering if self.weight.is_meta else None
        for name in ("_slots", "_clusters"):
            self.register_buffer(name, None, persistent=False)
        self._derive()
        self._memory = GradientMemory()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within `1 / sqrt(d)`, as `nn.Linear`."""
        for parameter in self.parameters():
            draw(parameter, self.in_features)

    @classmethod
    @torch.no_grad()
    def from_full(
        cls, layer: FullSoftmax, *, clusters: Tensor | None = None, sparse: bool = False
    ) -> "HierarchicalSoftmax":
        """A two-level layer that starts from a trained full one: its vectors inside the clusters, their means
        above.

        A cluster's bias is the log-sum-exp of its classes' biases, so at `hidden = 0` both layers agree exactly;
        away from it the mean stands for the cluster, so train on. `clusters.by_embedding(layer.weight)` fits best.

        Raises:
            TypeError: a layer that is not a `FullSoftmax`, or has a logit map.
        """
        if not isinstance(layer, FullSoftmax) or layer.logit_map is not None:
            raise TypeError("layer must be a FullSoftmax without a logit map")
        made = cls(
            layer.in_features,
            layer.num_classes,
            clusters=clusters,
            sparse=sparse,
            reduction=layer.reduction,
            ignore_index=layer.ignore_index,
            device=layer.weight.device,
            dtype=layer.weight.dtype,
        )
        weight = layer.weight[made.order]
        bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias[made.order]
        made._copy(*means_above(weight, bias, made.offsets), weight, bias)
        return made

    @torch.no_grad()
    def to_full(
        self,
        at: Tensor | None = None,  # (d,)
    ) -> FullSoftmax:
        """The full softmax nearest to this layer around the hidden state `at` (none: 0), for what needs one
        matrix.

        The clusters' normalisers are not linear in the hidden state; they are expanded to first order, so
        log-probabilities and their slopes are exact at `at`, and drift away from it. Not for evaluating this
        layer: `log_prob` is exact everywhere.

        Raises:
            TypeError, ValueError: `at` is not a floating `(d,)`.
        """
        at = self.weight.new_zeros(self.in_features) if at is None else at
        check_vector("at", at, self.in_features)
        parameters = self.head_weight, self.head_bias, self.weight, self.bias
        weight, bias = one_level(*parameters, self.offsets, at.to(self.weight))
        full = FullSoftmax(
            self.in_features,
            self.num_classes,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            device=weight.device,
            dtype=weight.dtype,
        )
        assert full.bias is not None
        full.weight.copy_(weight[self._slots])
        full.bias.copy_(bias[self._slots])
        return full

    @classmethod
    @torch.no_grad()
    def from_theano(
        cls,
        W1: Tensor,  # (d, nC)
        b1: Tensor,  # (nC,)
        W2: Tensor,  # (nC, d, nO)
        b2: Tensor,  # (nC, nO)
        num_classes: int,
        *,
        sparse: bool = False,
    ) -> "HierarchicalSoftmax":
        """The layer with the parameters of a `theano.tensor.nnet.h_softmax`: class y is in cluster `y // nO`.

        Same probabilities, but in the last cluster where `nC nO > V`: Theano leaves its unused places in the
        denominator, so that its rows sum to less than one; here they hold nothing. `to_theano` is the inverse.

        Raises:
            TypeError, ValueError: parameters whose kinds or shapes do not fit; a number of classes that leaves
                a cluster empty, or some class without a place.
        """
        size = check_theano(TheanoParameters(W1, b1, W2, b2), num_classes)
        ids = torch.arange(num_classes, device="cpu") // size
        layer = cls(len(W1), num_classes, clusters=ids, sparse=sparse, device=W2.device, dtype=W2.dtype)
        layer._copy(W1.T, b1, class_rows(W2, num_classes), class_rows(b2, num_classes))
        return layer

    def _copy(self, *values: Tensor) -> None:
        """Sets head weight, head bias, weight and bias."""
        for (_, parameter, _), value in zip(self._parameter_shapes(), values, strict=True):
            assert parameter is not None
            parameter.copy_(value)

    @torch.no_grad()
    def to_theano(self) -> TheanoParameters:
        """`(W1, b1, W2, b2)` for `theano.tensor.nnet.h_softmax`, unused places 0.

        Raises:
            ValueError: clusters that are not blocks of nO neighbouring ids, the last perhaps smaller.
        """
        size = int(self.offsets[1])
        if not torch.equal(self._clusters.cpu(), torch.arange(self.num_classes, device="cpu") // size):
            raise ValueError("Theano's layout needs clusters of equally many neighbouring ids: y // nO")
        C, none = self.num_clusters, self.weight.new_zeros
        head_bias = none(C) if self.head_bias is None else self.head_bias.clone()
        bias = none(self.num_classes) if self.bias is None else self.bias
        blocks = (blocks_of(rows, C, size) for rows in (self.weight, bias))
        return TheanoParameters(self.head_weight.T.clone(), head_bias, *blocks)

    def class_weight(self) -> Tensor:  # (V, d)
        """The rows of `weight` in class order (a copy): row y is class y's vector inside its cluster."""
        return self.weight.index_select(0, self._slots)

    def _barred_clusters(self) -> Tensor | None:  # (C,) bool
        """The clusters whose classes are all barred by a bias of -inf; None where no cluster begins with one."""
        if self.bias is None or barred_classes(self.bias.index_select(0, self.offsets[:-1])) is None:
            return None
        barred = F.pad((self.bias.detach() == -torch.inf).cumsum(0), (1, 0))[self.offsets].diff()
        return barred == self.offsets.diff()

    def _parameter_shapes(self) -> Iterable[tuple[str, Tensor | None, tuple[int, ...]]]:
        yield "head_weight", self.head_weight, (self.num_clusters, self.in_features)
        yield "head_bias", self.head_bias, (self.num_clusters,)
        yield "weight", self.weight, (self.num_classes, self.in_features)
        yield "bias", self.bias, (self.num_classes,)

    def _log_prob(self, hidden: Tensor) -> Tensor:
        logits = as_exact(F.linear(hidden, self.weight, self.bias))
        peak, log_sum = cluster_sums(logits, self.offsets)
        shift = self._head_log_prob(hidden) - log_sum.masked_fill(log_sum == -torch.inf, 0)
        shifted = logits.index_select(1, self._slots).sub_(peak.index_select(1, self._clusters))
        return shifted.add_(shift.index_select(1, self._clusters))

    def _target_log_prob(self, hidden: Tensor, targets: Tensor) -> Tensor:
        clusters = self._clusters.index_select(0, targets)
        head = cluster_log_prob(hidden, self.head_weight, self._live_head_bias(), clusters)
        return self._with_inner(head, hidden, targets)

    def _score(self, hidden: Tensor, ids: Tensor) -> Tensor:
        if not readable(hidden, ids, *self.parameters()):
            return super()._score(hidden, ids)
        clusters = self._clusters[ids]
        scores_of_all = int(self.offsets.diff()[clusters].sum()) >= len(hidden) * self.num_classes
        if scores_of_all and not (self.sparse and torch.is_grad_enabled()):
            return super()._score(hidden, ids)
        head = linear_score(hidden, self.head_weight, clusters, bias=self._live_head_bias())
        rows = hidden.repeat_interleave(ids.shape[1], 0)
        return self._with_inner(head.flatten(), rows, ids.flatten()).view(ids.shape)

    def _with_inner(self, head: Tensor, hidden: Tensor, targets: Tensor) -> Tensor:  # (N,)
        """`head`, log-probabilities of the targets' clusters, plus those of the targets inside them."""
        clusters, slots = self._clusters.index_select(0, targets), self._slots.index_select(0, targets)
        absent = None if self.bias is None else barred_classes(self.bias.index_select(0, slots))
        if absent is not None and self.bias is not None:
            # Another class in their place: where a cluster has no class left, all in it would be NaN.
            other = self.bias.argmax(0, keepdim=True)
            clusters = torch.where(absent, self._clusters[self.order[other]], clusters)
            slots = torch.where(absent, other, slots)
        inner = cluster_log_prob(
            hidden, self.weight, self.bias, slots, clusters, self.offsets, sparse=self.sparse, memory=self._memory
        )
        return head + inner if absent is None else (head + inner).masked_fill(absent, -torch.inf)

    def _topk(self, hidden: Tensor, k: int, selection: Selection | None) -> tuple[Tensor, Tensor]:
        def search(rows: Tensor, own: Selection | None) -> tuple[Tensor, Tensor, Tensor]:
            head = self._head_log_prob(rows)
            return topk_two_level(rows, head, self.weight, self.bias, self.offsets, self.order, k, own)

        return searched_topk(self, search, SearchCost(1 << 22, self.num_clusters), hidden, k, selection)

    def _sample(self, hidden: Tensor, num_samples: int) -> Tensor:
        def inner(rows: Tensor, start: int, size: int) -> Tensor:  # (n,) to (n, size)
            bias = None if self.bias is None else self.bias.narrow(0, start, size)
            return as_exact(F.linear(part.index_select(0, rows), self.weight.narrow(0, start, size), bias))

        drawn = []
        for part in self._row_chunks(hidden):
            drawn.append(sample_two_level(self._head_log_prob(part), self.offsets, inner, num_samples))
        return self.order[torch.cat(drawn)]

    def _head_log_prob(self, hidden: Tensor) -> Tensor:  # (N, C)
        return as_exact(F.linear(hidden, self.head_weight, self._live_head_bias())).log_softmax(1)

    def _live_head_bias(self) -> Tensor | None:  # (C,)
        """`head_bias`, but -inf at clusters whose classes all have a bias of -inf."""
        barred = self._barred_clusters()
        return (
            self.head_bias
            if barred is None or self.head_bias is None
            else self.head_bias.masked_fill(barred, -torch.inf)
        )

    def _to_load(self, state_dict: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
        """Takes over the clusters of the saved layer too, of which there must be as many."""
        last = self.num_classes - 1
        order, offsets = state_dict.get(f"{prefix}order"), state_dict.get(f"{prefix}offsets")
        if order is not None and not torch.equal(order.sort().values.cpu(), torch.arange(last + 1, device="cpu")):
            raise ValueError(f"{prefix}order in the state dict must hold each class from 0 to {last} once")
        edges = None if offsets is None else [int(offsets[0]), int(offsets[-1])]
        if offsets is not None and (edges != [0, last + 1] or not bool((offsets.diff() > 0).all())):
            raise ValueError(f"{prefix}offsets in the state dict must rise from 0 to {self.num_classes}")
        return state_dict

    def _derive(self) -> None:
        """Sets what follows from `order` and `offsets`: row and cluster of each class."""
        self._slots = self.order.argsort()
        self._clusters = row_clusters(self.offsets, self.num_classes).index_select(0, self._slots)
