"""`rank` finds ranks that are known beforehand: linear softmaxes, matrices with given singular values."""

import pytest
import torch

from lastlayer import FullSoftmax, OutputLayer, Sigsoftmax, rank


class Given(OutputLayer):
    """A layer whose log-probabilities are given."""

    def __init__(self, matrix):
        super().__init__(1, matrix.shape[1])
        self.matrix = matrix

    def _log_prob(self, hidden):
        return self.matrix[: len(hidden)]

    def _target_log_prob(self, hidden, targets):
        raise NotImplementedError


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "classes"), [(90, 40), (40, 90)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_softmax(rows, classes, bias, dtype):
    torch.manual_seed(0)
    hidden = torch.randn(rows, 5, dtype=dtype)
    layer = FullSoftmax(5, classes, bias=bias, dtype=dtype)
    assert rank(layer, hidden).numerical == 6 + bias
    mapped = FullSoftmax(5, classes, bias=bias, logit_map=Sigsoftmax(), dtype=dtype)
    mapped.load_state_dict(layer.state_dict())
    with torch.no_grad():
        mapped.weight.mul_(10)
    assert rank(mapped, hidden).numerical > 12


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (1, 4)])
def test_singular_values(shape):
    torch.manual_seed(1)
    matrix = torch.randn(*shape, dtype=torch.float64)
    answer = rank(Given(matrix), torch.zeros(shape[0], 1))
    torch.testing.assert_close(answer.singular_values, torch.linalg.svdvals(matrix), rtol=1e-6, atol=1e-6)
    assert answer.numerical == min(shape)


def test_effective_rank():
    matrix = torch.diag(torch.tensor([10.0, 3.0, 1.0, 0.1], dtype=torch.float64))
    hidden = torch.zeros(4, 1)
    # shares of the squares: 0.909, 0.991, 0.9999, 1
    assert [rank(Given(matrix), hidden, epsilon=e).effective for e in (0.2, 0.05, 0.001, 0.0)] == [1, 2, 3, 4]


def test_leading_shape_and_refusals():
    layer = FullSoftmax(3, 7)
    hidden = torch.randn(4, 5, 3)
    assert rank(layer, hidden).numerical == rank(layer, hidden.reshape(20, 3)).numerical
    with pytest.raises(ValueError, match="at least one context"):
        rank(layer, hidden[:0])
    with pytest.raises(ValueError, match="finite"):
        rank(Given(torch.full((3, 3), float("-inf"))), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="epsilon"):
        rank(layer, hidden, epsilon=2.0)
