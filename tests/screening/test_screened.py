"""ScreenedSoftmax: the laws S1, S2, S4 and S5 of the method, its contract, and hostile input."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from lastlayer import ScreenedSoftmax, ScreenedTopK, SVDPreview, SVDSoftmax

V, D = 203, 12


class Doubled(nn.Module):
    """An increasing map of one logit."""

    def forward(self, logits):
        return 2 * logits + logits.clamp(min=0)


def head(num_classes=V, width=D, dtype=torch.float64, seed=0, decay=True):
    """A weight whose directions matter unequally, and a bias."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(2.0, 0.05, width, dtype=torch.float64) if decay else 1.0
    weight = torch.randn(num_classes, width, generator=generator, dtype=torch.float64) * scale
    return weight.to(dtype), torch.randn(num_classes, generator=generator, dtype=torch.float64).to(dtype)


def states(*shape, dtype=torch.float64, seed=1):
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def screened(weight, bias=None, *, window=4, candidates=20, **settings):
    return ScreenedSoftmax(weight, bias, preview=SVDPreview(window), candidates=candidates, **settings)


def topk(layer, hidden, k, exact=None, rows=8):
    """`layer.topk` by few rows at a time: for many at once the full layer would run."""
    parts = [layer.topk(part, k, exact) for part in hidden.split(rows)]
    return ScreenedTopK(*(torch.cat(column) for column in zip(*parts, strict=True)))


def by_rows(call, hidden):
    """`call` of one row at a time."""
    return torch.cat([call(row) for row in hidden.split(1)])


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("window", "candidates"), [(D, 20), (3, V), (D, V)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_full_window_or_all_candidates_is_the_full_layer(window, candidates, with_bias):
    """S1."""
    weight, bias = head()
    bias = bias if with_bias else None
    layer = screened(weight, bias, window=window, candidates=candidates)
    hidden = states(5)
    logits = nn.functional.linear(hidden, weight, bias)
    close(layer(hidden), logits)
    close(layer.log_prob(hidden), logits.log_softmax(-1))
    answer = layer.topk(hidden, 7)
    close(answer.log_prob, logits.log_softmax(-1).topk(7).values)
    assert torch.equal(answer.indices, logits.topk(7).indices)
    assert answer.certified.all()
    assert (layer.log_normalizer_error(hidden) < 1e-9).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_candidates_have_exact_logits(dtype, tolerance):
    """S1, and the paper's softmax over exact logits and preview scores."""
    weight, bias = head(dtype=dtype)
    layer, hidden = screened(weight, bias), states(5, dtype=dtype)
    logits = nn.functional.linear(hidden, weight, bias)
    rotation = torch.linalg.svd(weight.double(), full_matrices=False).Vh.T[:, :4]
    preview = (hidden.double() @ rotation) @ (weight.double() @ rotation).T + bias.double()
    expected = preview.to(dtype).scatter(-1, preview.topk(20).indices, logits.gather(-1, preview.topk(20).indices))
    close(layer(hidden), expected, tolerance)
    close(layer.log_prob(hidden), expected.log_softmax(-1), tolerance)
    close(layer.log_prob(hidden).exp().sum(-1), torch.ones(5, dtype=dtype), 1e-5)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (0,), (2, 0, 3)])
def test_leading_shapes(shape):
    layer, hidden = screened(*head()), states(*shape)
    answer = layer.topk(hidden, 4)
    assert answer.log_prob.shape == answer.indices.shape == (*shape, 4)
    assert answer.certified.shape == layer.log_normalizer_error(hidden).shape == shape
    assert layer(hidden).shape == layer.log_prob(hidden).shape == (*shape, V)
    assert layer.sample(hidden, 6).shape == (*shape, 6)
    rows = [layer.log_prob(row) for row in hidden.reshape(-1, D)]
    close(
        layer.log_prob(hidden), torch.stack(rows).reshape(*shape, V) if rows else torch.empty(*shape, V).double()
    )


