"""Adaptive softmax (Grave et al. 2017): frequent classes in the head, rare ones in tails of falling width."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lastlayer.functional.best_classes import SearchCost, merge
from lastlayer.functional.checks import check_count, eager_on_cpu
from lastlayer.functional.clusters import by_falling_count, positive_counts
from lastlayer.functional.cutoffs import best_cutoffs, check_cutoffs, default_cutoffs, measure_costs, tail_widths
from lastlayer.functional.linear_cross_entropy import linear_cross_entropy, linear_nll
from lastlayer.functional.linear_statistics import linear_score
from lastlayer.functional.ordinary import readable
from lastlayer.functional.precision import as_exact, exact_dtype
from lastlayer.functional.sampling import sample_classes
from lastlayer.functional.selection import Selection
from lastlayer.layers.base import OutputLayer
from lastlayer.layers.parts import tied
from lastlayer.layers.search import searched_topk


class _Part(NamedTuple):
    """The head or a tail: some rows of the batch, its matrix, and its classes among the candidates."""

    at: Tensor  # (n,), which rows
    rows: Tensor  # (n, w)
    weight: Tensor  # (k, w)
    ids: Tensor  # (n, M), from 0 to k - 1
    bias: Tensor | None  # (k,)
    absent: Tensor  # (n, M), which candidates are none of its classes


class AdaptiveSoftmax(OutputLayer):
    r"""The most frequent classes are the head's own; the others share one head logit per cluster and go through a
    tail whose width falls: `d / div_value^i` for cluster i = 1, 2, ...

    Equals `nn.AdaptiveLogSoftmaxWithLoss` with the same weights, whose state dicts load both ways, and has what
    that one lacks: `ignore_index`, reductions, any leading shape, autocast, classes in any order (`counts`), exact
    top-k, sampling, a head tied to an embedding, and `torch.compile(fullgraph=True)`. With `k_h = cutoffs[0]`:

        head = F.log_softmax(F.linear(h, layer.head.weight, layer.head.bias))       # k_h + J entries
        log P(y | h) = head[y]                                                      for y < k_h, else
                       head[k_h + i] + F.log_softmax(layer.tail[i](h))[y - cutoffs[i]]

    A cluster that no target touches is not computed and gets no gradient. Cost of one target in cluster i:
    `d (k_h + J) + d d_i + d_i k_i`; nothing of size `(N, V)` is ever held. Under `torch.compile` the rows of a
    cluster cannot be selected without breaking the graph, so every row is computed in every tail and masked.

    When *not* to use it: below some ten thousand classes, or where counts are flat: the gain comes from the rare
    classes being rare. The tails are narrow, so rare classes are modelled more coarsely than by a full softmax.

    Args:
        in_features: d.
        num_classes: V.
        cutoffs: rising, from 1 to V - 1: the head's classes, then the end of each cluster but the last. None: two
            tails (one where `in_features` leaves no width for a second), cut where the paper cuts text8, at V/20
            and V/4; or so that each has the same share of `counts` as under Zipf's law. `cutoffs_for`
            finds those of least cost on this machine.
        div_value: by how much the width of each further tail is divided.
        head_bias: whether the head has a bias (of k_h + J entries).
        counts: `(V,)`, how often each class occurs, when ids are not sorted by falling frequency: the layer keeps
            the permutation.
        weight: `(V, d)` Parameter, such as `embedding.weight`, whose rows then are the head's for its classes.
        reduction, ignore_index, device, dtype: as in every `OutputLayer`.

    Attributes:
        head: `weight` `(k_h + J, d)`, or `(J, d)` where tied.
        tail: for each cluster, two matrices `(d_i, d)` and `(k_i, d_i)`.
        order: `(V,)` buffer, the class of each rank; None where ids are ranks already.

    Raises:
        ValueError: cutoffs that are empty, repeated, not rising or not from 1 to V - 1; a tail of width 0; counts
            of another length, negative or not finite; a weight of another shape.

    Source: E. Grave et al., "Efficient softmax approximation for GPUs", ICML 2017.

    Example:
        >>> AdaptiveSoftmax(64, 10_000).cutoffs
        [500, 2500]
        >>> layer = AdaptiveSoftmax(64, 10_000, cutoffs=[1_000, 4_000])
        >>> hidden, targets = torch.randn(32, 64), torch.randint(10_000, (32,))
        >>> layer(hidden, targets).backward()
        >>> theirs = nn.AdaptiveLogSoftmaxWithLoss(64, 10_000, [1_000, 4_000])
        >>> theirs.load_state_dict(layer.state_dict())
        <All keys matched successfully>
        >>> torch.allclose(theirs(hidden, targets).loss, layer(hidden, targets))
        True
    """

    weight: nn.Parameter | None
    order: Tensor | None
    _ranks: Tensor | None  # (V,), the rank of each class

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        cutoffs: Sequence[int] | None = None,
        *,
        div_value: float = 4.0,
        head_bias: bool = False,
        counts: Tensor | None = None,
        weight: nn.Parameter | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, reduction=reduction, ignore_index=ignore_index)
        order = None if counts is None else by_falling_count(counts, self.num_classes)
        if cutoffs is None:
            num_tails = 2 if div_value**2 <= self.in_features else 1
            cutoffs = default_cutoffs(counts, self.num_classes, num_tails)
        self.cutoffs = check_cutoffs(cutoffs, self.num_classes)
        self.div_value = div_value
        widths = self._tail_widths = tail_widths(self.in_features, div_value, len(self.cutoffs))
        if weight is not None:
            tied(weight, (self.num_classes, self.in_features))
            device, dtype = weight.device, weight.dtype
        self.register_parameter("weight", weight)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        head_size = self.cutoffs[0] + len(widths)
        self.head = nn.Linear(self.in_features, head_size, bias=head_bias, **factory)
        self._planned = {"order": order} if order is not None and self.head.weight.is_meta else None
        order = None if order is None else order.to(self.head.weight.device)
        self.register_buffer("order", order)
        self.register_buffer("_ranks", None if order is None else order.argsort(), persistent=False)
        if weight is not None:
            self.head.weight = nn.Parameter(self.head.weight.detach()[self.cutoffs[0] :].clone())
        self.tail = nn.ModuleList(
            nn.Sequential(
                nn.Linear(self.in_features, width, bias=False, **factory),
                nn.Linear(width, stop - start, bias=False, **factory),
            )
            for width, (start, stop) in zip(widths, pairwise([*self.cutoffs, self.num_classes]), strict=True)
        )

    def reset_parameters(self) -> None:
        """Draws head and tails anew, as `nn.Linear`; a tied weight stays as it is."""
        for matrix in self.modules():
            if isinstance(matrix, nn.Linear):
                matrix.reset_parameters()

    @staticmethod
    def cutoffs_for(
        counts: Tensor,  # (V,)
        num_clusters: int,
        *,
        in_features: int = 512,
        batch_size: int = 1024,
        div_value: float = 4.0,
        costs: tuple[float, float] | None = None,
    ) -> list[int]:
        """The `num_clusters` cut-offs of least cost by the paper's model, on this machine.

        A product of n rows with k classes of width w costs `c + λ n w k`; a batch of B rows sends the share p_i of
        the counts through tail i. The sum over the head and all tails is least over a grid of about 150 cut-offs,
        exactly, by dynamic programming.

        Args:
            counts: how often each class occurs, in any order; zeros count as the smallest other count.
            num_clusters: J, the number of tails, at least 1 and below V.
            in_features, batch_size, div_value: as the layer will be used.
            costs: `(c, λ)` in seconds; None: measured during the call, in a fraction of a second.

        Raises:
            ValueError: counts that are empty, negative or not finite; a number of clusters out of range.
        """
        falling = positive_counts(counts).sort(descending=True).values
        check_count("num_clusters", num_clusters, 1, len(counts) - 1)
        widths = tail_widths(in_features, div_value, num_clusters)
        fixed, per_product = measure_costs(in_features) if costs is None else costs
        return best_cutoffs(falling, [in_features, *widths], batch_size, fixed, per_product)

    def _parameter_shapes(self) -> Iterable[tuple[str, Tensor | None, tuple[int, ...]]]:
        size, d = self.cutoffs[0], self.in_features
        head_size = size + len(self.cutoffs)
        yield "weight", self.weight, (self.num_classes, d)
        yield "head.weight", self.head.weight, (head_size if self.weight is None else head_size - size, d)
        yield "head.bias", self.head.bias, (head_size,)
        edges = pairwise([*self.cutoffs, self.num_classes])
        for i, (width, (start, stop)) in enumerate(zip(self._tail_widths, edges, strict=True)):
            project, classes = self._tail(i)
            yield f"tail.{i}.0.weight", project.weight, (width, d)
            yield f"tail.{i}.1.weight", classes.weight, (stop - start, width)

    def _loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        if self.reduction == "none" or not eager_on_cpu(targets):
            return super()._loss(hidden, targets)
        kept = targets != self.ignore_index
        if not bool(kept.all()):
            at = kept.nonzero().squeeze(1)
            hidden, targets = hidden.index_select(0, at), targets.index_select(0, at)
        # The gradients are formed in the forward pass, so the rows carry the factor of the mean from the start.
        share = 1.0 if self.reduction == "sum" else 1.0 / max(len(targets), 1)
        parts = self._parts(hidden, targets[:, None])
        loss = torch.stack([linear_nll(p.rows, p.weight, p.ids[:, 0], p.bias, scale=share) for p in parts]).sum()
        return loss if len(targets) or self.reduction == "sum" else loss + torch.nan  # 0 / 0, with gradients of 0

    def _target_log_prob(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return self._score(hidden, targets[:, None])[:, 0]

    def _score(self, hidden: Tensor, ids: Tensor) -> Tensor:
        if not readable(hidden, ids, *self.parameters()):  # no shape may depend on the candidates
            return super()._score(hidden, ids)
        score = _target_score if ids.shape[1] == 1 else linear_score
        total = hidden.new_zeros(ids.shape, dtype=exact_dtype(hidden.dtype))
        for at, rows, weight, own, bias, absent in self._parts(hidden, ids):
            found = score(rows, weight, own, bias=bias).masked_fill(absent, 0)
            total = total.index_add(0, at, found)
        return total

    def _parts(self, hidden: Tensor, ids: Tensor) -> Iterator[_Part]:
        """The head, and every tail that a candidate `(N, M)` is in."""
        ranks, tails, head_ids = self._places(ids)
        all_rows = torch.arange(len(hidden), device=hidden.device)
        yield _Part(all_rows, hidden, self._head_weight(), head_ids, self.head.bias, tails < 0)
        for i, start in enumerate(self.cutoffs):
            at = (tails == i + 1).any(1).nonzero().squeeze(1)
            if len(at):
                project, classes = self._tail(i)
                absent = tails.index_select(0, at) != i + 1
                own = (ranks.index_select(0, at) - start).masked_fill(absent, 0)
                yield _Part(at, project(hidden.index_select(0, at)), classes.weight, own, None, absent)

    def _places(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For each class its rank, the number of its tail (0: none), and the head's entry for it."""
        ranks = ids if self._ranks is None else self._ranks[ids]
        edges = torch.tensor(self.cutoffs, device=ids.device)
        tails = torch.bucketize(ranks.contiguous(), edges, right=True)
        return ranks, tails, torch.where(tails == 0, ranks, self.cutoffs[0] - 1 + tails)

    def _tail(self, i: int) -> tuple[nn.Linear, nn.Linear]:
        """The two matrices of tail i."""
        project, classes = self.tail[i].children()
        assert isinstance(project, nn.Linear)
        assert isinstance(classes, nn.Linear)
        return project, classes

    def _inner_log_prob(self, i: int, hidden: Tensor) -> Tensor:  # (N, k_i)
        """`log P(class | tail i)`."""
        return as_exact(self.tail[i](hidden)).log_softmax(1)

    def _log_prob(self, hidden: Tensor) -> Tensor:
        head, size = self._head_log_prob(hidden), self.cutoffs[0]
        tails = [self._inner_log_prob(i, hidden) + head[:, size + i, None] for i in range(len(self.cutoffs))]
        log_prob = torch.cat([head[:, :size], *tails], 1)
        return log_prob if self._ranks is None else log_prob.index_select(1, self._ranks)

    def _topk(self, hidden: Tensor, k: int, selection: Selection | None) -> tuple[Tensor, Tensor]:
        def search(rows: Tensor, own: Selection | None) -> tuple[Tensor, Tensor, Tensor]:
            return *self._best(rows, k, own), torch.empty(0, dtype=torch.int64, device=rows.device)

        return searched_topk(self, search, SearchCost(1 << 21, 0), hidden, k, selection)

    def _best(self, hidden: Tensor, k: int, selection: Selection | None) -> tuple[Tensor, Tensor]:
        """The best classes: the head's own first, then of each tail the rows in which it may hold a better one."""
        head = self._head_log_prob(hidden)
        mask = None if selection is None else selection.mask(self.num_classes).expand(len(hidden), -1)
        classes = torch.arange(self.num_classes, device=hidden.device) if self.order is None else self.order
        best = head.new_full((len(hidden), k), -torch.inf), classes.new_zeros(len(hidden), k)
        for i, (start, stop) in enumerate(pairwise([0, *self.cutoffs, self.num_classes]), -1):
            if i < 0:
                at, log_prob = slice(None), head[:, :stop]
            else:
                of_tail = head[:, self.cutoffs[0] + i]
                at = (of_tail > best[0][:, -1]).nonzero()[:, 0]
                if not len(at):
                    continue
                log_prob = self._inner_log_prob(i, hidden[at]) + of_tail[at, None]
            if mask is not None:
                log_prob = log_prob.masked_fill(mask[at][:, classes[start:stop]], -torch.inf)
            values, ranks = log_prob.topk(min(k, stop - start))
            best[0][at], best[1][at] = merge((best[0][at], best[1][at]), (values, classes[start:stop][ranks]))
        return best

    def _sample(self, hidden: Tensor, num_samples: int) -> Tensor:
        """Of the head's entries first; then, where that is a tail, of its classes."""
        parts = [sample_classes(self._head_log_prob(rows), num_samples) for rows in self._row_chunks(hidden)]
        entries = torch.cat(parts)
        ranks = entries.clone()
        for i, start in enumerate(self.cutoffs):
            of_tail = entries == self.cutoffs[0] + i
            for at in self._row_chunks(of_tail.any(1).nonzero()[:, 0]):
                drawn = start + sample_classes(self._inner_log_prob(i, hidden[at]), num_samples)
                ranks[at] = torch.where(of_tail[at], drawn, ranks[at])
        return ranks if self.order is None else self.order[ranks]

    def _head_log_prob(self, hidden: Tensor) -> Tensor:  # (N, k_h + J)
        return as_exact(F.linear(hidden, self._head_weight(), self.head.bias)).log_softmax(1)

    def _head_weight(self) -> Tensor:  # (k_h + J, d)
        tied, size = self.weight, self.cutoffs[0]
        if tied is None:
            return self.head.weight
        own = tied[:size] if self.order is None else tied.index_select(0, self.order[:size])
        return torch.cat([own, self.head.weight])

    def _to_load(self, state_dict: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
        """PyTorch's layer has no `order`: its classes are ranks, and this layer keeps its own permutation."""
        if self.order is not None and f"{prefix}order" not in state_dict:
            return {**state_dict, f"{prefix}order": self.order}
        return state_dict

    def _derive(self) -> None:
        if self.order is not None:
            self._ranks = self.order.argsort()


def _target_score(hidden: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear_score` of one candidate a row, in two thirds of its time."""
    return -linear_cross_entropy(hidden, weight, ids[:, 0], bias=bias, reduction="none")[:, None]
