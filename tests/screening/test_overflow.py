"""Numbers that overflow float32: the full layer's result, uncertified where it is not finite."""

import pytest
import torch
from torch import nn

from lastlayer import Int4Preview, Int8Preview, ScreenedSoftmax, SVDPreview
from lastlayer.kernels import engine

PREVIEWS = {
    "int8": Int8Preview(),
    "int4": Int4Preview(),
    "svd": SVDPreview(4),
    "svd-int8": SVDPreview(4, storage="int8"),
    "bfloat16": SVDPreview(4, storage="bfloat16"),
}
every_preview = pytest.mark.parametrize("preview", PREVIEWS.values(), ids=PREVIEWS)
both_ways = pytest.mark.parametrize("way", ["compiled", "plain"])


@pytest.fixture
def way(request):
    if request.param == "compiled":
        if not engine.available():
            pytest.skip("no compiled engine")
        yield
    else:
        with engine.forced(None):
            yield


both_ways = pytest.mark.parametrize("way", ["compiled", "plain"], indirect=True)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@both_ways
@every_preview
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("signs", ["positive", "mixed"])
def test_infinite_logits(way, preview, exact, rows, signs):
    """This query never ended, or was certified with NaN log-probabilities."""
    weight = normal(1000, 16)
    weight[3] = 1e30
    hidden = torch.rand(rows, 16, generator=torch.Generator().manual_seed(1)) * 1e10
    if signs == "mixed":
        hidden = normal(rows, 16, seed=1) * 1e10
    layer = ScreenedSoftmax(weight, preview=preview, candidates=20, exact=exact)
    answer = layer.topk(hidden, 1)
    logits = hidden @ weight.T
    finite = logits.logsumexp(-1).isfinite()
    assert not answer.certified[~finite].any()
    assert not finite.all()
    assert torch.equal(answer.indices, logits.topk(1).indices)
    assert layer.log_normalizer_error(hidden)[~finite].isinf().all()


@both_ways
@every_preview
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38])
def test_one_bad_row_among_good_ones(way, preview, bad):
    weight, bias, hidden = normal(900, 16), normal(900, seed=1), normal(5, 16, seed=2)
    layer = ScreenedSoftmax(weight, bias, preview=preview, candidates=7, exact=True)
    good = layer.topk(hidden, 2)
    hidden[1, 3] = bad
    answer = layer.topk(hidden, 2)
    others = torch.tensor([0, 2, 3, 4])
    assert torch.equal(answer.indices[others], good.indices[others])
    assert answer.certified[others].all()
    assert bool(answer.certified[1]) == bool(answer.log_prob[1].isfinite().all())
    assert torch.equal(layer.topk(hidden[1:2], 2).certified, answer.certified[1:2])


@both_ways
@every_preview
@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e-30, 1e20, 1e29])
def test_any_scale_of_hidden_states(way, preview, scale):
    weight, hidden = normal(900, 16), normal(4, 16, seed=2) * scale
    layer = ScreenedSoftmax(weight, preview=preview, candidates=7, exact=True)
    answer, logits = layer.topk(hidden, 3), hidden @ weight.T
    assert answer.certified.all()
    torch.testing.assert_close(logits.gather(-1, answer.indices), logits.topk(3).values, rtol=1e-5, atol=1e-44)
    assert not layer.log_normalizer_error(hidden).isnan().any()


@both_ways
@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1e20, 1e36])
def test_any_scale_of_the_calibration(way, scale):
    """1e-36 gave NaN log-probabilities: the rotation overflowed."""
    weight, hidden = normal(900, 16), normal(200, 16, seed=2)
    for preview in (SVDPreview(4, calibration=hidden * scale), Int4Preview(calibration=hidden * scale)):
        layer = ScreenedSoftmax(weight, preview=preview, candidates=7, exact=True)
        answer, truth = layer.topk(hidden[:4], 3), (hidden[:4] @ weight.T).log_softmax(-1)
        assert torch.equal(answer.indices, truth.topk(3).indices)
        assert answer.log_prob.isfinite().all()
        error = (answer.log_prob - truth.topk(3).values).abs().amax(-1)
        assert (error <= layer.log_normalizer_error(hidden[:4]) + 1e-4).all()


@both_ways
def test_a_bound_is_never_nan(way):
    """Subnormal hidden states beside a bias near 1e9."""
    generator = torch.Generator().manual_seed(0)
    for number in range(40):
        weight = torch.randn(64, 5, generator=generator)
        bias = 1e9 * (1 + torch.rand(64, generator=generator))
        hidden = torch.randn(8, 5, generator=generator) * 10.0 ** -(30 + number % 15)
        for preview in (SVDPreview(2, calibration=torch.randn(30, 5, generator=generator)), Int8Preview()):
            layer = ScreenedSoftmax(weight, bias, preview=preview, candidates=2)
            error = layer.log_normalizer_error(hidden)
            true = nn.functional.linear(hidden, weight, bias).double().log_softmax(-1)
            off = (layer.log_prob(hidden).double() - true).abs().gather(-1, layer.topk(hidden, 1).indices)
            assert (error >= 0).all()
            assert (off.squeeze(-1) <= error + 500).all()  # float32 at 1e9 steps by 64


@every_preview
def test_subnormal_weights(preview):
    weight, hidden = normal(300, 8) * 1e-40, normal(4, 8, seed=1)
    weight[7] = 0
    layer = ScreenedSoftmax(weight, preview=preview, candidates=9, exact=True)
    answer = layer.topk(hidden, 3)
    torch.testing.assert_close(answer.log_prob, torch.full((4, 3), 1 / 300).log())
    assert not layer.log_normalizer_error(hidden).isnan().any()


@both_ways
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("exact", [False, True])
def test_a_users_preview_may_answer_nonsense(way, bad, exact):
    from own_preview import OwnPreview

    weight, hidden = normal(900, 16), normal(3, 16, seed=1)
    layer = ScreenedSoftmax(weight, preview=OwnPreview(bad), candidates=7, exact=exact)
    answer = layer.topk(hidden, 3)
    assert answer.certified.all()
    assert torch.equal(answer.indices, (hidden @ weight.T).topk(3).indices)
