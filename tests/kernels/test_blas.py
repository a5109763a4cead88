"""Matrix products inside compiled loops equal numpy's, whatever is transposed or strided."""

import numpy as np
import pytest

from lastlayer.kernels.threads import gemm

pytest.importorskip("numba")
if gemm() is None:
    pytest.skip("PyTorch's BLAS was not found", allow_module_level=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("across_left", [False, True])
@pytest.mark.parametrize("across_right", [False, True])
@pytest.mark.parametrize(("rows", "inner", "columns"), [(7, 5, 9), (1, 1, 1), (40, 3, 1)])
def test_multiply(dtype, across_left, across_right, rows, inner, columns):
    from lastlayer.kernels.blas import multiply

    generator = np.random.default_rng(0)
    left, right, wide = (
        generator.standard_normal(shape).astype(dtype)
        for shape in ((rows, inner), (inner, columns), (rows, columns + 7))
    )
    expected = wide.copy()
    expected[:, 4 : 4 + columns] = 1.5 * left @ right + 0.5 * expected[:, 4 : 4 + columns]
    given = [
        np.ascontiguousarray(part.T) if across else part
        for part, across in ((left, across_left), (right, across_right))
    ]
    multiply(given[0], across_left, given[1], across_right, wide[:, 4 : 4 + columns], 1.5, 0.5)
    np.testing.assert_allclose(wide, expected, rtol=1e-5 if dtype == np.float32 else 1e-13, atol=1e-6)
