"""Work on PyTorch's threads: every part is done, once, however many threads there are."""

import threading

import numpy as np
import pytest
import torch

from lastlayer.kernels.threads import at_once, openmp

pytest.importorskip("numba")
from numba import njit

from lastlayer.kernels import apart as threads


@pytest.mark.parametrize("parts", [1, 2, 7, 40])
@pytest.mark.parametrize("shared", [True, False])
def test_results_in_order(parts, shared, monkeypatch):
    if not shared:
        monkeypatch.setattr("lastlayer.kernels.threads.openmp", lambda: None)
    values = torch.arange(parts, dtype=torch.float64)
    assert at_once(lambda part: float(values[part].exp()), parts) == values.exp().tolist()


def test_pytorchs_threads_do_the_work():
    if openmp() is None or torch.get_num_threads() < 2:
        pytest.skip("needs PyTorch's OpenMP and two threads")
    meet = threading.Barrier(2)  # passed only by two at the same time
    assert sorted(at_once(lambda part: meet.wait(timeout=20), 2)) == [0, 1]


def test_failure_of_a_part_is_raised_and_the_next_call_works():
    def work(part):
        if part == 1:
            raise KeyError("the second part")
        return part

    with pytest.raises(KeyError, match="the second part"):
        at_once(work, 3)
    assert at_once(abs, 3) == [0, 1, 2]


@pytest.mark.parametrize("shared", [True, False])
def test_every_worker_runs_once(shared, monkeypatch):
    if shared and not threads.SHARED:
        pytest.skip("PyTorch's OpenMP was not found")
    monkeypatch.setattr(threads, "SHARED", shared)

    @njit
    def mark(worker, marks, amount):
        marks[worker] += amount * (worker + 1)

    @njit
    def mark_all(marks, amount):
        threads.apart(mark, marks.size, (marks, amount))

    for workers in (1, 2, 7):
        marks = np.zeros(workers)
        for turn in (1, 2):
            mark_all(marks, 0.5)
            assert marks.tolist() == [turn * 0.5 * (worker + 1) for worker in range(workers)]
