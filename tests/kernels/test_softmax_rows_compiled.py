"""The compiled rows of logits against their plain twin, in float64, by every instruction set."""

import pytest
import torch

from lastlayer.kernels.engine import Kernel
from lastlayer.kernels.softmax_rows import RowTerms, plain

softmax_rows_plain = Kernel("softmax_rows_plain", "ppppppnnnn")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_classes", [1, 2, 17, 1000, 4099])
def test_loss_and_gradient_equal_the_twin(dtype, num_classes):
    torch.manual_seed(num_classes)
    logits = (4 * torch.randn(5, num_classes)).to(dtype)
    bias, hard, square = torch.randn(num_classes), torch.rand(5), torch.rand(5)
    ids = torch.randint(num_classes, (5,))
    expected = logits.double() + bias
    loss = plain(expected, RowTerms(ids, hard.double(), None, square.double(), None), form=True)

    found = torch.empty(5)
    softmax_rows_plain(logits, bias, ids, hard, square, found, 5, num_classes, 1, dtype == torch.bfloat16)
    torch.testing.assert_close(found.double(), loss, rtol=2e-6, atol=2e-6)
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(logits.double(), expected, rtol=tolerance, atol=1e-6)