def test_non_contiguous_and_chunked(monkeypatch):
    layer, hidden = screened(*head(), candidates=3), states(9)
    expected = layer.topk(hidden, 3), layer.log_prob(hidden)
    monkeypatch.setattr("lastlayer.screening.screened.CHUNK_NUMBERS", 2 * V)
    strided = torch.stack([hidden, hidden], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    for mine, theirs in zip(
        (*layer.topk(strided, 3), layer.log_prob(strided)), (*expected[0], expected[1]), strict=True
    ):
        close(mine, theirs)


@pytest.mark.parametrize("exact", [False, True])
def test_certified_rows_are_right(exact):
    """S4: no certified row has a wrong top-k; with `exact`, every row is certified."""
    weight, bias = head(1500, decay=True)
    layer, hidden = screened(weight, bias, window=8, candidates=12), states(400)
    logits = nn.functional.linear(hidden, weight, bias)
    best = logits.topk(3)
    answer = topk(layer, hidden, 3, exact)
    right = (answer.indices == best.indices).all(-1)
    assert right[answer.certified].all()
    assert answer.certified.all() if exact else 0 < answer.certified.sum() < len(hidden)
    offset = answer.log_prob - best.values
    close(offset[answer.certified], offset[answer.certified][:, :1].expand(-1, 3))  # one normaliser a row


def test_exact_by_the_full_layer_where_most_classes_stay_in_play():
    weight, bias = head(decay=False)
    layer, hidden = screened(weight, bias, window=1, candidates=3, exact=True), states(20)
    logits = nn.functional.linear(hidden, weight, bias)
    answer = topk(layer, hidden, 3)
    assert torch.equal(answer.indices, logits.topk(3).indices)
    assert answer.certified.all()
    assert torch.equal(layer(hidden).argmax(-1), logits.argmax(-1))


def test_exact_argmax_of_forward():
    weight, bias = head(1500)
    hidden = states(300)
    true = nn.functional.linear(hidden, weight, bias).argmax(-1)
    loose = screened(weight, bias, window=3, candidates=2)
    assert (by_rows(loose, hidden).argmax(-1) != true).any()
    tight = screened(weight, bias, window=3, candidates=2, exact=True)
    assert torch.equal(by_rows(tight, hidden).argmax(-1), true)


@pytest.mark.parametrize("logit_map", [None, Doubled()])
def test_normalizer_lies_in_its_bracket(logit_map):
    """S4."""
    weight, bias = head(1500)
    layer = screened(weight, bias, window=6, candidates=30, logit_map=logit_map)
    hidden = states(200)
    logits = nn.functional.linear(hidden, weight, bias)
    logits = logits if logit_map is None else logit_map(logits)
    answer = topk(layer, hidden, 1)
    off = logits.gather(-1, answer.indices) - answer.log_prob - logits.logsumexp(-1, keepdim=True)
    bound = by_rows(layer.log_normalizer_error, hidden)
    assert (off.abs().squeeze(-1) <= bound + 1e-12).all()
    assert off.abs().max() > 1e-4


def test_tail_correction_mends_the_normalizer():
    """S5: on Gaussian hidden states in calibrated coordinates the mean error shrinks at least five times."""
    generator = torch.Generator().manual_seed(5)
    spread = torch.logspace(0, -1, 48, dtype=torch.float64) * 1.2
    weight = torch.randn(4000, 48, generator=generator, dtype=torch.float64) * 0.35
    calibration, hidden = (
        torch.randn(n, 48, generator=generator, dtype=torch.float64) * spread for n in (8000, 500)
    )
    truth = (hidden @ weight.T).logsumexp(-1, keepdim=True)
    means = []
    for correction in (0.0, 1.0):
        preview = SVDPreview(8, calibration=calibration, tail_correction=correction)
        layer = ScreenedSoftmax(weight, preview=preview, candidates=40)
        answer = topk(layer, hidden, 1)
        used = (hidden @ weight.T).gather(-1, answer.indices) - answer.log_prob
        means.append(float((used - truth).mean().abs()))
    assert means[0] > 5 * means[1]


def test_calibration_lowers_divergence():
    """S3: KL to the full layer, anisotropic hidden states."""
    generator = torch.Generator().manual_seed(6)
    spread = torch.logspace(0.3, -1.5, 48, dtype=torch.float64)
    mix = torch.linalg.qr(torch.randn(48, 48, generator=generator, dtype=torch.float64)).Q
    weight = torch.randn(4000, 48, generator=generator, dtype=torch.float64)
    calibration, hidden = (
        torch.randn(n, 48, generator=generator, dtype=torch.float64) * spread @ mix for n in (8000, 300)
    )
    truth = (hidden @ weight.T).log_softmax(-1)
    divergence = []
    for data in (None, calibration):
        layer = SVDSoftmax(weight, window=6, candidates=40, calibration=data)
        divergence.append(float((truth.exp() * (truth - by_rows(layer.log_prob, hidden))).sum(-1).mean()))
    assert divergence[1] < 0.3 * divergence[0]


def test_change_of_weight_is_noticed():
    """S2."""
    weight, bias = head()
    layer, hidden = screened(weight, bias), states(2)
    for change in (lambda: weight.mul_(2.0), lambda: bias.add_(1.0), lambda: layer.float()):
        change()
        for call in (layer, layer.log_prob, layer.sample, lambda h: layer.topk(h, 1), layer.log_normalizer_error):
            with pytest.raises(RuntimeError, match=r"refresh\(\)"):
                call(hidden.to(layer.weight.dtype))
        layer.refresh()
        layer.topk(hidden.to(layer.weight.dtype), 1)


def test_refresh_prepares_the_new_weight():
    weight, bias = head()
    other, _ = head(seed=9)
    layer, hidden = screened(weight, bias, window=D), states(4)
    weight.copy_(other)
    layer.refresh()
    close(layer(hidden), nn.functional.linear(hidden, other, bias))


def test_optimizer_step_is_noticed():
    linear = nn.Linear(D, V)
    layer = ScreenedSoftmax.from_linear(linear, preview=SVDPreview(4), candidates=9)
    layer(states(2, dtype=torch.float32)).sum().backward()
    torch.optim.SGD(linear.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="refresh"):
        layer(states(2, dtype=torch.float32))


def test_weight_is_shared_and_preview_is_not_saved():
    linear = nn.Linear(D, V, dtype=torch.float64)
    layer = ScreenedSoftmax.from_linear(linear, preview=SVDPreview(4), candidates=9)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert layer.state_dict().keys() == linear.state_dict().keys()
    layer.load_state_dict(nn.Linear(D, V, dtype=torch.float64).state_dict())
    with pytest.raises(RuntimeError, match="refresh"):
        layer(states(2))


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_answer_alike_and_stay_stale(way):
    def copied(layer):
        if way == "deepcopy":
            return copy.deepcopy(layer)
        if way == "pickle":
            return pickle.loads(pickle.dumps(layer))
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)

    layer, hidden = screened(*head(), logit_map=Doubled()), states(3)
    close(copied(layer).log_prob(hidden), layer.log_prob(hidden))
    layer.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="refresh"):
        copied(layer)(hidden)


