"""chunked_loss under torch.compile: one graph without the logits, or a warning."""

import copy
import importlib
import warnings

import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion

transformers = pytest.importorskip("transformers")

from lastlayer import HierarchicalSoftmax  # noqa: E402
from lastlayer.transformers import DeferredLogits, chunked_loss  # noqa: E402
from tiny_models import FAMILIES, TOKENS, V, batch, make  # noqa: E402

pytestmark = pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.12",
    reason="PyTorch 2.11 does not compile whole: copies of a config, and outputs that hold recorded steps",
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


# The families differ in what Dynamo traces; with AOTAutograd behind it those whose losses do.
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("llama", "aot_eager"),
        ("gemma2", "aot_eager"),
        ("marian", "aot_eager"),
        *((name, "eager") for name in ("gpt2", "opt", "phi", "t5", "bart", "whisper", "bert", "bert-decoder")),
    ],
)
def test_one_graph_without_the_logits(name, backend):
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
    model, inputs = make("bert").eval(), batch("bert")
    expected = model(**inputs)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        with chunked_loss(model):
            output = compiled(**inputs)
            assert isinstance(output.logits, DeferredLogits)
            torch.testing.assert_close(output.loss, expected.loss)
        output = compiled(**inputs)
    assert type(output.logits) is torch.Tensor
    torch.testing.assert_close(output.loss, expected.loss)


def test_the_name_in_a_module_is_restored():
    """After the last of several replacements; a copy of the model, whose head still defers, then computes them."""
    model, other, inputs = make("bert").train(), make("bert"), batch("bert")
    module = importlib.import_module(type(model).__module__)
    expected = loss_and_gradients(model, model, inputs)
    first, second = chunked_loss(model), chunked_loss(other)
    copied = copy.deepcopy(model)
    first.undo()
    assert module.CrossEntropyLoss is not nn.CrossEntropyLoss
    second.undo()
    assert module.CrossEntropyLoss is nn.CrossEntropyLoss
    assert_same(loss_and_gradients(copied, copied, inputs), expected)
    with pytest.warns(UserWarning, match=r"torch\.compile computes the logits of BertForMaskedLM"):
        actual = loss_and_gradients(copied, torch.compile(copied, backend="eager"), inputs)
    assert_same(actual, expected)


class ByModule(transformers.LlamaForCausalLM):
    """Its loss is one that the compiler has a rule for, and no name of a module tells so."""

    def forward(self, input_ids, labels=None):
        output = super().forward(input_ids)
        output.loss = nn.CrossEntropyLoss()(output.logits.flatten(0, 1), labels.flatten())
        return output


def test_what_the_compiler_cannot_see():
    """The logits are computed, with one warning; another layer as head is refused."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TOKENS, **FAMILIES["llama"][2])
    model, inputs = ByModule(config).train(), batch("llama")
    expected = loss_and_gradients(model, model, inputs)
    with chunked_loss(model):
        actual = loss_and_gradients(model, model, inputs)
        assert isinstance(actual[0].logits, DeferredLogits)
        assert_same(actual, expected)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with pytest.warns(UserWarning, match=r"torch\.compile computes the logits of ByModule"):
            actual = loss_and_gradients(model, compiled, inputs)
        assert type(actual[0].logits) is torch.Tensor
        assert_same(actual, expected)
    with (
        chunked_loss(model, HierarchicalSoftmax(32, V)),
        pytest.raises(Exception, match=r"would train .*a full softmax"),
    ):
        torch.compile(model, backend="eager")(**inputs)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_another_layer_as_the_head(name):
    model, inputs = make(name).train(), batch(name)
    with chunked_loss(model, HierarchicalSoftmax(32, V)):
        expected = model(**inputs).loss
        torch.testing.assert_close(torch.compile(model, backend="eager")(**inputs).loss, expected)
