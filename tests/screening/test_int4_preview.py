"""Int4Preview: its codes, the bound of its integers, and proofs from it."""

import pytest
import torch
from screened_head import turned_head as head
from torch import nn

from lastlayer import Int4Preview, Int8Preview, ScreenedSoftmax
from lastlayer.screening.int4_rows import FINER, MOST, codes_of, nearest, pack, unpack


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 7, 64, 129])
@pytest.mark.parametrize("calibrated", [False, True])
def test_bound_holds(dtype, width, calibrated):
    """S4, for widths that are padded and that are not; and the bound is not idle."""
    weight, bias, hidden = head(width=max(6, width), dtype=dtype)
    weight, hidden = weight[:, :width].contiguous(), hidden[:, :width].contiguous()
    prepared = Int4Preview(calibration=hidden[:200] if calibrated else None).prepare(weight, bias)
    truth = hidden[200:].double() @ weight.double().T + bias.double()
    off = (prepared.scores(hidden[200:]).double() - truth).abs()
    bound = prepared.error(hidden[200:]).all().double()
    assert (off <= bound).all()
    assert (off > 0.1 * bound).any() or width == 1
    assert bound.mean() < truth.std()


def test_calibration_makes_the_bound_smaller():
    """In the coordinates as they come, 4 bits leave the most in play; the rotation is what makes them serve."""
    weight, _, hidden = head(2000)
    plain, calibrated = (
        Int4Preview(calibration=calibration).prepare(weight, None).error(hidden[200:]).all().mean()
        for calibration in (None, hidden[:200])
    )
    assert calibrated < 0.6 * plain


@pytest.mark.parametrize("fine", [0, 1, 5])
def test_codes_are_the_nearest_and_survive_packing(fine):
    rows = torch.randn(64, 11, dtype=torch.float64)
    rows[7] = 0
    rows[9, 3] = 100  # beyond the last code of any sensible step
    levels, steps = nearest(rows, torch.ones(11, dtype=torch.float64), fine)
    codes = codes_of(levels, fine)
    assert codes.max() < 16
    units = torch.ones(11 + fine, dtype=torch.float64)
    units[:fine] /= FINER
    again = (codes.double() - MOST) * units
    again = torch.cat([again[:, :fine] + again[:, fine : 2 * fine], again[:, 2 * fine :]], -1)
    assert torch.equal(again, levels)
    finest, last = torch.ones(2, 11, dtype=torch.float64)
    finest[:fine], last[:fine] = 1 / FINER, 1 + 1 / FINER
    beyond = (rows.abs() - MOST * last * steps).clamp(min=0)
    assert ((levels * steps - rows).abs() <= torch.maximum(0.5 * finest * steps, beyond) + 1e-12).all()
    assert (beyond > 0).any()
    wide = nn.functional.pad(codes, (0, -codes.shape[1] % 8))
    assert torch.equal(unpack(pack(wide), wide.shape[1]), 2 * wide.to(torch.int8) - 15)


def test_what_is_certified_is_true():
    weight, _, hidden = head(3000, dtype=torch.float32)
    layer = ScreenedSoftmax(weight, preview=Int4Preview(calibration=hidden[:200]), candidates=100)
    right, certified = [], []
    for row in hidden[200:].split(1):
        answer = layer.topk(row, 3)
        right.append(torch.equal(answer.indices, (row @ weight.T).topk(3).indices))
        certified.append(bool(answer.certified))
    assert sum(certified) > 20
    assert all(own for own, sure in zip(right, certified, strict=True) if sure)


