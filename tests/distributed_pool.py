"""A pool of three processes that run functions of test files together, started once for all tests."""

import importlib
import os
import tempfile
import traceback
from datetime import timedelta
from queue import Empty

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 3
TIMEOUT = 20  # seconds


class Pool:
    """Processes 0, 1 and 2 with a gloo group; functions run on the first `ranks` of them, in a group of these.

    After a failure there are new processes: those left could wait for each other in different collectives.
    """

    def __init__(self):
        self._start()

    def _start(self):
        context = mp.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.inputs = [context.Queue() for _ in range(WORLD)]
        self.results = context.Queue()
        arguments = self.inputs, self.results, os.path.join(self.folder.name, "store")
        self.processes = [
            context.Process(target=_work, args=(rank, *arguments), daemon=True) for rank in range(WORLD)
        ]
        for process in self.processes:
            process.start()

    def run(self, function, ranks, *arguments):
        """Runs `function(group, *arguments)`; an exception in any process is one here."""
        for queue in self.inputs[:ranks]:
            queue.put((function.__module__, function.__qualname__, ranks, arguments))
        try:
            errors = [self.results.get(timeout=2 * TIMEOUT) for _ in range(ranks)]
        except Empty:
            errors = ["a process of the pool does not answer"]
        found = [error for error in errors if error]
        if found:
            self._stop()
            self._start()
            raise AssertionError("\n".join(found))

    def close(self):
        for queue in self.inputs:
            queue.put(None)
        for process in self.processes:
            process.join(10)
        self._stop()

    def _stop(self):
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


def _work(rank, inputs, results, store):
    torch.set_num_threads(1)
    limit = timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=limit)
    groups = {size: dist.new_group(list(range(size)), timeout=limit) for size in range(1, WORLD + 1)}
    while (task := inputs[rank].get()) is not None:
        module, name, ranks, arguments = task
        try:
            torch.manual_seed(0)
            getattr(importlib.import_module(module), name)(groups[ranks], *arguments)
            results.put(None)
        except BaseException:
            results.put(f"rank {rank}: {traceback.format_exc()}")
    dist.destroy_process_group()