def test_from_layer_asks_for_the_head():
    class Layer:
        def linear_head(self):
            return *head(), Doubled()

    layer = ScreenedSoftmax.from_layer(Layer(), preview=SVDPreview(D), candidates=9)
    weight, bias = head()
    expected = Doubled()(nn.functional.linear(states(3), weight, bias))
    close(layer(states(3)), expected)
    close(layer.topk(states(3), 2).log_prob, expected.log_softmax(-1).topk(2).values)
    with pytest.raises(TypeError, match="linear_head"):
        ScreenedSoftmax.from_layer(nn.Linear(2, 3), preview=SVDPreview(1), candidates=1)


@pytest.mark.parametrize("window", [3, D])
@pytest.mark.parametrize("logit_map", [None, Doubled()])
def test_gradients(window, logit_map):
    """With the rotation held fixed, for hidden, weight and bias; at full window the full softmax's own."""
    weight, bias = (nn.Parameter(tensor) for tensor in head(17))
    layer = screened(weight, bias, window=window, candidates=4, logit_map=logit_map)
    hidden = states(3).requires_grad_()

    def log_prob(hidden, weight, bias):
        layer._parameters.update(weight=weight, bias=bias)  # gradcheck perturbs copies; the preview stays
        layer._prepared_for = layer._stamp()
        return layer.log_prob(hidden)

    if window == D:
        assert gradcheck(log_prob, (hidden, weight, bias))
        logits = nn.functional.linear(hidden, weight, bias)
        full = (logits if logit_map is None else logit_map(logits)).log_softmax(-1)
        upstream = states(3).repeat(1, 2)[:, :17]
        for mine, theirs in zip(
            torch.autograd.grad(log_prob(hidden, weight, bias), (hidden, weight, bias), upstream),
            torch.autograd.grad(full, (hidden, weight, bias), upstream),
            strict=True,
        ):
            close(mine, theirs)
    else:
        # candidates come from the preview as prepared, so values depend on weight through `follow` alone
        assert gradcheck(log_prob, (hidden, weight, bias))


