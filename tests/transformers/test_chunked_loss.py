"""chunked_loss: loss and gradients are the model's own, without its logits, and everything is put back."""

import copy
import importlib.metadata

import pytest
import torch
from torch import Tensor, nn

from lastlayer import Int8Preview, ScreenedSoftmax
from lastlayer.functional.linear_chunks import LinearChunks

transformers = pytest.importorskip("transformers")

from lastlayer.transformers import DeferredLogits, chunked_loss, replace_lm_head  # noqa: E402
from tiny_models import FAMILIES, TOKENS, V, batch, make  # noqa: E402


def step(model, inputs, **more):
    """The output of a training step, and the gradients by name."""
    model.zero_grad()
    output = model(**inputs, **more)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(actual, expected, rtol=1e-4, atol=1e-5):
    torch.testing.assert_close(actual[0].loss, expected[0].loss, rtol=1e-5, atol=1e-6)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(
            actual[1][name], gradient, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def test_a_training_step(family):
    """The same loss and gradients, and no logits computed; then the same logits."""
    model, inputs = make(family).train(), batch(family)
    expected = step(model, inputs)
    with chunked_loss(model):
        actual = step(model, inputs)
        assert_same_step(actual, expected)
        logits = actual[0].logits
        assert isinstance(logits, DeferredLogits)
        assert logits.computed is None
        assert logits.shape == expected[0].logits.shape
        torch.testing.assert_close(logits.materialize(), expected[0].logits)


def test_evaluation(family):
    """With labels the loss needs no logits; without, they are the model's, and so is generated text."""
    model, inputs = make(family).eval(), batch(family)
    without = {key: value for key, value in inputs.items() if key != "labels"}
    if model.config.is_encoder_decoder:
        without["decoder_input_ids"] = inputs["labels"].clamp(min=3)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    generates = family not in ("bert", "whisper")  # Whisper's own search ends in errors on random weights
    ids = {key: value for key, value in inputs.items() if key != "labels"}
    with torch.no_grad():
        expected, plain = model(**inputs), model(**without)
        text = model.generate(**ids, **settings) if generates else None
        with chunked_loss(model):
            output = model(**inputs)
            assert isinstance(output.logits, DeferredLogits)
            torch.testing.assert_close(output.loss, expected.loss)
            assert torch.equal(output.logits.argmax(-1), expected.logits.argmax(-1))
            assert output.logits.computed is None
            logits = model(**without).logits
            assert type(logits) is Tensor
            assert torch.equal(logits, plain.logits)
            if generates:
                assert torch.equal(model.generate(**ids, **settings), text)
                assert torch.equal(model.train().generate(**ids, **settings), text)


def test_replace_lm_head(family):
    """A screen of the head gives the model's logits; refused where the model adds a number to each class."""
    model, inputs = make(family).eval(), batch(family)
    head = model.get_output_embeddings()
    screen = ScreenedSoftmax.from_linear(head, preview=Int8Preview(), candidates=V)
    if family in ("marian", "bart"):
        with pytest.raises(ValueError, match="adds something of its own"):
            replace_lm_head(model, screen)
        assert model.get_output_embeddings() is head
        return
    with torch.no_grad():
        expected = model(**inputs).logits
        with replace_lm_head(model, screen):
            torch.testing.assert_close(model(**inputs).logits, expected)


def test_undo(family):
    model = make(family)
    original, state = model.get_output_embeddings(), model.state_dict()
    embedding, output = model.get_input_embeddings().weight, batch(family)
    handle = chunked_loss(model)
    assert model.get_output_embeddings() is not original
    inside = model.state_dict()
    assert inside.keys() == state.keys()
    assert all(inside[key].data_ptr() == state[key].data_ptr() for key in state)
    handle.undo()
    handle.undo()
    assert model.get_output_embeddings() is original
    assert (original.weight is embedding) == (inside[weight_key(model)].data_ptr() == embedding.data_ptr())
    assert model.state_dict().keys() == state.keys()
    assert type(model(**output).logits) is Tensor
    assert "save_pretrained" not in vars(model)
    assert "post_init" not in vars(model)


def weight_key(model):
    weight = model.get_output_embeddings().weight
    return next(name for name, p in model.named_parameters(remove_duplicate=False) if p is weight)


def test_undo_after_a_failure():
    model = make("llama")
    original = model.lm_head
    with pytest.raises(ZeroDivisionError), chunked_loss(model):
        raise ZeroDivisionError
    assert model.lm_head is original


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_accumulation(name):
    """4 rows as 4, as 3 + 1 and as 2 + 2 give one loss and gradient."""
    model, inputs = make(name).train(), batch(name, rows=4)
    items = (inputs["labels"][:, 1:] != -100).sum()
    expected = step(model, inputs)
    with chunked_loss(model):
        for sizes in ([4], [3, 1], [2, 2]):
            model.zero_grad()
            losses = []
            for ids, labels in zip(inputs["input_ids"].split(sizes), inputs["labels"].split(sizes), strict=True):
                losses.append(model(input_ids=ids, labels=labels, num_items_in_batch=items).loss)
                losses[-1].backward()
            torch.testing.assert_close(sum(losses), expected[0].loss)
            for key, p in model.named_parameters():
                torch.testing.assert_close(p.grad, expected[1][key], rtol=1e-4, atol=1e-5)


def wanted_gradients(monkeypatch):
    """What the chunked loss is told to form, a list that grows."""
    seen, want = [], LinearChunks.want
    monkeypatch.setattr(LinearChunks, "want", lambda self, wanted: (seen.append(wanted), want(self, wanted))[1])
    return seen


def test_a_step_has_three_products_with_the_head():
    """Of the rows whose labels count: logits, and both gradients. None is computed again."""
    model, inputs = make("llama").train(), batch("llama")
    settings = {"activities": [torch.profiler.ProfilerActivity.CPU], "record_shapes": True}
    with chunked_loss(model), torch.profiler.profile(**settings) as profile:
        model(**inputs).loss.backward()
    products = [e.input_shapes[:2] for e in profile.events() if e.name == "aten::mm"]
    products += [e.input_shapes[1:3] for e in profile.events() if e.name in ("aten::addmm", "aten::addmm_")]
    work = sum(rows * inner * columns for (rows, inner), (_, columns) in products if V in (rows, inner, columns))
    assert work == 3 * int((inputs["labels"][:, 1:] != -100).sum()) * V * model.config.hidden_size


def test_a_frozen_head(monkeypatch):
    """No weight gradient is formed for it."""
    model, inputs = make("phi").train(), batch("phi")
    model.lm_head.requires_grad_(False)
    expected = step(model, inputs)
    seen = wanted_gradients(monkeypatch)
    with chunked_loss(model):
        assert_same_step(step(model, inputs), expected)
    assert [tuple(wanted[:3]) for wanted in seen] == [(True, False, False)]  # of hidden, weight, bias
    assert model.lm_head.weight.grad is None


def test_gradient_checkpointing():
    model, inputs = make("llama", num_hidden_layers=2).train(), batch("llama")
    expected = step(model, inputs)
    model.gradient_checkpointing_enable()
    with chunked_loss(model):
        assert_same_step(step(model, inputs), expected)


@pytest.mark.parametrize("name", ["llama", "gemma2", "marian"])
@pytest.mark.parametrize("how", ["bf16", "autocast"])
def test_low_precision(name, how):
    """No further from float64 than the model's own loss in that precision; in its dtype."""
    exact, inputs = make(name).double().train(), batch(name)
    model = make(name).train()
    if how == "bf16":
        model.bfloat16()
    truth = step(exact, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        own = step(model, inputs)
        with chunked_loss(model):
            ours = step(model, inputs)
    assert ours[0].loss.dtype == own[0].loss.dtype
    weight = weight_key(model)

    def distance(of):
        gradient = of[1][weight].double() - truth[1][weight]
        return abs(of[0].loss.item() - truth[0].loss.item()), gradient.norm().item()

    sizes = truth[0].loss.item(), truth[1][weight].norm().item()
    for our, their, size in zip(distance(ours), distance(own), sizes, strict=True):
        assert our <= 1.5 * their + 0.002 * size


def test_labels_by_position_and_as_a_tuple():
    model, inputs = make("llama").eval(), batch("llama")
    expected = model(**inputs).loss
    with chunked_loss(model):
        loss, logits, *_ = model(inputs["input_ids"], None, None, None, None, inputs["labels"], return_dict=False)
        assert isinstance(logits, DeferredLogits)
    torch.testing.assert_close(loss, expected)


def test_a_copy_of_the_model():
    """It defers on its own, and its original can be undone."""
    model, inputs = make("llama").eval(), batch("llama")
    handle = chunked_loss(model)
    other = copy.deepcopy(model)
    handle.undo()
    assert isinstance(other(**inputs).logits, DeferredLogits)
    assert other.lm_head.weight is not model.lm_head.weight
    assert not other.lm_head.labelled
    with pytest.raises(RuntimeError, match="undo"):
        other.resize_token_embeddings(V + 1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "marian"])
def test_saved_while_replaced(name, tmp_path):
    model, inputs = make(name).eval(), batch(name)
    expected = model(**inputs).loss
    with chunked_loss(model):
        model.save_pretrained(tmp_path)
    torch.testing.assert_close(type(model).from_pretrained(tmp_path)(**inputs).loss, expected)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("how", ["chunked_loss", "replace_lm_head"])
def test_methods_that_need_the_own_head(name, how, tmp_path):
    """Refused, the model unchanged; and there again after `undo`."""
    model = make(name).eval()
    if how == "chunked_loss":
        handle = chunked_loss(model)
    else:
        handle = replace_lm_head(model, nn.Sequential(model.get_output_embeddings()))
        with pytest.raises(RuntimeError, match=r"save_pretrained\(\) cannot be called.*Sequential as head"):
            model.save_pretrained(tmp_path)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"resize_token_embeddings\(\) cannot be called.*undo\(\) first"):
        model.resize_token_embeddings(V + 8)
    with pytest.raises(RuntimeError, match=r"post_init\(\) cannot be called"):
        model.post_init()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    handle.undo()
    model.resize_token_embeddings(V + 8)
    assert len(model.get_output_embeddings().weight) == V + 8
    assert model(**batch(name)).logits.shape[-1] == V + 8


