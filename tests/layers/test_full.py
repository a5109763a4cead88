"""What is specific to `FullSoftmax`: tying, loading, its memory, its maps."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lastlayer import FullSoftmax, LogitMap, SoftCap
from lastlayer.functional import linear_chunks


def test_loads_a_linear_head():
    linear = nn.Linear(6, 40)
    layer = FullSoftmax(6, 40)
    layer.load_state_dict(linear.state_dict())
    hidden, targets = torch.randn(9, 6), torch.randint(40, (9,))
    torch.testing.assert_close(layer(hidden, targets), F.cross_entropy(linear(hidden), targets))
    torch.testing.assert_close(layer.log_prob(hidden), linear(hidden).log_softmax(-1))
    weight, bias, logit_map = layer.linear_head()
    assert weight is layer.weight
    assert bias is layer.bias
    assert logit_map is None


def test_starts_as_a_linear_layer_does():
    torch.manual_seed(0)
    layer, linear = FullSoftmax(64, 5000), nn.Linear(64, 5000)
    assert layer.weight.abs().max() <= 1 / 8
    torch.testing.assert_close(layer.weight.std(), linear.weight.std(), rtol=0.01, atol=0)
    torch.testing.assert_close(layer.bias.std(), linear.bias.std(), rtol=0.1, atol=0)


def test_tied_weight_is_the_embedding():
    embedding = nn.Embedding(30, 4)
    before = embedding.weight.detach().clone()
    layer = FullSoftmax(4, 30, weight=embedding.weight)
    assert layer.weight is embedding.weight
    assert torch.equal(embedding.weight, before), "tying changed the embedding"
    model = nn.ModuleDict({"embedding": embedding, "output": layer})
    twin = copy.deepcopy(model)
    assert twin["output"].weight is twin["embedding"].weight
    ids = torch.randint(30, (6,))
    layer(embedding(ids), ids).backward()
    plain = before.clone().requires_grad_()
    F.cross_entropy(F.linear(F.embedding(ids, plain), plain, layer.bias), ids).backward()
    torch.testing.assert_close(embedding.weight.grad, plain.grad)


def test_never_holds_all_logits(monkeypatch):
    """Training, target log-probabilities and top-k make no tensor of `N * V` numbers."""
    monkeypatch.setattr(linear_chunks, "CHUNK_BYTES", 5 * 100 * 4)
    layer, hidden, targets = FullSoftmax(4, 100), torch.randn(60, 4, requires_grad=True), torch.randint(100, (60,))
    with LargestTensor() as seen:
        layer(hidden, targets).backward()
        layer.target_log_prob(hidden, targets).sum().backward()
        layer.topk(hidden, 3)
    assert seen.largest <= 5 * 100


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the most numbers that one operation's result holds."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else (result,):
            if isinstance(part, torch.Tensor):
                self.largest = max(self.largest, part.numel())
        return result


def test_saturated_map_does_not_tie_topk():
    layer = FullSoftmax(1, 50, bias=False, logit_map=SoftCap(1.0))
    with torch.no_grad():
        layer.weight.copy_(torch.arange(50.0)[:, None])
    answer = layer.topk(torch.tensor([100.0]), 5)
    assert answer.indices.tolist() == [49, 48, 47, 46, 45]


class Falling(LogitMap):
    def forward(self, logits):
        return -logits


class Bent(LogitMap):
    """Increasing but for a small dent."""

    def forward(self, logits):
        return logits - 3 * torch.exp(-logits.square())


class Flat(LogitMap):
    def forward(self, logits):
        return 0 * logits


class Mixing(LogitMap):
    def forward(self, logits):
        return logits.sum(-1)


class Cubic(LogitMap):
    """A user's map: only `forward` is written."""

    def forward(self, logits):
        return logits + 0.1 * logits**3


@pytest.mark.parametrize("wrong", [Falling(), Bent(), Flat(), Mixing()], ids=lambda m: type(m).__name__)
def test_wrong_map_is_refused(wrong):
    with pytest.raises(ValueError, match=f"logit_map must be .*{type(wrong).__name__}"):
        FullSoftmax(3, 5, logit_map=wrong)


def test_users_map():
    layer = FullSoftmax(3, 5, logit_map=Cubic(), dtype=torch.float64)
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    torch.testing.assert_close(layer.logit_map.derivative(x), 1 + 0.3 * x.square())
    with pytest.raises(NotImplementedError, match="Cubic has no inverse"):
        layer.logit_map.inverse(x)


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (TypeError, "weight must be an nn.Parameter", {"weight": torch.randn(5, 3)}),
        (ValueError, "weight must have shape", {"weight": nn.Parameter(torch.randn(3, 5))}),
        (ValueError, "label_smoothing", {"label_smoothing": -0.1}),
        (ValueError, "class_weights", {"class_weights": torch.ones(4)}),
        (ValueError, "z_loss", {"z_loss": -1.0}),
        (TypeError, "logit_map", {"logit_map": nn.Tanh()}),
    ],
)
def test_bad_options(error, match, options):
    with pytest.raises(error, match=match):
        FullSoftmax(3, 5, **options)


WEIGHTS = torch.linspace(0.1, 2.0, 11)


def weighted(**options):
    return FullSoftmax(4, 11, class_weights=WEIGHTS, **options)


def weighted_loss(layer, hidden, targets):
    return F.cross_entropy(F.linear(hidden, layer.weight, layer.bias), targets, weight=WEIGHTS.to(hidden))


def test_class_weights_keep_their_values_when_the_layer_is_cast():
    layer = weighted().to(torch.bfloat16)
    assert torch.equal(layer.class_weights, WEIGHTS), "0.1 was rounded to half precision"
    assert torch.equal(layer.double().class_weights, WEIGHTS)


@pytest.mark.parametrize(
    "make", [lambda: weighted().to("meta"), lambda: weighted(device="meta")], ids=["to", "in"]
)
def test_class_weights_survive_meta(make):
    source, layer = weighted(), make().to_empty(device="cpu")
    assert torch.equal(layer.class_weights, WEIGHTS)
    layer.load_state_dict(source.state_dict())
    hidden, targets = torch.randn(9, 4), torch.randint(11, (9,))
    torch.testing.assert_close(layer(hidden, targets), weighted_loss(layer, hidden, targets))


def test_class_weights_are_in_the_state_dict():
    layer = FullSoftmax(4, 11, class_weights=torch.ones(11))
    layer.load_state_dict(weighted().state_dict())
    assert torch.equal(layer.class_weights, WEIGHTS)
    layer.load_state_dict(nn.Linear(4, 11).state_dict())
    assert torch.equal(layer.class_weights, WEIGHTS), "a linear head has none, and cannot overwrite them"
    assert "class_weights" not in FullSoftmax(4, 11).state_dict()
