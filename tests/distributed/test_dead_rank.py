"""A process that dies in a step: the others end with PyTorch's error in time, and the last checkpoint loads."""

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


def train_until_one_dies(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=TIMEOUT),
    )
    torch.manual_seed(0)
    layer = shard(FullSoftmax(4, 9))
    hidden, targets = torch.randn(3, 4), torch.arange(3)
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
    torch.manual_seed(0)
    expected = FullSoftmax(4, 9)
    loaded = shard(FullSoftmax(4, 9), group)
    state = {"layer": loaded.state_dict()}
    dcp.load(state, checkpoint_id=f"{folder}/checkpoint", process_group=group)
    assert torch.equal(loaded.weight.full_tensor(), expected.weight)


def test_a_process_dies(pool):
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=train_until_one_dies, args=(rank, folder)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(4 * TIMEOUT)
        assert [process.exitcode for process in processes] == [0, 9]
        pool.run(check_checkpoint, 3, folder)