def test_one_replacement_within_another():
    """A head for generation within chunked_loss; each `undo` restores what it found."""
    model = make("gpt2").eval()
    outer = chunked_loss(model)
    deferring = model.lm_head
    inner = replace_lm_head(model, nn.Linear(32, V, bias=False))
    with pytest.raises(RuntimeError, match="undo the later replacement first"):
        outer.undo()
    inner.undo()
    assert model.lm_head is deferring
    with pytest.raises(RuntimeError, match="resize_token_embeddings"):
        model.resize_token_embeddings(V + 8)
    outer.undo()
    model.resize_token_embeddings(V + 8)


class Wrapped(nn.Linear):
    """As PEFT and quantisation have it: a linear layer that computes something else."""

    def forward(self, hidden):
        return 2 * super().forward(hidden)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (nn.ModuleList([nn.Linear(32, V), nn.Linear(32, V)]), "must have one output head, and .* has 2"),
        (nn.Sequential(nn.Linear(32, V)), "nothing around it, got torch.*Sequential"),
        (Wrapped(32, V), "nothing around it, got .*Wrapped.*PEFT, quantisation"),
        (torch.nn.utils.parametrizations.weight_norm(nn.Linear(32, V)), "got .*ParametrizedLinear"),
    ],
)
def test_heads_that_are_refused(head, message):
    model = make("llama")
    model.lm_head = head
    keys = model.state_dict().keys()
    with pytest.raises(TypeError, match=message):
        chunked_loss(model)
    assert model.lm_head is head
    assert model.state_dict().keys() == keys


