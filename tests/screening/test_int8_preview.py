"""Int8Preview: the bound of its integers, and proofs from it."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from lastlayer import Int8Preview, ScreenedSoftmax
from lastlayer.screening.quantised import split_in_two


def head(num_classes=700, width=48, dtype=torch.float64, seed=4):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_classes, width, generator=generator, dtype=torch.float64)
    bias = torch.randn(num_classes, generator=generator, dtype=torch.float64)
    hidden = 3 * torch.randn(200, width, generator=generator, dtype=torch.float64)
    hidden[:, 5] *= 20  # a coordinate that makes the steps of the others coarse
    return weight.to(dtype), bias.to(dtype), hidden.to(dtype)


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


def test_two_parts_of_hidden():
    hidden = torch.randn(20, 30, dtype=torch.float64) * torch.logspace(-3, 3, 20, dtype=torch.float64)[:, None]
    hidden[3] = 0
    parts = split_in_two(hidden)
    again = parts.high * parts.step_high.double() + parts.low * parts.step_low.double()
    left = torch.linalg.vector_norm(hidden - again, dim=-1, keepdim=True)
    torch.testing.assert_close(parts.left_over, left)
    assert (left <= 1e-4 * hidden.norm(dim=-1, keepdim=True)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_exact_answers_are_the_full_layers(dtype, rows):
    weight, bias, hidden = head(3000, dtype=dtype)
    layer = ScreenedSoftmax(weight, bias, preview=Int8Preview(), candidates=16, exact=True)
    wide = torch.promote_types(dtype, torch.float32)
    logits = nn.functional.linear(hidden.to(wide), weight.to(wide), bias.to(wide))
    for part, truth in zip(hidden.split(rows), logits.split(rows), strict=True):
        answer = layer.topk(part, 5)
        assert torch.equal(answer.indices, truth.topk(5).indices)
        assert answer.certified.all()
        error = answer.log_prob - truth.log_softmax(-1).topk(5).values
        rounding = 10 * torch.finfo(wide).eps * truth.abs().amax(-1)
        assert (error.abs().amax(-1) <= layer.log_normalizer_error(part) + rounding).all()


def test_most_answers_need_no_widening():
    weight, _, hidden = head(3000)
    layer = ScreenedSoftmax(weight, preview=Int8Preview(), candidates=64)
    certified = torch.cat([layer.topk(row, 10).certified for row in hidden.split(1)])
    assert certified.float().mean() > 0.9


def test_zero_rows_and_zero_hidden():
    weight = torch.zeros(300, 8)
    weight[7] = 1.0
    layer = ScreenedSoftmax(weight, preview=Int8Preview(), candidates=4, exact=True)
    assert layer.topk(torch.ones(8), 1).indices.tolist() == [7]
    answer = layer.topk(torch.zeros(1, 8), 3)
    torch.testing.assert_close(answer.log_prob, torch.full((1, 3), 1 / 300).log())
    assert answer.certified.all()


def test_gradient_is_the_full_layers():
    """Rounding has no gradient of use: values are the preview's, the gradient the logits' own."""
    weight, bias, hidden = head(60, 12)
    layer = ScreenedSoftmax(nn.Parameter(weight), nn.Parameter(bias), preview=Int8Preview(), candidates=5)
    leaf = hidden[:3].requires_grad_()
    with torch.no_grad():
        expected = layer(leaf)
    torch.testing.assert_close(layer(leaf), expected)
    upstream = torch.randn(3, 60, dtype=torch.float64)
    (mine,) = torch.autograd.grad(layer(leaf), leaf, upstream)
    torch.testing.assert_close(mine, upstream @ weight)


def test_bytes_read():
    weight, bias, _ = head(700, 48, torch.float32)
    assert Int8Preview().prepare(weight, bias).bytes_read == 700 * (64 + 4)


def test_all_candidates_have_exact_gradients():
    weight, bias, hidden = head(9, 6)
    layer = ScreenedSoftmax(weight, bias, preview=Int8Preview(), candidates=9)
    assert gradcheck(layer.log_prob, (hidden[:3].requires_grad_(),))
