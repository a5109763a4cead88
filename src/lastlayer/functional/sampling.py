"""Class ids drawn from rows of logits, exactly, for any number of classes."""

import torch
from torch import Tensor

from lastlayer.functional.checks import eager_on_cpu

# Of a (rows, classes) block of float64 weights, which are made for one block of classes after another.
BLOCK_NUMBERS = 1 << 20


@torch.no_grad()
def sample_classes(
    logits: Tensor,  # (N, V), of which each row is drawn from the softmax
    num_samples: int,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:  # (N, num_samples), int64
    """Equals `torch.multinomial(logits.softmax(-1), num_samples, replacement=True)`, in distribution.

    By inversion of the cumulative distribution, whose sums are in float64: `torch.multinomial` sums in float32,
    where the smallest step near 1 is 6e-8, so that from some 10^6 classes on its draws are visibly off, and it
    refuses more than 2^24. A class of probability 0 is never drawn.

    Cost: two passes over the logits (one where they fit a block). Memory: 8 MB, beyond the logits and the draws.

    Raises:
        ValueError: on a CPU, a row that has no probabilities: NaN, infinity, or -infinity alone.
    """
    if not len(logits):
        return torch.empty(0, num_samples, dtype=torch.int64, device=logits.device)
    peak = logits.amax(1, keepdim=True)
    width = max(1, BLOCK_NUMBERS // len(logits))
    blocks = logits.split(width, 1)
    if len(blocks) == 1:
        ends = _weights(logits, peak).cumsum(1)
    else:
        ends = torch.stack([_weights(block, peak).sum(1) for block in blocks], 1).cumsum(1)
    total = ends[:, -1:]
    if eager_on_cpu(total) and not bool(total.isfinite().all()):
        raise ValueError("hidden must give finite logits to be sampled from; some row has NaN or infinite ones")
    uniform = torch.rand(len(logits), num_samples, dtype=torch.float64, device=logits.device, generator=generator)
    found, rest = _invert(ends, uniform * total)
    if len(blocks) == 1:
        return found
    ids = torch.empty_like(found)
    for number, block in enumerate(blocks):
        here = found == number
        if eager_on_cpu(here) and not bool(here.any()):
            continue
        inside, _ = _invert(_weights(block, peak).cumsum(1), rest)
        ids = torch.where(here, inside + number * width, ids)
    return ids


def _weights(logits: Tensor, peak: Tensor) -> Tensor:
    """What each class's probability is in proportion to, float64."""
    return (logits.double() - peak).exp_()


def _invert(
    ends: Tensor,  # (N, B) float64, cumulative weights
    places: Tensor,  # (N, S) float64, from 0 to the last of them
) -> tuple[Tensor, Tensor]:  # (N, S) each
    """The interval that each place is in, and how far: the first whose end is above it, never an empty one."""
    places = torch.minimum(places, torch.nextafter(ends[:, -1:], ends.new_zeros(())))
    found = torch.searchsorted(ends, places, right=True)
    before = torch.where(found > 0, ends.gather(1, (found - 1).clamp_(min=0)), 0.0)
    return found, places - before