def test_differentiable_values_are_the_query_values():
    weight, bias = head()
    layer = screened(nn.Parameter(weight), nn.Parameter(bias))
    with torch.no_grad():
        expected = layer.log_prob(states(3))
    close(layer.log_prob(states(3)), expected)
    assert layer.log_prob(states(3)).requires_grad


def test_one_class():
    weight, bias = head(1)
    layer = screened(weight, bias, window=2, candidates=1)
    answer = layer.topk(states(3), 1)
    close(answer.log_prob, torch.zeros(3, 1, dtype=torch.float64))
    assert answer.certified.all()
    assert (layer.sample(states(3)) == 0).all()


def test_duplicate_and_zero_rows_and_ties():
    weight, bias = head(60)
    weight[10:20] = weight[3]
    weight[30:] = 0.0
    bias[10:20], bias[30:] = bias[3], 0.0
    layer = screened(weight, bias, window=3, candidates=5)
    hidden = torch.cat([states(40), torch.zeros(1, D, dtype=torch.float64)])
    logits = nn.functional.linear(hidden, weight, bias)
    answer = topk(layer, hidden, 4, exact=True)
    close(logits.gather(-1, answer.indices), logits.topk(4).values)
    assert all(len(set(row)) == 4 for row in answer.indices.tolist())
    assert answer.certified.all()
    zero = screened(torch.zeros(9, 4, dtype=torch.float64), window=2, candidates=3)
    answer = zero.topk(torch.randn(2, 4, dtype=torch.float64), 3, exact=True)
    close(answer.log_prob, torch.full((2, 3), 1 / 9, dtype=torch.float64).log())


