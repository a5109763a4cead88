"""Loops shared among PyTorch's threads: every chunk runs once, however the threads are scheduled."""

import threading

import pytest
import torch

from lastlayer.kernels.softmax_rows import RowTerms, fused


def losses(logits):
    rows, classes = logits.shape
    ids = torch.arange(rows) % classes
    values = logits.clone()
    return fused(values, None, RowTerms(ids, torch.ones(rows), None, None, None), True)[0], values


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_that_come_late_change_nothing(threads, isa):
    """While other threads keep every processor busy, the result is that of one thread, to the last bit."""
    logits = torch.randn(97, 4001, generator=torch.Generator().manual_seed(0))
    expected = losses(logits)
    stop = threading.Event()

    def keep_busy():
        while not stop.is_set():
            torch.ones(1000).cumsum(0)

    others = [threading.Thread(target=keep_busy) for _ in range(4)]
    for other in others:
        other.start()
    torch.set_num_threads(threads)
    try:
        for _ in range(10):
            torch.testing.assert_close(losses(logits), expected, rtol=0, atol=0)
    finally:
        torch.set_num_threads(1)
        stop.set()
        for other in others:
            other.join()
