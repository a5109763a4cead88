"""A gradient larger than the caches is written past them, to the same numbers."""

import numpy as np
import pytest

from lastlayer.kernels.grouped import GroupArrays, softmax_backward

SIZES, COUNTS = np.array([30_000, 1, 9_999]), np.array([1, 2, 3])
NUM_ROWS, NUM_CLASSES = COUNTS.sum(), SIZES.sum()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("width", [64, 63])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_large_gradients_at_any_address_and_width(dtype, width, shift, threads):
    """Rows of 63 numbers, and an address shifted by one, do not lie where such stores may."""
    from lastlayer.kernels.cache_hints import goes_past_cache

    generator = np.random.default_rng(0)
    hidden, scale = generator.normal(size=(NUM_ROWS, width)).astype(dtype), np.arange(1, 7, dtype=dtype)
    parts = [generator.normal(size=(c, s)).astype(dtype) for c, s in zip(COUNTS, SIZES, strict=True)]
    numbers, first = COUNTS * SIZES, COUNTS.cumsum() - COUNTS
    starts = SIZES.cumsum() - SIZES
    groups = GroupArrays(first, COUNTS, starts, SIZES, numbers.cumsum() - numbers, starts)
    # A page holds multiples of the 16 bytes that such a store writes.
    memory = np.full(NUM_CLASSES * width + 4096, np.nan, dtype)
    begin = -memory.ctypes.data % 4096 // memory.itemsize + shift
    of_weight = memory[begin : begin + NUM_CLASSES * width].reshape(NUM_CLASSES, width)
    assert goes_past_cache(of_weight) == (width == 64 and (shift * memory.itemsize) % 16 == 0)

    of_bias = np.full(NUM_CLASSES, np.nan, dtype)
    residual = np.concatenate([part.reshape(-1) for part in parts])
    softmax_backward(groups, hidden, residual, scale, of_weight, of_bias, threads=threads)

    scaled = [(part * scale[f : f + c, None]).T for part, f, c in zip(parts, first, COUNTS, strict=True)]
    expected = [s @ hidden[f : f + c] for s, f, c in zip(scaled, first, COUNTS, strict=True)]
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == "float32" else {"rtol": 1e-10, "atol": 1e-10}
    np.testing.assert_allclose(of_weight, np.concatenate(expected), **close)
    np.testing.assert_allclose(of_bias, np.concatenate([s.sum(1) for s in scaled]), **close)
    assert np.isnan(memory[:begin]).all()
    assert np.isnan(memory[begin + NUM_CLASSES * width :]).all()
