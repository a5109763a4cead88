"""The training script of the page on several processes, and the commands that several processes run."""

import os
import re
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rich.console import Console
from same_answers import batch, check_equal
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from lastlayer import FullSoftmax
from lastlayer.distributed import shard
from lastlayer.study import distributed_bench
from lastlayer.study.bench import Sizes
from lastlayer.study.compare import Comparison, Plan
from lastlayer.study.distributed_bench import SHARDABLE
from lastlayer.study.text.corpus import load_corpus
from lastlayer.study.training.trainer import Budget

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"


def script_runs(group, folder):
    (script,) = re.findall(r'^```py title="train.py"\n(.*?)^```', PAGE.read_text(encoding="utf-8"), re.S | re.M)
    assert len(script.splitlines()) <= 45, "the page promises a script of about forty lines"
    os.chdir(folder)
    begin, end = dist.init_process_group, dist.destroy_process_group
    dist.init_process_group = dist.destroy_process_group = lambda *_: None  # the pool has a group already
    try:
        names = {"print": lambda step, loss: losses.append(loss)}
        losses = []
        exec(compile(script, "train.py", "exec"), names)
    finally:
        dist.init_process_group, dist.destroy_process_group = begin, end
    assert group.rank() or losses[-1] < losses[0]
    loaded = {"layer": shard(FullSoftmax(64, 10_000), group).state_dict()}
    dcp.load(loaded, checkpoint_id="checkpoint", process_group=group)
    check_equal(loaded["layer"]["weight"], names["layer"].weight, "the checkpoint")
    assert names["best"].indices.shape == (3, 5)


def test_script(pool, tmp_path):
    pool.run(script_runs, 3, str(tmp_path))


def beside_fully_shard(group):
    """An encoder under FSDP2 over the data dimension, the layer over both."""
    mesh = DeviceMesh("cpu", [[0], [1]], mesh_dim_names=("data", "classes"))
    torch.manual_seed(0)
    encoder, layer = torch.nn.Linear(5, 5, dtype=torch.float64), FullSoftmax(5, 11, dtype=torch.float64)
    alone = torch.nn.Linear(5, 5, dtype=torch.float64)
    alone.load_state_dict(encoder.state_dict())
    fully_shard(encoder, mesh=mesh["data"])
    sharded = shard(layer, mesh)
    hidden, targets = batch(layer, 6)
    mine = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3)
    sharded(encoder(hidden[mine]), targets[mine]).backward()
    layer(alone(hidden), targets).backward()
    check_equal(sharded.weight.grad, layer.weight.grad, "layer")
    check_equal(encoder.weight.grad, alone.weight.grad, "encoder")


def test_beside_fully_shard(pool):
    pool.run(beside_fully_shard, 2)


def as_torchrun(rank, size):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))


def compare_trains_sharded(group, folder):
    """As one process does; and a run that was cut off goes on."""
    folder, rank = Path(folder), group.rank()
    names = ["sampled", "factored"]
    results = {}
    try:
        for size, budget in ((1, 8), (3, 8)):
            out = folder / (f"alone{rank}" if size == 1 else "together")
            out.mkdir(exist_ok=True)
            as_torchrun(rank, size)
            corpus = load_corpus([folder / "text.txt"], min_count=1)
            plan = Plan(names, Budget(steps=budget), width=8, batch=4, window=6, dropout=0.2)
            comparison = Comparison(corpus, plan, out, Console(quiet=True))
            if size == 3:
                part = comparison._trainer("sampled", comparison.checkpoint("sampled"))
                for _ in range(5):
                    part.step()
                part.save()
                dist.barrier()
            records = comparison.run(resume=size == 3)
            results[size] = {record["layer"]: record["perplexity"] for record in records}
    finally:
        as_torchrun(0, 1)
    for name in names:
        alone, together = results[1][name], results[3][name]
        assert abs(alone - together) < 0.02 * alone, f"{name}: {alone} alone, {together} over ranks"
    assert rank or (folder / "together" / "index.html").exists()


def test_compare_over_processes(pool, tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat and the dog sat on a log near it .\n" * 60)
    pool.run(compare_trains_sharded, 3, str(tmp_path))


def bench_counts(group):
    as_torchrun(group.rank(), 3)
    try:
        with patch.object(distributed_bench, "ROUNDS", 1):
            records = distributed_bench.run_distributed_bench(
                Sizes(50, 8, 30, 1), list(SHARDABLE), 0, torch.device("cpu")
            )
    finally:
        as_torchrun(0, 1)
    assert [record["name"] for record in records] == list(SHARDABLE)
    of_name = {record["name"]: record for record in records}
    own = 17 if group.rank() < 2 else 16
    assert of_name["full"]["sent_bytes"] == 2 * 2 * 4 * 30 * (8 + 3) // 3
    assert of_name["full"]["parameter_bytes"] == 4 * 9 * own
    assert of_name["factored"]["sent_bytes"] == 4 * 4 * 30 // 3 + 4 * 4 * 30 * 8 // 3 + round(4 * 8 * 2 / 3)
    assert of_name["factored"]["parameter_bytes"] == 4 * 8 * own


def test_bench_over_processes(pool):
    pool.run(bench_counts, 3)
