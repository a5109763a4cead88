"""ScreenedSoftmax: the laws S1, S3 and S4 of the method, and its gradients."""

import pytest
import torch
from screened_head import D, Doubled, V, by_rows, close, head, screened, states, topk
from torch import nn
from torch.autograd import gradcheck

from lastlayer import SVDSoftmax


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
