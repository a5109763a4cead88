"""The contract of every output layer: its calls, and the laws that tie them together."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lastlayer.functional.checks import (
    REDUCTIONS,
    check_choice,
    check_count,
    check_hidden,
    check_positive,
    check_targets,
)
from lastlayer.functional.ordinary import ordinary
from lastlayer.functional.reduce import at_kept, kept_rows, reduce_loss
from lastlayer.functional.results import TopK
from lastlayer.functional.sampling import sample_classes
from lastlayer.functional.selection import Selection, candidate_scores, make_selection, topk_in_chunks
from lastlayer.layers.parts import keep_buffers

# Rows of (rows, V) log-probabilities that `sample` and the default `topk` hold at once, in numbers.
CHUNK_NUMBERS = 1 << 24


class OutputLayer(nn.Module, ABC):
    """The last layer of a network with very many classes: a model of `P(class | hidden)`.

    Six calls, for `hidden (..., d)` and `targets (...)` of class ids:

    | call | returns |
    |---|---|
    | `layer(hidden, targets)` | the training loss: `()`, or `(...)` when `reduction="none"` |
    | `layer.log_prob(hidden)` | `(..., V)`: exact, normalised log-probabilities |
    | `layer.target_log_prob(hidden, targets)` | `(...)`: the same for one class each; 0 where ignored |
    | `layer.topk(hidden, k, exclude=, allowed=)` | `TopK(log_prob, indices)`, both `(..., k)`, best first |
    | `layer.sample(hidden, num_samples)` | `(..., num_samples)` class ids drawn from the model |
    | `layer.score(hidden, ids (..., C))` | `(..., C)`: log-probabilities of given candidates |

    Laws (`lastlayer.testing` holds one test for each; any layer of your own can be certified with it):

    1. `log_prob(h).exp().sum(-1) == 1`
    2. `target_log_prob(h, t) == log_prob(h).gather(-1, t)`, and `score(h, ids) == log_prob(h).gather(-1, ids)`
    3. `topk(h, k)` equals `log_prob(h).topk(k)`, indices up to ties; with `exclude` or `allowed` that of the
       log-probabilities with -inf at every other class
    4. the loss of a likelihood layer is the reduced `-target_log_prob`
    5. any leading shape, no rows, every target ignored (as in `F.cross_entropy`), non-contiguous input
    6. `gradcheck` in float64; bfloat16 and autocast no worse than PyTorch's own operations in that dtype
    7. `state_dict`, `copy.deepcopy`, pickling and `.to(dtype)` keep the model
    8. bad input is a `ValueError`, `TypeError` or `IndexError` that names the argument; the layer is unchanged
    9. second derivatives in every way to form them, and the transforms of `torch.func`, are right or refused
    10. on "meta" every call gives the shapes and dtypes that it gives with values
    11. `torch.export` takes `log_prob`, `topk` and the loss, for any number of rows

    A bias of -inf bars a class: `topk` and `sample` never return it, its probability is 0, and it has no gradient.
    As a target its loss is infinite.

    A subclass writes hooks over plain rows, `hidden (N, d)` and valid `targets (N,)`: `_log_prob` and
    `_target_log_prob`, and where it can do better than their defaults `_topk`, `_score`, `_sample`, `_row_loss`
    (a training loss that is not the likelihood) or `_loss` (one that ignores and reduces by itself); with buffers
    of its own `_to_load` (what is loaded of a state dict) and `_derive` (what depends on the buffers).
    Shapes, checks, ignored targets and reductions are written here, once.

    Args:
        in_features: d, the width of `hidden`.
        num_classes: V.
        reduction: "mean" (over the targets that are not ignored), "sum" or "none".
        ignore_index: the target that marks a row as absent: no loss, no gradient.

    Raises:
        ValueError: a size below 1, or an unknown reduction.
    """

    sparse = False  # whether gradients of `weight` and `bias` are row-sparse in training
    _planned: Mapping[str, Tensor] | None = None  # what buffers of a layer made on "meta" will hold

    def __init__(
        self, in_features: int, num_classes: int, *, reduction: str = "mean", ignore_index: int = -100
    ) -> None:
        super().__init__()
        self.in_features = check_positive("in_features", in_features)
        self.num_classes = check_positive("num_classes", num_classes)
        self.reduction = check_choice("reduction", reduction, REDUCTIONS)
        self.ignore_index = ignore_index

    def forward(
        self,
        hidden: Tensor,  # (..., d)
        targets: Tensor,  # (...), of any integer dtype
    ) -> Tensor:  # (), or (...) for "none"
        """The training loss, reduced; float32 for half-precision input."""
        rows, ids = self._flatten(hidden, targets)
        loss = self._loss(rows, ids)
        return loss.reshape(targets.shape) if self.reduction == "none" else loss

    def log_prob(
        self,
        hidden: Tensor,  # (..., d)
    ) -> Tensor:  # (..., V)
        """Exact, normalised log-probabilities of every class."""
        rows = self._rows(hidden)
        return self._log_prob(rows).reshape(*hidden.shape[:-1], self.num_classes)

    def target_log_prob(
        self,
        hidden: Tensor,  # (..., d)
        targets: Tensor,  # (...)
    ) -> Tensor:  # (...), 0 where ignored
        """The exact log-probability of one class a row; of several, `score` costs less."""
        rows, ids = self._flatten(hidden, targets)
        values = at_kept(self._target_log_prob, *kept_rows(rows, ids, self.ignore_index))
        return values.reshape(targets.shape)

    def score(
        self,
        hidden: Tensor,  # (..., d)
        ids: Tensor,  # (..., C), class ids, padded with ignore_index
    ) -> Tensor:  # (..., C), 0 where padded
        """The exact log-probabilities of given candidates: `log_prob(hidden).gather(-1, ids)`.

        A normaliser over all classes is computed once a row, however many candidates it has. A padded place gives
        0, as an ignored target does in `target_log_prob`. Differentiable.

        Raises:
            TypeError, ValueError, IndexError: ids of another dtype or shape, or that are no classes.
        """
        rows = self._rows(hidden)
        shape = hidden.shape[:-1]
        return candidate_scores(
            lambda own: self._score(rows, own), ids, shape, self.num_classes, self.ignore_index
        )

    def topk(
        self,
        hidden: Tensor,  # (..., d)
        k: int,
        *,
        exclude: Tensor | None = None,  # (..., E)
        allowed: Tensor | None = None,  # (V,) bool, or (A,) class ids
    ) -> TopK:
        """The `k` most probable classes, best first.

        Args:
            k: from 1 to `num_classes`.
            exclude: class ids that must not be returned for their row, padded with `ignore_index`.
            allowed: the only classes that may be returned, the same for all rows: a mask, or ids.

        The log-probabilities are those of the whole model. Where fewer than `k` classes are left (a class of
        probability 0 is not), the last indices are -1 and their log-probabilities -inf.

        Raises:
            TypeError, ValueError, IndexError: an argument of another dtype or shape, out of range, or that allows
                no class.
        """
        rows = self._rows(hidden)
        k = check_count("k", k, 1, self.num_classes)
        leading = hidden.shape[:-1]
        selection = make_selection(exclude, allowed, leading, self.num_classes, self.ignore_index, hidden.device)
        log_prob, indices = self._topk(rows, k, selection)
        indices = indices.masked_fill(log_prob == -torch.inf, -1)
        return TopK(log_prob.reshape(*leading, k), indices.reshape(*leading, k))

    @torch.no_grad()
    def sample(
        self,
        hidden: Tensor,  # (..., d)
        num_samples: int = 1,
    ) -> Tensor:  # (..., num_samples)
        """Class ids drawn from the model, with replacement; seeded by `torch.manual_seed`.

        Exact for any number of classes: cumulative sums are in float64. Raises ValueError where hidden gives NaN.
        """
        rows = self._rows(hidden)
        num_samples = check_positive("num_samples", num_samples)
        return self._sample(rows, num_samples).reshape(*hidden.shape[:-1], num_samples)

    def linear_head(self) -> tuple[Tensor, Tensor | None, nn.Module | None]:
        """`(weight (V, d), bias (V,) or None, logit_map or None)` of a layer that ends in one matrix."""
        raise TypeError(f"{type(self).__name__} does not end in one matrix, so it has no linear_head()")

    def sparse_parameters(self) -> list[nn.Parameter]:
        """The parameters whose gradients in training are row-sparse; empty unless the layer has `sparse=True`.

        `SGD` and `Adagrad` take them together with dense ones; other optimizers must get the others alone.
        """
        own = [getattr(self, name, None) for name in ("weight", "bias")] if self.sparse else []
        return [parameter for parameter in own if parameter is not None]

    def own_optimizer(self, lr: float) -> torch.optim.Optimizer | None:
        """The optimizer that alone can train this layer, over all of it; None where any of PyTorch's can.

        `lr` is the learning rate of plain SGD.
        """
        return None

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, num_classes={self.num_classes}"

    # The hooks: rows only, targets already checked.

    @abstractmethod
    def _log_prob(self, hidden: Tensor) -> Tensor:
        """`hidden (N, d)` to `(N, V)`."""

    @abstractmethod
    def _target_log_prob(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """`hidden (N, d)`, valid `targets (N,)` to `(N,)`."""

    def _row_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The loss of every row, `(N,)`; of a likelihood layer the negative log-probability."""
        return -self._target_log_prob(hidden, targets)

    def _loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The reduced loss; `targets` may hold `ignore_index`."""
        kept, *rows = kept_rows(hidden, targets, self.ignore_index)
        return reduce_loss(at_kept(self._row_loss, kept, *rows), kept, self.reduction)

    def _score(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """`hidden (N, d)`, valid `ids (N, C)` to `(N, C)`."""
        parts = zip(self._row_chunks(hidden), self._row_chunks(ids), strict=True)
        return torch.cat([self._log_prob(rows).gather(1, own) for rows, own in parts])

    def _topk(self, hidden: Tensor, k: int, selection: Selection | None) -> tuple[Tensor, Tensor]:
        """`(log_prob, indices)`, both `(N, k)`, best first; -inf where fewer than k classes are left."""
        return self._dense_topk(self._log_prob, hidden, k, selection)

    def _sample(self, hidden: Tensor, num_samples: int) -> Tensor:
        """`(N, num_samples)` class ids."""
        return torch.cat([sample_classes(self._log_prob(rows), num_samples) for rows in self._row_chunks(hidden)])

    def _parameter_shapes(self) -> Iterable[tuple[str, Tensor | None, tuple[int, ...]]]:
        """`(name, parameter, the shape that it must have)` of what a user may replace, checked at every call."""
        return ()

    def _to_load(self, state_dict: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
        """What is loaded of a state dict: the same, checked or completed."""
        return state_dict

    def _derive(self) -> None:
        """Sets what depends on buffers or parameters, once a state dict was loaded or planned buffers were set."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "OutputLayer":
        """A cast of the layer is none of its buffers, and those that get memory get their planned values."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        keep_buffers(self, {name: buffer for name, buffer in before.items() if buffer.is_floating_point()})
        planned = self._planned or {}
        filled = {n: values for n, values in planned.items() if before[n].is_meta and not getattr(self, n).is_meta}
        if filled:
            keep_buffers(self, filled)
            self._derive()
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super()._load_from_state_dict(self._to_load(state_dict, prefix), prefix, *args)
        self._derive()

    def _dense_topk(
        self, scores_of: Callable[[Tensor], Tensor], hidden: Tensor, k: int, selection: Selection | None
    ) -> tuple[Tensor, Tensor]:
        """The best of `scores_of(hidden)`, `(N, V)`, that the selection permits."""

        def of_chunk(rows: Tensor, own: Selection | None) -> tuple[Tensor, Tensor]:
            scores = scores_of(rows)
            values, indices = (scores if own is None else own.bar(scores)).topk(k)
            return values, indices

        return topk_in_chunks(of_chunk, self._row_chunks(hidden), selection)

    def _differentiable(self, hidden: Tensor, log_prob: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The result of a search, with gradients, which do not flow through the search."""
        if torch.is_grad_enabled():
            absent = log_prob == -torch.inf
            log_prob = self._score(hidden, indices.masked_fill(absent, 0)).masked_fill(absent, -torch.inf)
        return log_prob, indices

    def _row_chunks(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """`hidden (N, d)` in pieces whose `(rows, V)` log-probabilities stay small; one empty piece if N = 0."""
        if not ordinary(hidden) or not len(hidden):
            return (hidden,)
        return hidden.split(max(1, CHUNK_NUMBERS // self.num_classes))

    def _rows(self, hidden: Tensor) -> Tensor:
        first = next(self.parameters(), None)
        check_hidden(hidden, self.in_features, None if first is None else first.dtype)
        for name, parameter, shape in self._parameter_shapes():
            if parameter is not None and parameter.shape != shape:
                raise ValueError(
                    f"{name} must have the shape {shape} that this {type(self).__name__} was made for, and was "
                    f"replaced by one of {tuple(parameter.shape)}; make a new layer for other sizes"
                )
        return hidden.reshape(-1, self.in_features)

    def _flatten(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        rows = self._rows(hidden)
        ids, _ = check_targets(targets, hidden.shape[:-1], self.num_classes, self.ignore_index)
        return rows, ids.reshape(-1)
