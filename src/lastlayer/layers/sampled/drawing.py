"""The candidates of a batch, and the inputs of a sampler before it draws them."""

import torch
from torch import Tensor

from lastlayer.functional.ordinary import readable
from lastlayer.layers.samplers.base import Candidates, Sampler


def check_sampler(sampler: Sampler, num_classes: int, num_samples: int) -> None:
    """An error unless `sampler` draws sets of `num_samples` from `num_classes` classes."""
    if not isinstance(sampler, Sampler):
        raise TypeError(f"sampler must be a Sampler such as LogUniform({num_classes}), got {sampler!r}")
    if sampler.num_classes != num_classes:
        raise ValueError(
            f"sampler must be of the layer's num_classes={num_classes}, got one of {sampler.num_classes}"
        )
    sampler.check_num_samples(num_samples)


class Drawing:
    """Draws the candidates of each batch of a layer.

    The sampler receives the targets in training (where their values cannot be read, only if draws depend on them),
    and, if it follows the weight, the rows that may have changed since its last update: those of the previous
    batch, and of the one before it, for where two batches were computed before one step. An optimizer that changes
    other rows (momentum, weight decay) is not followed there.
    """

    def __init__(self) -> None:
        self._touched: list[Tensor] = []

    def draw(
        self,
        sampler: Sampler,
        num_samples: int,
        hidden: Tensor,  # (N, d)
        targets: Tensor,  # (N, K)
        target_weights: Tensor,  # (N, K), 0 where there is no target
        weight: Tensor,  # (V, d)
        bias: Tensor | None,  # (V,)
        training: bool,
    ) -> Candidates:
        """A fresh sample."""
        if training and (readable(targets) or not sampler.compiles):
            sampler.observe(targets[target_weights != 0])
        if not sampler.follows_weight:
            return sampler.sample(num_samples, hidden)
        if not readable(weight, bias, hidden, targets):
            raise RuntimeError(
                f"{type(sampler).__name__} of lastlayer keeps sums of the weight, which it cannot update inside a "
                "transform of torch.func, in an exported program or on 'meta'; use one that does not "
                "follow the weight, such as LogUniform"
            )
        sampler.update(weight, bias, torch.cat(self._touched) if self._touched else None)
        found = sampler.sample(num_samples, hidden)
        latest = torch.unique(torch.cat([targets.reshape(-1), found.ids.reshape(-1)]))
        self._touched = [*self._touched[-1:], latest]
        return found

    def forget(self) -> None:
        """The whole weight may have changed."""
        self._touched = []

    def __getstate__(self) -> dict[str, object]:
        return {"_touched": []}
