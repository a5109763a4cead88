"""The candidates of a batch, and the inputs of a sampler before it draws them."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from lastlayer.functional.operators import outside_graphs
from lastlayer.functional.ordinary import readable
from lastlayer.layers.linear_head import LinearHead
from lastlayer.layers.samplers.base import Candidates, Sampler


class DrawingLayer(LinearHead):
    """A linear layer that draws some classes for each batch.

    The sampler receives the targets in training (where their values cannot be read, only if draws depend on them),
    and, if it follows the weight, the rows that may have changed since its last update: those of the previous
    batch, and of the one before it, for where two batches were computed before one step. An optimizer that changes
    other rows (momentum, weight decay) is not followed there.
    """

    sampler: Any  # a Sampler; None: all classes are used
    num_samples: Any  # an int; None with all classes

    def _set_sampler(self, sampler: Sampler, num_samples: int, sparse: bool) -> None:
        """An error unless `sampler` draws sets of `num_samples` from this layer's classes."""
        if not isinstance(sampler, Sampler):
            raise TypeError(f"sampler must be a Sampler such as LogUniform({self.num_classes}), got {sampler!r}")
        if sampler.num_classes != self.num_classes:
            raise ValueError(
                f"sampler must be of the layer's num_classes={self.num_classes}, got one of {sampler.num_classes}"
            )
        self.num_samples = sampler.check_num_samples(num_samples)
        self.sampler, self.sparse = sampler.to(self.weight.device), sparse
        self._touched: list[Tensor] = []  # the classes of the last two batches

    def _draw(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Candidates:  # (N, d), (N, K), 0 for no target
        """A fresh sample for a batch."""
        sampler, num_samples = self.sampler, self.num_samples
        if self.training and (readable(ids) or not sampler.compiles):
            sampler.observe(ids[weights != 0])
        if not sampler.follows_weight:
            return sampler.sample(num_samples, rows)
        if not readable(self.weight, self.bias, rows, ids):
            raise RuntimeError(
                f"{type(sampler).__name__} of lastlayer keeps sums of the weight, which it cannot update inside a "
                "transform of torch.func, in an exported program or on 'meta'; use one that does not "
                "follow the weight, such as LogUniform"
            )
        sampler.update(self.weight, self.bias, torch.cat(self._touched) if self._touched else None)
        found = sampler.sample(num_samples, rows)
        latest = torch.unique(torch.cat([ids.reshape(-1), found.ids.reshape(-1)]))
        self._touched = [*self._touched[-1:], latest]
        return found

    @abstractmethod
    def _loss_of_batch(self, *args: Any, **kwargs: Any) -> Tensor:
        """The reduced loss of rows, targets and what belongs to them."""

    def _compiles(self) -> bool:
        """Whether a compiled graph can hold the loss: Inductor has no sparse gradients."""
        return self.sampler is None or (self.sampler.compiles and not self.sparse)

    def _loss_in_graphs(self, *batch: Any) -> Tensor:
        """`_loss_of_batch`, in the graph that is compiled, if any, or outside of it."""
        return self._loss_of_batch(*batch) if self._compiles() else self._loss_outside_graphs(*batch)

    @outside_graphs
    def _loss_outside_graphs(self, *batch: Any) -> Tensor:
        return self._loss_of_batch(*batch)

    def _derive(self) -> None:
        """Another weight: the sampler looks at all of it."""
        self._touched = []
