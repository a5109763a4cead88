"""Kernels on PyTorch's threads: every worker's part is done, once, however many threads there are."""

import numpy as np
import pytest

pytest.importorskip("numba")
from numba import njit

from lastlayer.kernels.screening import threads


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
