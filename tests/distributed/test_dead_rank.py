"""Ranks that disagree in a later call, or of which one dies: the others end with PyTorch's error, in time."""

import os
import tempfile
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp

from lastlayer import FullSoftmax
from lastlayer.distributed import shard

TIMEOUT = 15  # seconds


def make():
    torch.manual_seed(0)
    return FullSoftmax(4, 9)


def begin(rank, folder, name):
    limit = timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=2, timeout=limit)


def one_process(rank, folder):
    torch.set_num_threads(1)
    hidden, targets = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)), torch.arange(3)
    later_inputs_differ(rank, folder, hidden, targets)
    train_until_one_dies(rank, folder, hidden, targets)


def later_inputs_differ(rank, folder, hidden, targets):
    """The page: in a later call PyTorch's own comparison, where it is on, is an error on all ranks."""
    dist.set_debug_level(dist.DebugLevel.DETAIL)  # as TORCH_DISTRIBUTED_DEBUG does
    begin(rank, folder, "compared")
    layer = shard(make())
    expected, rows = layer(hidden, targets), 3 - rank
    with pytest.raises(RuntimeError, match=r"[Mm]ismatch"):
        layer(hidden[:rows], targets[:rows])
    assert torch.equal(layer(hidden, targets), expected)
    dist.destroy_process_group()
    dist.set_debug_level(dist.DebugLevel.OFF)


def train_until_one_dies(rank, folder, hidden, targets):
    begin(rank, folder, "store")
    layer = shard(make())
    layer(hidden, targets).backward()
    dcp.save({"layer": layer.state_dict()}, checkpoint_id=f"{folder}/checkpoint")
    if rank == 1:
        os._exit(9)
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        layer(hidden, targets).backward()
    assert time.monotonic() - start < 2 * TIMEOUT, "the others wait for longer than the group's timeout"
    os._exit(0)


def check_checkpoint(group, folder):
    loaded = shard(FullSoftmax(4, 9), group)
    state = {"layer": loaded.state_dict()}
    dcp.load(state, checkpoint_id=f"{folder}/checkpoint", process_group=group)
    assert torch.equal(loaded.weight.full_tensor(), make().weight)


def test_ranks_that_disagree_and_one_that_dies(pool):
    """The last checkpoint loads."""
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=one_process, args=(rank, folder)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(4 * TIMEOUT)
            process.kill()
        assert [process.exitcode for process in processes] == [0, 9]
        pool.run(check_checkpoint, 3, folder)
