"""chunked_loss(model, layer=...): the head of a model trains as another output layer."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lastlayer import FullSoftmax, HierarchicalSoftmax, LogUniform, SampledSoftmax

transformers = pytest.importorskip("transformers")

from lastlayer.transformers import DeferredLogits, chunked_loss  # noqa: E402
from tiny_models import V, batch, make  # noqa: E402


def sampled(weight, **options):
    return SampledSoftmax(32, V, LogUniform(V), 20, bias=False, weight=weight, **options)


LAYERS = {
    "sampled": sampled,
    "hierarchical": lambda weight: HierarchicalSoftmax(32, V),
    "full": lambda weight: FullSoftmax(32, V, bias=False, weight=weight, z_loss=0.01, label_smoothing=0.1),
}


@pytest.fixture(params=["llama", "gpt2", "t5"])
def family(request):
    return request.param


@pytest.fixture(params=LAYERS)
def kind(request):
    return request.param


def hidden_and_targets(model, inputs):
    """What meets in the loss, as the model shifts it."""
    labels = inputs["labels"]
    if model.config.is_encoder_decoder:
        decoder_ids = model.prepare_decoder_input_ids_from_labels(labels)
        output = model.model if hasattr(model, "model") else model.base_model
        encoded = model.get_encoder()(inputs["input_ids"])[0]
        hidden = model.get_decoder()(decoder_ids, encoder_hidden_states=encoded)[0]
        assert output is not None
        scaled = getattr(model.config, "scale_decoder_outputs", False)
        return hidden * (model.config.d_model**-0.5 if scaled else 1.0), labels
    return model.base_model(inputs["input_ids"])[0][:, :-1], labels[:, 1:]


def test_training(family, kind):
    """The layer's own loss of the model's hidden states and labels, and its gradients."""
    model, inputs = make(family).train(), batch(family)
    layer = LAYERS[kind](model.get_output_embeddings().weight)
    parameters = list({id(p): p for p in (*model.parameters(), *layer.parameters())}.values())
    settings = layer.reduction, layer.ignore_index

    def own():
        return layer(*hidden_and_targets(model, inputs))

    def through_the_model():
        with chunked_loss(model, layer):
            output = model(**inputs)
            assert isinstance(output.logits, DeferredLogits)
            assert output.logits.computed is None
            return output.loss

    found = []
    for loss_of in (own, through_the_model):
        torch.manual_seed(3)
        loss = loss_of()
        found.append([loss, *torch.autograd.grad(loss, parameters, allow_unused=True)])
    for expected, actual in zip(*found, strict=True):
        if expected is None:
            assert actual is None or not actual.any()
        else:
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    assert (layer.reduction, layer.ignore_index) == settings


def test_evaluation(family, kind):
    """The exact loss of the layer's model; its logits; text."""
    model, inputs = make(family).eval(), batch(family)
    layer = LAYERS[kind](model.get_output_embeddings().weight)
    without = {"decoder_input_ids": inputs["input_ids"]} if family == "t5" else {}
    with torch.no_grad(), chunked_loss(model, layer):
        hidden, targets = hidden_and_targets(model, inputs)
        log_prob = layer.eval().log_prob(hidden)
        exact = F.nll_loss(log_prob.flatten(0, 1), targets.flatten())
        torch.testing.assert_close(model(**inputs).loss, exact)
        logits = model(input_ids=inputs["input_ids"], **without).logits
        assert type(logits) is Tensor
        expected = (
            hidden_and_targets(model, {**inputs, "labels": inputs["input_ids"]})[0] if family == "t5" else hidden
        )
        if family != "t5":
            logits = logits[:, :-1]
            torch.testing.assert_close(logits.log_softmax(-1), layer.log_prob(expected))
        ids = model.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert 0 <= ids.min() <= ids.max() < V


def test_gradient_accumulation(kind):
    """The parts of a batch, each divided by the items of all, as the layer's own sum."""
    model, inputs = make("llama").train(), batch("llama", rows=4)
    layer = LAYERS[kind](model.lm_head.weight)
    items = (inputs["labels"][:, 1:] != -100).sum()
    torch.manual_seed(3)
    parts = list(zip(*(tensor.split([3, 1]) for tensor in inputs.values()), strict=True))
    expected = []
    for ids, labels in parts:
        hidden, targets = hidden_and_targets(model, {"input_ids": ids, "labels": labels})
        expected.append(layer(hidden, targets) * (targets != -100).sum() / items)
    torch.manual_seed(3)
    with chunked_loss(model, layer):
        for (ids, labels), wanted in zip(parts, expected, strict=True):
            loss = model(input_ids=ids, labels=labels, num_items_in_batch=items).loss
            torch.testing.assert_close(loss, wanted)


