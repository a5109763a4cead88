"""Kernels bound to arrays in memory: called by address, they see what the arrays hold now."""

import gc

import numpy as np
import pytest

numba = pytest.importorskip("numba")
from lastlayer.kernels.screening.bound import Bound  # noqa: E402


def weighted(place, asked):
    """Writes `factor * (table[row] + own) `, and says how many rows there are."""
    (table, factor), own = place[0]
    row, into = asked[0]
    out = numba.carray(into, (table.shape[1],), np.float64)
    for j in range(out.size):
        out[j] = factor * (table[row, j] + own[j])
    return len(table)


def test_arrays_numbers_and_tuples_are_kept():
    table, own = np.arange(12, dtype=np.int16).reshape(4, 3), np.array([0.5, 0.25, 0.0], dtype=np.float32)
    bound = Bound(weighted, ((table, 2), own), "nA")
    out = np.zeros(3)
    assert bound(2, out.ctypes.data) == 4
    assert out.tolist() == [13.0, 14.5, 16.0]
    table[2] = 100  # the arrays themselves, no copies
    bound(2, out.ctypes.data)
    assert out.tolist() == [201.0, 200.5, 200.0]


def test_the_arrays_live_as_long_as_the_binding():
    def made():
        return Bound(weighted, ((np.full((2, 50_000), 7), 3), np.ones(50_000, dtype=np.float32)), "nA")

    bound = made()
    gc.collect()
    others = [np.full((2, 50_000), -1) for _ in range(8)]  # would take the place of what was freed
    out = np.zeros(50_000)
    assert bound(1, out.ctypes.data) == 2
    assert (out == 24).all()
    assert len(others) == 8


def test_it_is_not_called_with_too_little():
    bound = Bound(weighted, ((np.ones((2, 3)), 1), np.ones(3, dtype=np.float32)), "nA")
    with pytest.raises(Exception, match="pack expected 2"):
        bound(1)
