"""What holds for every preview with a proof: exact results, an all-zero weight or state, gradients."""

import pytest
import torch
from screened_head import coarse_head, turned_head
from torch import nn
from torch.autograd import gradcheck

from lastlayer import Int4Preview, Int8Preview, ScreenedSoftmax

every_preview = pytest.mark.parametrize("preview", [Int8Preview(), Int4Preview()], ids=["int8", "int4"])


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 12])
def test_exact_answers_are_the_full_layers(kind, dtype, rows):
    """Each on the states that are hard for it."""
    weight, bias, hidden = (coarse_head if kind == "int8" else turned_head)(3000, dtype=dtype)
    preview = Int8Preview() if kind == "int8" else Int4Preview(calibration=hidden[200:])
    hidden = hidden[:48]
    layer = ScreenedSoftmax(weight, bias, preview=preview, candidates=16, exact=True)
    wide = torch.promote_types(dtype, torch.float32)
    logits = nn.functional.linear(hidden.to(wide), weight.to(wide), bias.to(wide))
    for part, truth in zip(hidden.split(rows), logits.split(rows), strict=True):
        answer = layer.topk(part, 5)
        assert torch.equal(answer.indices, truth.topk(5).indices)
        assert answer.certified.all()
        error = answer.log_prob - truth.log_softmax(-1).topk(5).values
        rounding = 10 * torch.finfo(wide).eps * truth.abs().amax(-1)
        assert (error.abs().amax(-1) <= layer.log_normalizer_error(part) + rounding).all()
        assert error.abs().max() < 0.1


@every_preview
def test_zero_rows_zero_weight_and_zero_hidden(preview):
    weight = torch.zeros(300, 8)
    weight[7] = 1.0
    layer = ScreenedSoftmax(weight, preview=preview, candidates=4, exact=True)
    assert layer.topk(torch.ones(8), 1).indices.tolist() == [7]
    answer = layer.topk(torch.zeros(1, 8), 3)
    torch.testing.assert_close(answer.log_prob, torch.full((1, 3), 1 / 300).log())
    assert answer.certified.all()
    nothing = ScreenedSoftmax(torch.zeros(300, 8), preview=preview, candidates=4, exact=True)
    assert nothing.topk(torch.ones(2, 8), 3).certified.all()


@every_preview
def test_gradient_is_the_full_layers(preview):
    """Rounding has no gradient of use: values are the preview's, the gradient the logits' own."""
    weight, bias, hidden = turned_head(60, 12)
    layer = ScreenedSoftmax(nn.Parameter(weight), nn.Parameter(bias), preview=preview, candidates=5)
    leaf = hidden[:3].requires_grad_()
    with torch.no_grad():
        expected = layer(leaf)
    torch.testing.assert_close(layer(leaf), expected)
    upstream = torch.randn(3, 60, dtype=torch.float64)
    (mine,) = torch.autograd.grad(layer(leaf), leaf, upstream)
    torch.testing.assert_close(mine, upstream @ weight)


@every_preview
def test_all_candidates_have_exact_gradients(preview):
    weight, bias, hidden = turned_head(9, 6)
    layer = ScreenedSoftmax(weight, bias, preview=preview, candidates=9)
    assert gradcheck(layer.log_prob, (hidden[:3].requires_grad_(),))