def test_saved_where_it_is_the_models_own(tmp_path, family):
    model, inputs = make(family), batch(family)
    layer = sampled(model.get_output_embeddings().weight, class_weights=torch.ones(V))
    keys = list(model.state_dict())
    with chunked_loss(model, layer):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.train()(**inputs).loss.backward()
        optimizer.step()
        assert list(model.state_dict()) == keys
        model.save_pretrained(tmp_path)
        state = {key: 2 * tensor for key, tensor in model.state_dict().items()}
    expected = model.eval()(**inputs).loss
    torch.testing.assert_close(type(model).from_pretrained(tmp_path).eval()(**inputs).loss, expected)
    with chunked_loss(model, layer):
        model.load_state_dict(state)
    assert torch.equal(layer.weight, state[keys[-1] if family == "llama" else keys[0]])
    assert layer.weight is model.get_output_embeddings().weight


def test_not_saved_where_it_is_not(tmp_path):
    model = make("llama")
    handle = chunked_loss(model, HierarchicalSoftmax(32, V))
    with pytest.raises(RuntimeError, match=r"save_pretrained\(\) cannot be called.*would not find the parameters"):
        model.save_pretrained(tmp_path)
    assert any(name.startswith("lm_head.layer.") for name in model.state_dict())
    handle.undo()
    model.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("family", "layer", "error", "message"),
    [
        ("gemma2", sampled, ValueError, r"layer must be None here: Gemma2ForCausalLM applies SoftCap\(cap=3\)"),
        ("cohere", sampled, ValueError, "layer must be None here: CohereForCausalLM applies ScaledLogits"),
        ("marian", sampled, ValueError, "layer must be None here: MarianMTModel adds something of its own"),
        ("llama", lambda w: FullSoftmax(16, V), ValueError, "layer must have the model's in_features=32, got 16"),
        ("llama", lambda w: FullSoftmax(32, 7), ValueError, f"layer must have the model's num_classes={V}, got 7"),
        ("llama", lambda w: FullSoftmax(32, V, device="meta"), ValueError, "model's device cpu, got meta"),
        ("llama", lambda w: nn.Linear(32, V), TypeError, "layer must be an OutputLayer.*got Linear"),
    ],
)
def test_layers_that_are_refused(family, layer, error, message):
    model = make(family)
    head, keys = model.get_output_embeddings(), list(model.state_dict())
    with pytest.raises(error, match=message):
        chunked_loss(model, layer(head.weight))
    assert model.get_output_embeddings() is head
    assert list(model.state_dict()) == keys


def test_what_is_seen_only_at_the_loss():
    """Whisper does not run on token ids alone; class weights are the caller's."""
    model, inputs = make("whisper").train(), batch("whisper")
    with chunked_loss(model, sampled(model.get_output_embeddings().weight)):
        assert model(**inputs).loss.isfinite()
        logits = model(**inputs).logits
        with pytest.raises(ValueError, match=r"use the logits of its head as they are.*SampledSoftmax"):
            F.cross_entropy(2 * logits.flatten(0, 1), inputs["labels"].flatten())
        for options in ({"weight": torch.ones(V)}, {"label_smoothing": 0.1}):
            with pytest.raises(
                ValueError, match="no class weights and no label smoothing but those of the Sampled"
            ):
                F.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten(), **options)
        with pytest.raises(RuntimeError, match="would train a full softmax, not the SampledSoftmax"):
            logits.log_softmax(-1)
        with torch.no_grad():
            assert logits.log_softmax(-1).shape == (*inputs["labels"].shape, V)


def test_zeros_that_a_model_adds():
    model, inputs = make("marian").train(), batch("marian")
    model.final_logits_bias.zero_()
    with chunked_loss(model, HierarchicalSoftmax(32, V)):
        model(**inputs).loss.backward()
        model.final_logits_bias[0, 3] = 1.0
        with pytest.raises(ValueError, match="use the logits of its head as they are"):
            model(**inputs)
