"""FactoredOutput trained by several processes, each with a part of every batch."""

import os
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from lastlayer import FactoredOutput, FactoredSGD, SquaredError

D, V, N, STEPS, PROCESSES = 8, 50, 6, 3, 2


def model():
    torch.manual_seed(0)
    return nn.Linear(D, D), FactoredOutput(D, V, loss=SquaredError())


def optimizers(encoder, layer):
    return torch.optim.SGD(encoder.parameters(), 0.1), FactoredSGD(layer, 0.01)


def train(run, layer, both, batches, wanted=lambda hidden, targets: (hidden, targets)):
    for inputs, targets in batches:
        loss = layer(*wanted(run(inputs), targets))
        loss.backward()
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()


def batches():
    torch.manual_seed(1)
    return [(torch.randn(N, D), torch.randint(V, (N,))) for _ in range(STEPS)]


def gathered(rows):
    """As the page on FactoredOutput has it."""
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.detach().contiguous())
    parts[dist.get_rank()] = rows
    return torch.cat(parts)


def all_rows(hidden, targets):
    hidden.register_hook(lambda gradient: gradient * dist.get_world_size())
    return gathered(hidden), gathered(targets)


def one_of_several(rank, place):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=PROCESSES)
    encoder, layer = model()
    run = DistributedDataParallel(encoder)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        both = optimizers(encoder, layer)
    assert any("gather hidden states and targets" in str(warning.message) for warning in told)
    own = slice(rank * N // PROCESSES, (rank + 1) * N // PROCESSES)
    train(run, layer, both, [(inputs[own], targets[own]) for inputs, targets in batches()], all_rows)
    torch.save((encoder.weight.detach(), layer.weight.detach()), os.path.join(place, str(rank)))
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_processes_that_gather_train_as_one(tmp_path):
    encoder, layer = model()
    train(encoder, layer, optimizers(encoder, layer), batches())
    spawn(one_of_several, args=(str(tmp_path),), nprocs=PROCESSES)
    for rank in range(PROCESSES):
        for found, expected in zip(torch.load(tmp_path / str(rank)), (encoder.weight, layer.weight), strict=True):
            torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-6)
