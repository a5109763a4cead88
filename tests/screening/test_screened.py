"""ScreenedSoftmax: its contract, a weight that changes (law S2), and hostile input."""

import copy
import io
import pickle

import pytest
import torch
from screened_head import D, Doubled, V, close, head, screened, states, topk
from torch import nn

from lastlayer import Int4Preview, Int8Preview, LogitMap, ScreenedSoftmax, SVDPreview


class Falling(LogitMap):
    """No map of a logit: the best classes would be the worst."""

    def forward(self, logits):
        return -logits


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


@pytest.mark.parametrize("preview", [SVDPreview(4), Int8Preview(), Int4Preview()], ids=repr)
@pytest.mark.parametrize("exact", [False, True])
def test_no_rows_by_the_kernels(preview, exact):
    layer = ScreenedSoftmax(*head(dtype=torch.float32), preview=preview, candidates=20, exact=exact)
    layer.topk(states(1, dtype=torch.float32), 4)  # the kernels are ready
    for shape in ((0,), (2, 0)):
        hidden = states(*shape, dtype=torch.float32)
        assert layer.topk(hidden, 4).indices.shape == (*shape, 4)
        assert layer(hidden).shape == layer.log_prob(hidden).shape == (*shape, V)
        assert layer.sample(hidden, 6).shape == (*shape, 6)


def test_non_contiguous_and_chunked(monkeypatch):
    layer, hidden = screened(*head(), candidates=3), states(9)
    expected = layer.topk(hidden, 3), layer.log_prob(hidden)
    monkeypatch.setattr("lastlayer.screening.base.CHUNK_NUMBERS", 2 * V)
    strided = torch.stack([hidden, hidden], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    for mine, theirs in zip(
        (*layer.topk(strided, 3), layer.log_prob(strided)), (*expected[0], expected[1]), strict=True
    ):
        close(mine, theirs)


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


@pytest.mark.parametrize("preview", [SVDPreview(3), SVDPreview(4, storage="int8"), Int8Preview(), Int4Preview()])
def test_duplicate_and_zero_rows_in_the_kernels(preview):
    """float32, where the fused kernels serve: ties at the k-th place, and a hidden state that ties all."""
    weight, bias = head(200, dtype=torch.float32)
    weight[10:60], bias[10:60] = weight[3], bias[3]
    weight[100:150], bias[100:150] = 0.0, 0.0
    layer = ScreenedSoftmax(weight, bias, preview=preview, candidates=12, exact=True)
    hidden = torch.cat([states(30, dtype=torch.float32), torch.zeros(1, D)])
    logits = nn.functional.linear(hidden, weight, bias)
    for row, truth in zip(hidden.split(1), logits.split(1), strict=True):
        answer = layer.topk(row, 6)
        close(truth.gather(-1, answer.indices), truth.topk(6).values, 1e-5)
        assert len(set(answer.indices[0].tolist())) == 6
        assert answer.certified.all()


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


def test_queries_in_inference_mode():
    layer, hidden = screened(*head()), states(2)
    expected = layer.topk(hidden, 3)
    with torch.inference_mode():
        assert torch.equal(layer.topk(hidden, 3).indices, expected.indices)
        layer.weight.mul_(2)
        with pytest.raises(RuntimeError, match="refresh"):
            layer.topk(hidden, 3)


@pytest.mark.parametrize("which", [0, 1])
def test_inference_tensors_are_refused(which):
    """Their changes cannot be noticed: a stale preview certified a wrong class."""
    given = list(head())
    with torch.inference_mode():
        given[which] = given[which].clone()
    name = ("weight", "bias")[which]
    with pytest.raises(ValueError, match=rf"{name} must not be an inference tensor.*{name}\.clone\(\)"):
        screened(*given)
    given[which] = given[which].clone()
    screened(*given)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "k must be at most candidates, 20 of 203 classes; got 21", lambda s: s.topk(states(2), 21)),
        (
            ValueError,
            "k must be at most candidates, 20 of 203 classes; got 204",
            lambda s: s.topk(states(2), V + 1),
        ),
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
        (TypeError, "weight must be a dense floating", lambda s: screened(torch.zeros(3, 4, dtype=torch.int8))),
        (TypeError, "weight must be a dense floating", lambda s: screened([[1.0]])),
        (TypeError, "weight must be a dense floating", lambda s: screened(None)),
        (TypeError, "of 16 to 64 bits", lambda s: screened(torch.zeros(3, 4).to(torch.float8_e4m3fn))),
        (TypeError, "logit_map must be a LogitMap", lambda s: screened(*head(), logit_map=nn.Softplus())),
        (ValueError, "logit_map must be increasing", lambda s: screened(*head(), logit_map=Falling())),
        (TypeError, "torch.sparse_coo", lambda s: screened(torch.eye(30, 12).to_sparse())),
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
