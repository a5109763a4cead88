"""Models that cap, scale or shift the output of their head: replaced head and layer give the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lastlayer import FullSoftmax, Int8Preview, MixtureOfSoftmaxes, ScreenedSoftmax, SoftCap
from lastlayer.study.errors import StudyError
from lastlayer.study.heads import load_head

pytest.importorskip("transformers")

from lastlayer.transformers import ScaledLogits, hidden_states, logit_map_of, output_layer, replace_lm_head
from tiny_models import V, make, tokens

# A family, the options that matter here, and the map that its models apply.
MODELS = {
    "gemma2": ("gemma2", {}, "SoftCap(cap=3)"),
    "gemma2-uncapped": ("gemma2", {"final_logit_softcapping": None}, "None"),
    "recurrent-gemma": ("recurrent-gemma", {}, "SoftCap(cap=5)"),
    "cohere": ("cohere", {}, "ScaledLogits(scale=0.0625)"),
    "granite": ("granite", {}, "ScaledLogits(scale=0.166667)"),
    "llama": ("llama", {}, "None"),
    "qwen2": ("qwen2", {}, "None"),
}


@pytest.fixture(params=MODELS)
def named(request):
    family, options, expected = MODELS[request.param]
    return make(family, **options).eval(), expected


def marian():
    model = make("marian").eval()
    model.final_logits_bias.zero_()
    return model


def test_the_map_is_found_and_nothing_is_changed(named):
    model, expected = named
    model.train()
    head, state = model.get_output_embeddings(), torch.get_rng_state()
    assert repr(logit_map_of(model)).replace("\n", "") == expected
    assert model.get_output_embeddings() is head
    assert torch.equal(torch.get_rng_state(), state)
    assert all(part.training for part in model.modules())


def last_hidden(model, ids):
    return model.get_decoder()(ids).last_hidden_state if hasattr(model, "get_decoder") else model.model(ids)[0]


def test_logits_loss_and_gradients_of_the_head_as_a_layer(named):
    model, _ = named
    layer, ids = output_layer(model), tokens()
    with torch.no_grad():
        (hidden,) = hidden_states(model, [ids])
        torch.testing.assert_close(layer.log_prob(hidden), model(ids).logits.flatten(0, 1).log_softmax(-1))
    labels = ids.clone()
    labels[0, 3] = -100
    answers = []
    for loss_of in (
        lambda: model(ids, labels=labels).loss,
        lambda: layer(last_hidden(model, ids)[:, :-1], labels[:, 1:]),
    ):
        model.zero_grad()
        loss = loss_of()
        loss.backward()
        answers.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-4, atol=1e-6)


def test_without_the_map_the_loss_is_another():
    """What the tests above could not tell apart, they would not test."""
    model, ids = make("gemma2").eval(), tokens()
    naive = FullSoftmax(32, V, bias=False, weight=model.lm_head.weight)
    loss = naive(last_hidden(model, ids)[:, :-1], ids[:, 1:])
    assert abs(loss / model(ids, labels=ids).loss - 1) > 0.1


def test_a_screen_under_the_model(named):
    """Logits, loss, and text are the model's own, whatever it does to its head's."""
    model, _ = named
    head, ids = model.get_output_embeddings(), tokens()
    settings = {"max_new_tokens": 6, "do_sample": False}
    expected, text = model(ids, labels=ids), model.generate(ids, **settings)
    everything = ScreenedSoftmax.from_linear(head, preview=Int8Preview(), candidates=V)
    with replace_lm_head(model, everything):
        answer = model(ids, labels=ids)
    torch.testing.assert_close(answer.logits, expected.logits)
    torch.testing.assert_close(answer.loss, expected.loss)
    few = ScreenedSoftmax.from_linear(head, preview=Int8Preview(), candidates=10, exact=True)
    with replace_lm_head(model, few):
        assert torch.equal(model.generate(ids, **settings), text)


def test_a_map_is_not_applied_twice(named):
    """A screen with a map serves under a model that has none, and is refused under one that has."""
    model, expected = named
    head = model.get_output_embeddings()
    layer = FullSoftmax(32, V, bias=False, weight=head.weight, logit_map=SoftCap(3.0))
    screen = ScreenedSoftmax.from_layer(layer, preview=Int8Preview(), candidates=V)
    mixture = MixtureOfSoftmaxes(32, V, 2, bias=False)
    mixed = ScreenedSoftmax.from_layer(mixture, preview=Int8Preview(), candidates=V)
    ids = tokens()
    if expected == "None":
        raw = model(ids).logits
        with replace_lm_head(model, screen):
            torch.testing.assert_close(model(ids).logits, SoftCap(3.0)(raw))
        with replace_lm_head(model, mixed):
            torch.testing.assert_close(model(ids).logits.exp().sum(-1), torch.ones(2, 7))
    else:
        with pytest.raises(
            ValueError, match=r"head must give plain logits, as .*For.* applies .* itself.*logit_map=None"
        ):
            replace_lm_head(model, screen)
        with pytest.raises(ValueError, match=r"head must give plain logits.*log-probabilities"):
            replace_lm_head(model, mixed)
        plain = ScreenedSoftmax.from_layer(layer, preview=Int8Preview(), candidates=V, logit_map=None)
        with replace_lm_head(model, plain):
            logits = model(ids).logits
        torch.testing.assert_close(logits, model(ids).logits)
    assert model.get_output_embeddings() is head


def test_a_bias_after_the_head():
    """Marian adds one: zeros do nothing; others make a screen's best classes not the model's."""
    model = marian()
    screen = ScreenedSoftmax.from_linear(model.get_output_embeddings(), preview=Int8Preview(), candidates=V)
    assert logit_map_of(model) is None
    with replace_lm_head(model, screen):
        pass
    model.final_logits_bias[0, 7] = 4.0
    with pytest.raises(TypeError, match="adds something of its own"):
        logit_map_of(model)
    with pytest.raises(ValueError, match=r"head must not be a ScreenedSoftmax.*adds something"):
        replace_lm_head(model, screen)
    with replace_lm_head(model, nn.Linear(32, V, bias=False)):  # which keeps what is added
        pass


def test_speedup_reads_what_follows_the_head(tmp_path):
    """A soft cap leaves the order as it is; numbers added to some classes do not."""
    capped, shifted = make("gemma2").eval(), marian()
    shifted.final_logits_bias[0, 7] = 4.0
    for name, model in (("capped", capped), ("shifted", shifted)):
        model.save_pretrained(tmp_path / name)
    assert load_head(tmp_path / "capped").weight.shape == (V, 32)
    with pytest.raises(StudyError, match=r"MarianMTModel adds something of its own to the logits"):
        load_head(tmp_path / "shifted")


def test_maps_that_are_none_of_these():
    model = make("llama").eval()

    class Odd(type(model)):
        def forward(self, *args, **kwargs):
            answer = super().forward(*args, **kwargs)
            answer.logits = self.do(answer.logits)
            return answer

    model.__class__ = Odd
    for do in (torch.square, torch.neg, torch.zeros_like):
        model.do = do
        with pytest.raises(TypeError, match="no function of its head's alone"):
            logit_map_of(model)
    model.do = lambda logits: 4.0 * torch.tanh(0.5 * logits / 4.0)
    found = logit_map_of(model)
    grid = torch.linspace(-9, 9, 41)
    torch.testing.assert_close(found(grid), model.do(grid))


@pytest.mark.parametrize("cap", [None, 2.5])
def test_scaled_logits(cap):
    logit_map = ScaledLogits(0.3, cap)
    leaf = torch.linspace(-8, 8, 21, dtype=torch.float64, requires_grad=True)
    expected = 0.3 * leaf if cap is None else cap * torch.tanh(0.3 * leaf / cap)
    torch.testing.assert_close(logit_map(leaf), expected)
    upstream = torch.linspace(1, 2, 21, dtype=torch.float64)
    (slope,) = torch.autograd.grad(expected, leaf, upstream)
    torch.testing.assert_close(logit_map.vjp(leaf.detach(), upstream)[0], slope)
    layer = FullSoftmax(4, 30, bias=False, logit_map=logit_map)
    hidden, targets = torch.randn(5, 4), torch.randint(30, (5,))
    torch.testing.assert_close(
        layer(hidden, targets), F.cross_entropy(logit_map(hidden @ layer.weight.T), targets)
    )
    for wrong in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="scale must be a positive finite number"):
            ScaledLogits(wrong)


def test_a_model_that_token_ids_do_not_run():
    """A screen without a map goes in: the model treats its logits as before; one with a map does not."""
    model = make("llama").eval()
    weight = model.lm_head.weight
    plain, mapped = (
        ScreenedSoftmax(weight, preview=Int8Preview(), candidates=9, logit_map=m) for m in (None, SoftCap(2.0))
    )
    head, model.get_decoder().embed_tokens = model.lm_head, None
    with pytest.raises(TypeError, match="does not run on token ids alone"):
        logit_map_of(model)
    with pytest.raises(TypeError, match="does not run on token ids alone"):
        replace_lm_head(model, mapped)
    assert model.lm_head is head
    with replace_lm_head(model, plain):
        assert model.lm_head is plain


def test_heads_that_are_no_matrix():
    model = make("llama").eval()
    model.lm_head = nn.Sequential(nn.Linear(32, V))
    with pytest.raises(TypeError, match="must be one matrix, got Sequential"):
        output_layer(model)
    with pytest.raises(TypeError, match="output head to replace"):
        output_layer(nn.Linear(3, 4))
