"""SVDPreview: its scores, its bound in every storage, its calibration."""

import dataclasses

import pytest
import torch

from lastlayer import ScreenedSoftmax, SVDPreview
from lastlayer.screening.calibration import SecondMoment, second_moment


def head(dtype=torch.float64, num_classes=300, width=16):
    generator = torch.Generator().manual_seed(2)
    scale = torch.linspace(2.0, 0.1, width, dtype=torch.float64)
    weight = torch.randn(num_classes, width, generator=generator, dtype=torch.float64) * scale
    hidden = torch.randn(500, width, generator=generator, dtype=torch.float64)
    bias = torch.randn(num_classes, generator=generator, dtype=torch.float64)
    return weight.to(dtype), bias.to(dtype), hidden.to(dtype)


@pytest.mark.parametrize("storage", [None, "float32", "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("window", [1, 5, 16])
def test_bound_holds(storage, dtype, calibrated, window):
    """S4: no score is further from the logit than the bound says, which is not idle either."""
    weight, bias, hidden = head(dtype)
    settings = SVDPreview(window, calibration=hidden if calibrated else None, storage=storage)
    prepared = settings.prepare(weight, bias)
    truth = hidden.double() @ weight.double().T + bias.double()
    off = (prepared.scores(hidden).double() - truth).abs()
    bound = prepared.error(hidden).all().double()
    assert (off <= bound).all()
    if window < 16:
        assert (off > 0.1 * bound).any()


def test_full_window_is_exact_to_rounding():
    weight, bias, hidden = head()
    prepared = SVDPreview(16, calibration=hidden).prepare(weight, bias)
    torch.testing.assert_close(prepared.scores(hidden), hidden @ weight.T + bias, rtol=1e-9, atol=1e-9)
    assert prepared.error(hidden).all().max() < 1e-9


def test_bytes_read():
    weight, bias, _ = head(torch.float32)
    assert SVDPreview(4).prepare(weight, bias).bytes_read == 300 * 4 * 4
    assert SVDPreview(4, storage="bfloat16").prepare(weight, bias).bytes_read == 300 * 4 * 2
    assert SVDPreview(4, storage="int8").prepare(weight, bias).bytes_read == 320 * 64 + 300 * 4  # padded to 64


def test_follow_is_the_score():
    weight, bias, hidden = head()
    for data in (None, hidden):
        prepared = SVDPreview(5, calibration=data).prepare(weight, bias)
        torch.testing.assert_close(prepared.follow(hidden, weight, bias), prepared.scores(hidden))


def test_stream_of_batches_is_the_whole():
    _, _, hidden = head()
    whole, stream = second_moment(hidden), second_moment(batch for batch in hidden.view(5, 4, 25, 16))
    torch.testing.assert_close(whole.moment, stream.moment)
    assert whole.rows == stream.rows == 500


def test_settings_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SVDPreview(3).window = 4  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("error", "message", "calibration"),
    [
        (ValueError, "weight's width 16, got 7", torch.randn(9, 7)),
        (ValueError, "finite", torch.full((4, 16), float("nan"))),
        (ValueError, "finite", torch.full((4, 16), float("inf"))),
        (ValueError, "at least 2 hidden states, got 1", torch.randn(1, 16)),
        (ValueError, "at least 2 hidden states, got 0", []),
        (ValueError, "all zero", torch.zeros(5, 16)),
        (ValueError, "one width", [torch.randn(3, 16), torch.randn(3, 8)]),
        (ValueError, r"shape \(..., d\)", torch.randn(16)),
        (TypeError, "floating-point", torch.zeros(3, 16, dtype=torch.int64)),
        (TypeError, "floating-point", ["text"]),
        (TypeError, "calibration must be hidden states", 3),
        (ValueError, "second moment, got", SecondMoment(torch.ones(3, 4).double(), 9)),
        (ValueError, "all zero", SecondMoment(torch.zeros(16, 16).double(), 9)),
        (ValueError, "at least 2", SecondMoment(torch.eye(16).double(), -1)),
    ],
)
def test_bad_calibration(error, message, calibration):
    with pytest.raises(error, match=message):
        SVDPreview(3, calibration=calibration).prepare(*head()[:2])


def test_few_hidden_states_still_calibrate():
    """Fewer rows than coordinates: the moment is singular, the shrunk one is not."""
    weight, bias, hidden = head()
    prepared = SVDPreview(5, calibration=hidden[:3]).prepare(weight, bias)
    off = (prepared.scores(hidden) - hidden @ weight.T - bias).abs()
    assert (off <= prepared.error(hidden).all()).all()


def test_unknown_storage():
    with pytest.raises(ValueError, match="storage must be one of"):
        SVDPreview(3, storage="float8")


def test_bad_gram():
    weight = head()[0]
    with pytest.raises(ValueError, match="gram must be finite"):
        ScreenedSoftmax(weight, preview=SVDPreview(3), candidates=5, gram=torch.full((16, 16), float("nan")))
