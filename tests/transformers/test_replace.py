"""replace_lm_head: the model's own generate on a screened head, the same text, and everything put back."""

import pytest
import torch
from torch import nn

from lastlayer import FullSoftmax, Int8Preview, ScreenedSoftmax, SVDPreview

pytest.importorskip("transformers")

from lastlayer.transformers import hidden_states, replace_lm_head
from tiny_models import V, make, tokens

MODELS = ("gpt2", "llama", "t5", "bert-decoder")


def screened(model, **settings):
    settings = {"preview": Int8Preview(), "candidates": 24, "exact": True, **settings}
    return ScreenedSoftmax.from_linear(model.get_output_embeddings(), **settings)


def prompt():
    return tokens(length=5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", ["greedy", "beam"])
def test_same_text(name, how):
    model = make(name).eval()
    settings = {"max_new_tokens": 10, "do_sample": False, "num_beams": 3 if how == "beam" else 1}
    expected = model.generate(prompt(), **settings)
    head = screened(model, candidates=V) if how == "beam" else screened(model)
    with replace_lm_head(model, head):
        assert model.get_output_embeddings() is head
        assert torch.equal(model.generate(prompt(), **settings), expected)
    assert torch.equal(model.generate(prompt(), **settings), expected)


@pytest.mark.parametrize("name", MODELS)
def test_sampling_draws_the_same(name):
    """With every class a candidate the logits are the model's, and so is what a seed draws from them."""
    model = make(name).eval()

    def drawn():
        torch.manual_seed(5)
        return model.generate(prompt(), max_new_tokens=8, do_sample=True, temperature=0.8, top_k=20, top_p=0.9)

    expected = drawn()
    with replace_lm_head(model, screened(model, candidates=V)):
        assert torch.equal(drawn(), expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("settings", [{"do_sample": True, "top_k": 20}, {"do_sample": False, "num_beams": 3}])
def test_few_candidates_run(name, settings):
    """Sampling and beam search on preview scores: another text perhaps, of known words."""
    model = make(name).eval()
    length = model.generate(prompt(), max_new_tokens=6, min_new_tokens=6, **settings).shape
    with replace_lm_head(model, screened(model, preview=SVDPreview(8), exact=False)):
        ids = model.generate(prompt(), max_new_tokens=6, min_new_tokens=6, **settings)
    assert ids.shape == length
    assert 0 <= ids.min() <= ids.max() < V


@pytest.mark.parametrize("name", [*MODELS, "untied"])
def test_undo_restores_the_very_module(name):
    model = make("gpt2", tie_word_embeddings=False) if name == "untied" else make(name)
    original, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = original.weight is embedding.weight
    assert tied == (name in ("gpt2", "t5", "bert-decoder"))
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    handle = replace_lm_head(model, screened(model))
    assert model.get_output_embeddings() is not original
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    handle.undo()
    handle.undo()
    assert model.get_output_embeddings() is original
    assert model.get_input_embeddings() is embedding
    assert (original.weight is embedding.weight) == tied
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_undo_after_a_failure():
    model = make("gpt2").eval()
    original = model.lm_head
    with pytest.raises(ZeroDivisionError), replace_lm_head(model, screened(model)):
        raise ZeroDivisionError
    assert model.lm_head is original


def test_replaced_twice():
    """The later one is undone first; the other order is refused, and nothing is lost by trying."""
    model = make("gpt2").eval()
    original, first, second = model.lm_head, screened(model), screened(model)
    one, two = replace_lm_head(model, first), replace_lm_head(model, second)
    with pytest.raises(RuntimeError, match="undo the later replacement first"):
        one.undo()
    assert model.lm_head is second
    two.undo()
    assert model.lm_head is first
    one.undo()
    assert model.lm_head is original
    with replace_lm_head(model, second):
        one.undo()
        assert model.lm_head is second


def test_a_head_that_the_model_does_not_take():
    """BERT takes its head's bias; of one without, nothing stays."""
    model = make("bert-decoder")
    original, bias = model.get_output_embeddings(), model.cls.predictions.bias
    with pytest.raises(AttributeError, match="bias"):
        replace_lm_head(model, nn.Identity())
    assert model.get_output_embeddings() is original
    assert model.cls.predictions.bias is bias


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_give_the_logits(name):
    model = make(name).eval()
    (hidden,) = hidden_states(model, [prompt()])
    more = {"decoder_input_ids": prompt()} if name == "t5" else {}
    with torch.no_grad():
        logits = model(input_ids=prompt(), **more).logits
    torch.testing.assert_close(model.get_output_embeddings()(hidden).view_as(logits), logits)
    assert isinstance(model.get_output_embeddings(), nn.Linear)


def test_bad_input():
    model = make("gpt2").eval()
    with pytest.raises(TypeError, match="output head to replace, which Linear does not"):
        replace_lm_head(nn.Linear(2, 3), screened(model))
    with pytest.raises(TypeError, match="output head to replace, which GPT2Model"):
        replace_lm_head(model.transformer, screened(model))
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        replace_lm_head(model, lambda hidden: hidden)
    with pytest.raises(TypeError, match="FullSoftmax takes targets"):
        replace_lm_head(model, FullSoftmax(32, V))
    with pytest.raises(ValueError, match="out_features=120, got 7"):
        replace_lm_head(model, nn.Linear(32, 7))
    assert isinstance(model.lm_head, nn.Linear)
