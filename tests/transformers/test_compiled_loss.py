"""chunked_loss under torch.compile: one graph without the logits, or a warning."""

import warnings

import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion

transformers = pytest.importorskip("transformers")

from lastlayer import HierarchicalSoftmax  # noqa: E402
from lastlayer.transformers import DeferredLogits, chunked_loss  # noqa: E402
from tiny_models import V, batch, make  # noqa: E402

pytestmark = pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.12",
    reason="PyTorch 2.11 does not compile whole: copies of a config, and outputs that hold what was recorded",
)


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()


def loss_and_gradients(model, call, inputs):
    model.zero_grad()
    output = call(**inputs)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual, expected):
    torch.testing.assert_close(actual[0].loss, expected[0].loss)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(
            actual[1][name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("name", "backend"), [("gemma2", "aot_eager"), ("gpt2", "eager"), ("phi", "eager")])
def test_one_graph_without_the_logits(name, backend):
    """A head with a cap, of a model without a `loss_type`, and with a bias."""
    model, inputs = make(name).train(), batch(name)
    expected = loss_and_gradients(model, model, inputs)
    with chunked_loss(model), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*computes the logits")
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        actual = loss_and_gradients(model, compiled, inputs)
        assert isinstance(actual[0].logits, DeferredLogits)
        assert actual[0].logits.computed is None
    assert_same(actual, expected)


def test_evaluation_and_undo():
    model, inputs = make("llama").eval(), batch("llama")
    expected = model(**inputs)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        with chunked_loss(model):
            output = compiled(**inputs)
            assert isinstance(output.logits, DeferredLogits)
            torch.testing.assert_close(output.loss, expected.loss)
            assert torch.equal(output.logits.argmax(-1), expected.logits.argmax(-1))
        output = compiled(**inputs)
    assert type(output.logits) is torch.Tensor
    torch.testing.assert_close(output.loss, expected.loss)


def test_a_loss_of_the_model_that_the_compiler_does_not_trace():
    """`nn.CrossEntropyLoss()` inside `forward`: the logits are computed, with one warning."""
    model, inputs = make("bert").train(), batch("bert")
    expected = loss_and_gradients(model, model, inputs)
    with chunked_loss(model):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with pytest.warns(UserWarning, match=r"torch\.compile computes the logits of BertForMaskedLM"):
            actual = loss_and_gradients(model, compiled, inputs)
        assert type(actual[0].logits) is torch.Tensor
        assert_same(actual, expected)
    with (
        chunked_loss(model, HierarchicalSoftmax(32, V)),
        pytest.raises(Exception, match=r"would train .*a full softmax"),
    ):
        torch.compile(model, backend="eager")(**inputs)


def test_what_the_compiler_does_to_the_placeholder():
    """`F.tanh` does not call `__torch_function__` in a graph: an error, and no loss that is NaN."""
    model, inputs = make("recurrent-gemma").train(), batch("recurrent-gemma")
    with chunked_loss(model), pytest.raises(RuntimeError, match="does not see what RecurrentGemmaForC"):
        torch.compile(model, backend="eager")(**inputs)


def test_a_loss_of_the_callers_own():
    """Without labels the logits are computed: the loss in the same graph may be `nn.CrossEntropyLoss()`."""
    model, inputs = make("llama").train(), batch("llama")

    def step(input_ids, labels):
        return nn.CrossEntropyLoss()(model(input_ids).logits.flatten(0, 1), labels.flatten())

    expected = step(**inputs)
    with chunked_loss(model), pytest.warns(UserWarning, match="without labels"):
        torch.testing.assert_close(torch.compile(step, backend="eager")(**inputs), expected)


def test_the_modules_before_the_head():
    """Compiled on their own they leave any model's logits deferred."""
    model, inputs = make("t5").train(), batch("t5")
    expected = loss_and_gradients(model, model, inputs)
    model.encoder.compile(backend="eager")
    model.decoder.compile(backend="eager")
    with chunked_loss(model):
        actual = loss_and_gradients(model, model, inputs)
        assert actual[0].logits.computed is None
    assert_same(actual, expected)


def test_another_layer_as_the_head():
    model, inputs = make("llama").train(), batch("llama")
    with chunked_loss(model, HierarchicalSoftmax(32, V)):
        expected = model(**inputs).loss
        torch.testing.assert_close(torch.compile(model, backend="eager")(**inputs).loss, expected)
