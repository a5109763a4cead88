"""Int8Preview: the bound of its integers, and proofs from it."""

import pytest
import torch
from screened_head import coarse_head as head

from lastlayer import Int8Preview, ScreenedSoftmax
from lastlayer.screening.quantised import whole_numbers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 7, 64, 129])
def test_bound_holds(dtype, width):
    """S4: the two-part bound, for widths that are padded and that are not; and it is not idle."""
    weight, bias, hidden = head(width=max(6, width), dtype=dtype)
    weight, hidden = weight[:, :width].contiguous(), hidden[:, :width].contiguous()
    prepared = Int8Preview().prepare(weight, bias)
    truth = hidden.double() @ weight.double().T + bias.double()
    off = (prepared.scores(hidden).double() - truth).abs()
    bound = prepared.error(hidden).all().double()
    assert (off <= bound).all()
    if width > 1:
        assert (off > 0.05 * bound).any()
        assert bound.mean() < 0.1 * truth.std()


def test_whole_numbers_of_hidden():
    hidden = torch.randn(20, 30, dtype=torch.float64) * torch.logspace(-3, 3, 20, dtype=torch.float64)[:, None]
    hidden[3] = 0
    hidden[4] *= 1e-43  # its step would be subnormal
    whole = whole_numbers(hidden)
    assert whole.high.abs().max() <= 64
    assert whole.low.abs().max() <= 64
    again = (128 * whole.high + whole.low) * whole.step.double()
    left = torch.linalg.vector_norm(hidden - again, dim=-1, keepdim=True)
    torch.testing.assert_close(whole.left_over, left)
    assert (left <= 4e-4 * hidden.norm(dim=-1, keepdim=True) + 1e-38).all()


def test_most_answers_need_no_widening():
    weight, _, hidden = head(3000)
    layer = ScreenedSoftmax(weight, preview=Int8Preview(), candidates=64)
    certified = torch.cat([layer.topk(row, 10).certified for row in hidden.split(1)])
    assert certified.float().mean() > 0.9


def test_bytes_read():
    weight, bias, _ = head(700, 48, torch.float32)
    assert Int8Preview().prepare(weight, bias).bytes_read == 704 * 64 + 700 * 4  # padded to blocks of 64
