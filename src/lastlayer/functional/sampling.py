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
    ends = cumulative_weights(logits, peak)
    total = ends[:, -1:]
    if eager_on_cpu(total) and not bool(total.isfinite().all()):
        raise ValueError("hidden must give finite logits to be sampled from; some row has NaN or infinite ones")
    uniform = uniform_doubles((len(logits), num_samples), logits.device, generator)
    return classes_at(logits, peak, ends, uniform * total)


def uniform_doubles(
    shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None = None
) -> Tensor:  # of `shape`, float64
    """`torch.rand(shape, dtype=torch.float64)` with its 53 random bits, under `torch.compile` too.

    Inductor draws float32 numbers for every dtype, of 24 bits: too few to tell millions of classes apart. Of
    integers it draws all bits.
    """
    return torch.randint(1 << 53, shape, device=device, generator=generator).double().mul_(2.0**-53)


def cumulative_weights(
    logits: Tensor,  # (N, V)
    peak: Tensor,  # (N, 1)
) -> Tensor:  # (N, B) float64; the last is the sum over all classes
    """Cumulative sums of `exp(logits - peak)`: at every class, or, of many, at the end of each block of them."""
    blocks = _blocks(logits)
    if len(blocks) == 1:
        return _weights(logits, peak).cumsum(1)
    return torch.stack([_weights(block, peak).sum(1) for block in blocks], 1).cumsum(1)


def classes_at(
    logits: Tensor,  # (N, V)
    peak: Tensor,  # (N, 1)
    ends: Tensor,  # (N, B), of `cumulative_weights`
    places: Tensor,  # (N, S) float64, from 0 to the last of them
) -> Tensor:  # (N, S), int64
    """The class in whose interval of the cumulative weights each place is."""
    found, rest = intervals_at(ends, places)
    blocks = _blocks(logits)
    if len(blocks) == 1:
        return found
    ids, width = torch.empty_like(found), blocks[0].shape[1]
    for number, block in enumerate(blocks):
        here = found == number
        if eager_on_cpu(here) and not bool(here.any()):
            continue
        inside, _ = intervals_at(_weights(block, peak).cumsum(1), rest)
        ids = torch.where(here, inside + number * width, ids)
    return ids


def _blocks(logits: Tensor) -> tuple[Tensor, ...]:
    return logits.split(max(1, BLOCK_NUMBERS // len(logits)), 1)


def _weights(logits: Tensor, peak: Tensor) -> Tensor:
    """What each class's probability is in proportion to, float64."""
    return (logits.double() - peak).exp_()


def intervals_at(
    ends: Tensor,  # (N, B) float64, cumulative weights
    places: Tensor,  # (N, S) float64, from 0 to the last of them
) -> tuple[Tensor, Tensor]:  # (N, S) each
    """The interval that each place is in, and how far: the first whose end is above it, never an empty one."""
    places = torch.minimum(places, torch.nextafter(ends[:, -1:], ends.new_zeros(())))
    found = torch.searchsorted(ends, places, right=True)
    before = torch.where(found > 0, ends.gather(1, (found - 1).clamp_(min=0)), 0.0)
    return found, places - before
