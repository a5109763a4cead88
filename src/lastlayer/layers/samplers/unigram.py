"""Classes as often as they occur, or a power of it, by an alias table."""

import torch
from torch import Tensor

from lastlayer.functional.checks import check_not_negative
from lastlayer.functional.clusters import check_counts
from lastlayer.layers.samplers.independent import IndependentSampler


class Unigram(IndependentSampler):
    """`q_i` proportional to `counts[i] ** power`: `torch.multinomial` at O(1) a draw, for any V.

    Two random numbers and two reads of the alias table make a draw; the table takes O(V) once, and 12 bytes
    a class. A class of count 0 is never drawn, and cannot be a target of a loss that corrects its targets.

    Args:
        counts: `(V,)`, how often each class occurs.
        power: of the counts: 1 for sampled softmax, 0.75 for negative sampling (word2vec), 0.1 to 0.4 for
            BlackOut.
        replacement, shared: whether a class may come twice; one set for all rows, or one for each.

    Raises:
        TypeError: counts that are no tensor of numbers.
        ValueError: counts that are negative, not finite, all 0, or whose powers overflow.

    Source: M. D. Vose, "A linear algorithm for generating random numbers with a given distribution", 1991.

    >>> sampler = Unigram(torch.tensor([4.0, 0.0, 12.0]))
    >>> sampler.log_prob(torch.arange(3)).exp().tolist()
    [0.25, 0.0, 0.75]
    """

    table: Tensor  # (V,), int64: a place's threshold in the upper 32 bits, its alias in the lower
    log_probs: Tensor  # (V,)

    def __init__(
        self, counts: Tensor, power: float = 1.0, *, replacement: bool = True, shared: bool = True
    ) -> None:
        mass = check_counts(counts)
        super().__init__(len(mass), replacement=replacement, shared=shared)
        self.power = check_not_negative("power", power)
        mass = torch.where(mass > 0, mass.pow(self.power), 0.0)
        total = mass.sum()
        if not bool(total > 0):
            raise ValueError("counts must hold a positive count, got none")
        if not bool(total.isfinite()):
            raise ValueError(
                f"counts ** power overflows: the largest count is {float(counts.max())}, power={power}"
            )
        prob = mass / total
        threshold, alias = alias_table(prob)
        self.register_buffer("table", (threshold * 2**30).round().long() << 32 | alias, persistent=False)
        self.register_buffer("log_probs", prob.log().float(), persistent=False)

    def _draw(self, num_sets: int, num_samples: int, device: torch.device) -> Tensor:
        numel = num_sets * num_samples
        places = torch.randint(self.num_classes, (numel,), device=device)
        entries = self.table.index_select(0, places)  # one read from memory, not two
        own = torch.randint(2**30, (numel,), device=device) < entries >> 32
        return torch.where(own, places, entries & 0xFFFFFFFF).reshape(num_sets, num_samples)

    def log_prob(self, ids: Tensor, hidden: Tensor | None = None) -> Tensor:
        """`log(counts ** power)`, normalised."""
        return self.log_probs.index_select(0, ids.reshape(-1)).reshape(ids.shape)


def alias_table(prob: Tensor) -> tuple[Tensor, Tensor]:  # (V,) to (V,), (V,)
    """Thresholds and aliases such that a uniform place, then its class or its alias, draws from `prob`.

    Every place has the mass 1 / V. Light classes (below it) fill their place up with what heavy ones have in
    excess, both in order of their ids, so that light class i is filled by the first heavy class whose cumulative
    excess passes the cumulative lack before i; a heavy class whose excess is used up, and more, is filled
    by the next heavy one. Cumulative sums take the place of Vose's loop over classes.
    """
    mass = prob.double() * len(prob)
    light = (mass < 1).nonzero()[:, 0]
    heavy = (mass >= 1).nonzero()[:, 0]
    threshold, alias = torch.ones_like(mass), torch.arange(len(mass), device=mass.device)
    if not len(light) or not len(heavy):  # all equal
        return threshold, alias
    lack = (1 - mass[light]).cumsum(0)
    excess = (mass[heavy] - 1).cumsum(0)
    before = torch.cat([lack.new_zeros(1), lack[:-1]])
    giver = torch.searchsorted(excess, before, right=True).clamp_(max=len(heavy) - 1)
    threshold[light], alias[light] = mass[light], heavy[giver]
    used_up = torch.searchsorted(lack, excess[:-1]).clamp_(max=len(light) - 1)
    threshold[heavy[:-1]] = (1 + excess[:-1] - lack[used_up]).clamp_(0, 1)
    alias[heavy[:-1]] = heavy[1:]
    return threshold, alias