def test_bad_input(monkeypatch):
    model, inputs = make("llama"), batch("llama")
    original = model.lm_head
    with pytest.raises(TypeError, match="must have an output head to replace, which LlamaModel does not"):
        chunked_loss(model.model)
    with pytest.raises(TypeError, match="output head to replace, which Linear does not"):
        chunked_loss(nn.Linear(2, 3))
    with chunked_loss(model):
        with pytest.raises(TypeError, match=r"nothing around it, got .*DeferringHead.*another replacement"):
            chunked_loss(model)
        for wrong in (V, -1):
            labels = inputs["labels"].clone()
            labels[1, 4] = wrong
            with pytest.raises(IndexError, match=f"from 0 to {V - 1}.*ignore_index=-100; got {wrong}"):
                model(input_ids=inputs["input_ids"], labels=labels)
            assert not model.lm_head.labelled
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.40.2")
    with pytest.raises(ImportError, match=r"transformers>=4\.57, got 4\.40\.2"):
        chunked_loss(model)
    assert model.lm_head is original


def test_two_heads_of_which_one_gives_the_loss():
    """GPT-2 with a head of multiple choice beside that of words."""
    torch.manual_seed(0)
    options = FAMILIES["gpt2"][2]
    config = transformers.GPT2Config(**TOKENS, **options, summary_first_dropout=0.0)
    model, inputs = transformers.GPT2DoubleHeadsModel(config).train(), batch("gpt2")
    expected = step(model, inputs)
    with chunked_loss(model):
        actual = step(model, inputs)
    assert_same_step(actual, expected)
    assert actual[0].logits.computed is None
