"""Random numbers that are the same on all ranks."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lastlayer.distributed.collectives import from_first
from lastlayer.distributed.ranks import Ranks


@contextmanager
def same_random_numbers(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """PyTorch's default generators draw what those of the first rank draw; sends their states, some kB.

    A rank whose generator was in the same state goes on from where the first rank's is afterwards; another's own
    generator is left as it was.
    """
    if ranks.size == 1:
        yield
        return
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    before = [generator.get_state() for generator in generators]
    own_device = torch.device(ranks.mesh.device_type)
    firsts = [from_first(state.to(own_device), ranks).to(state.device) for state in before]
    for generator, first in zip(generators, firsts, strict=True):
        generator.set_state(first)
    try:
        yield
    finally:
        for generator, state, first in zip(generators, before, firsts, strict=True):
            if not torch.equal(state, first):
                generator.set_state(state)