def test_rows_of_zeros_have_no_score():
    """As a padded vocabulary has them: the normaliser takes what they score."""
    weight = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    weight[200:] = 0
    hidden = 100 * torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    layer = ScreenedSoftmax(weight, preview=Int4Preview(), candidates=4, exact=True)
    assert layer.preview_scores(hidden)[:, 200:].abs().max() < 1e-20
    without = ScreenedSoftmax(weight[:200], preview=Int4Preview(), candidates=4, exact=True)
    assert layer.log_normalizer_error(hidden).max() <= without.log_normalizer_error(hidden).max() + 1e-4


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e25])
def test_any_scale(scale):
    weight, _, hidden = head(1000, dtype=torch.float32)
    preview = Int4Preview(calibration=hidden / scale)
    layer = ScreenedSoftmax(weight * scale, preview=preview, candidates=20, exact=True)
    for row in hidden[:20].split(1):
        answer = layer.topk(row / scale, 3)
        assert torch.equal(answer.indices, (row / scale @ (weight * scale).T).topk(3).indices)
        assert answer.certified


def test_fewer_classes_than_width_and_few_hidden_states():
    generator = torch.Generator().manual_seed(0)
    weight, hidden = torch.randn(20, 64, generator=generator), torch.randn(2, 64, generator=generator)
    layer = ScreenedSoftmax(weight, preview=Int4Preview(calibration=hidden), candidates=3, exact=True)
    other = torch.randn(30, 64, generator=generator)
    for row in (*hidden.split(1), *other.split(1)):
        assert torch.equal(layer.topk(row, 3).indices, (row @ weight.T).topk(3).indices)


def test_bytes_read():
    """Nine sixteenths of Int8Preview's rows, but for padding and scales, and the rotation."""
    weight, _, _ = head(6400, 64, torch.float32)
    four, eight = (preview.prepare(weight, None).bytes_read for preview in (Int4Preview(), Int8Preview()))
    assert four == 6400 * (72 // 2 + 4) + 2 * 64 * 64 == four
    assert four < 0.6 * eight + 2 * 64 * 64


@pytest.mark.parametrize(
    ("calibration", "error", "words"),
    [
        (torch.randn(1, 48), ValueError, "at least 2"),
        (torch.zeros(9, 48), ValueError, "all zero"),
        (torch.full((9, 48), float("nan")), ValueError, "finite"),
        (torch.randint(9, (9, 48)), TypeError, "floating-point"),
        (torch.randn(9, 47), ValueError, "width 48"),
    ],
)
def test_bad_calibration(calibration, error, words):
    with pytest.raises(error, match=words):
        Int4Preview(calibration=calibration).prepare(head()[0], None)


def test_refresh_and_staleness():
    weight, _, hidden = head(900, dtype=torch.float32)
    linear = nn.Linear(48, 900, bias=False)
    with torch.no_grad():
        linear.weight.copy_(weight)
    layer = ScreenedSoftmax.from_linear(linear, preview=Int4Preview(calibration=hidden), candidates=9, exact=True)
    with torch.no_grad():
        linear.weight.mul_(-1)
    with pytest.raises(RuntimeError, match="refresh"):
        layer.topk(hidden[0], 3)
    layer.refresh()
    assert torch.equal(layer.topk(hidden[0], 3).indices, (hidden[0] @ -weight.T).topk(3).indices)


@pytest.mark.parametrize("far", [30, 1e3, 1e5])
def test_states_that_hardly_leave_one_direction(far):
    """Where rounding the rotation to bfloat16 would change it, it stays in float32; the proofs hold either way."""
    weight, _, hidden = head(2000, dtype=torch.float32)
    hidden = hidden + far * hidden[0] / hidden[0].norm()
    preview = Int4Preview(calibration=hidden[:200])
    layer = ScreenedSoftmax(weight, preview=preview, candidates=16, exact=True)
    truth = hidden[200:].double() @ weight.double().T
    off = (layer.preview_scores(hidden[200:]).double() - truth).abs()
    assert (off <= layer._prepared.error(hidden[200:]).all()).all()
    for row, logits in zip(hidden[200:240].split(1), truth.float(), strict=False):
        answer = layer.topk(row, 3)
        rounding = 1e-6 * logits.abs().max()
        assert (logits[answer.indices[0]] >= logits.topk(3).values - rounding).all()
        assert answer.certified