def test_huge_and_bad_hidden_states():
    weight, bias = head(dtype=torch.float32)
    layer = screened(weight, bias)
    assert layer.log_prob(1e4 * states(3, dtype=torch.float32)).isfinite().all()
    hidden = states(3, dtype=torch.float32)
    hidden[1, 2] = float("nan")
    answer = layer.topk(hidden, 2)
    assert answer.log_prob[1].isnan().all()
    assert not answer.certified[1]
    assert answer.log_prob[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weight(dtype):
    weight, bias = head(800, dtype=dtype)
    layer, hidden = screened(weight, bias, window=8, candidates=20), states(50, dtype=dtype)
    logits = nn.functional.linear(hidden.float(), weight.float(), bias.float())
    answer = topk(layer, hidden, 3, exact=True)
    assert answer.log_prob.dtype == layer.log_prob(hidden).dtype == torch.float32
    assert layer(hidden).dtype == dtype
    assert torch.equal(answer.indices, logits.topk(3).indices)


def test_autocast_leaves_the_proof_alone():
    layer, hidden = screened(*head(dtype=torch.float32), exact=True), states(5, dtype=torch.float32)
    expected = layer.topk(hidden, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answer = layer.topk(hidden, 3)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(answer, expected, strict=True))


def test_large_batch_is_the_full_layer():
    weight, bias = head()
    layer = screened(weight, bias, window=2, candidates=20)
    many = states(11)  # 11 * 20 rows gathered > 203
    logits = nn.functional.linear(many, weight, bias)
    assert torch.equal(layer(many), logits)
    assert layer.topk(many, 5).certified.all()


def test_sample_follows_log_prob():
    torch.manual_seed(0)
    layer = screened(*head(20), window=6, candidates=5)
    hidden = 0.3 * states(1)
    drawn = torch.bincount(layer.sample(hidden, 40_000)[0], minlength=20) / 40_000
    expected = layer.log_prob(hidden)[0].exp()
    assert ((drawn - expected).abs() < 5 * (expected / 40_000).sqrt() + 1e-4).all()


def test_inference_mode_and_shared_storage():
    layer, hidden = screened(*head()), states(2)
    with torch.inference_mode():
        expected = layer.topk(hidden, 3)
        inside = screened(*head())
        assert torch.equal(inside.topk(hidden, 3).indices, expected.indices)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "k must be between 1 and 20, got 21", lambda s: s.topk(states(2), 21)),
        (ValueError, "k must be", lambda s: s.topk(states(2), 0)),
        (TypeError, "k must be", lambda s: s.topk(states(2), 1.5)),
        (ValueError, "num_samples", lambda s: s.sample(states(2), 0)),
        (ValueError, r"hidden must have shape \(..., 12\)", lambda s: s(torch.zeros(2, 5, dtype=torch.float64))),
        (TypeError, "hidden must have the layer's dtype", lambda s: s(torch.zeros(2, D))),
        (TypeError, "hidden must be a floating", lambda s: s(torch.zeros(2, D, dtype=torch.int64))),
        (ValueError, "candidates must be between 1 and 203, got 204", lambda s: screened(*head(), candidates=204)),
        (ValueError, "candidates must be", lambda s: screened(*head(), candidates=0)),
        (ValueError, "window must be between 1 and the weight's width 12", lambda s: screened(*head(), window=13)),
        (ValueError, "window must be at least 1", lambda s: screened(*head(), window=0)),
        (TypeError, "preview must be", lambda s: ScreenedSoftmax(*head(), preview=4, candidates=2)),
        (TypeError, "weight must be a floating", lambda s: screened(torch.zeros(3, 4, dtype=torch.int8))),
        (TypeError, "weight must be a floating", lambda s: screened([[1.0]])),
        (ValueError, "weight must have shape", lambda s: screened(torch.zeros(3))),
        (ValueError, "weight must have shape", lambda s: screened(torch.zeros(0, 4))),
        (ValueError, "weight must be finite", lambda s: screened(torch.full((3, 4), float("inf")))),
        (ValueError, r"bias must have shape \(203,\)", lambda s: screened(head()[0], torch.zeros(5))),
        (ValueError, "bias must be finite", lambda s: screened(head()[0], torch.full((V,), float("nan")))),
    ],
)
def test_bad_input(error, message, call):
    layer = screened(*head())
    before = layer.topk(states(2), 3)
    with pytest.raises(error, match=message):
        call(layer)
    assert torch.equal(layer.topk(states(2), 3).indices, before.indices)
