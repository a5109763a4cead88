"""Every cell of the table in `docs/compile.md`: which calls compile whole, and which export for any batch."""

import inspect
import re
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import lastlayer
from lastlayer import (
    PLIF,
    AdaptiveSoftmax,
    AugmentReduce,
    BlackOut,
    FactoredOutput,
    FactoredSGD,
    FullSoftmax,
    HierarchicalSoftmax,
    InBatch,
    Int8Preview,
    LogUniform,
    Mixed,
    MixtureOfSoftmaxes,
    MonotoneNetwork,
    NegativeSampling,
    NoiseContrastive,
    OneVsAll,
    OutputLayer,
    QuadraticKernel,
    SampledSoftmax,
    ScreenedSoftmax,
    SoftCap,
    TaylorSoftmax,
    TopKSoftmax,
    TreeSoftmax,
    UMax,
    Uniform,
    Unigram,
)
from lastlayer.functional.ordinary import DYNAMO_KNOWS_EXPORTS
from lastlayer.functional.sampling import uniform_doubles
from lastlayer.layers.sampled.base import SampledLayer
from lastlayer.layers.softmax_head import SoftmaxHead
from law_table import CASES
from pages import ROOT

SAMPLERS = {  # by the layer that each is tested with
    SampledSoftmax: lambda: LogUniform(11),
    NoiseContrastive: lambda: Unigram(COUNTS),
    NegativeSampling: lambda: Uniform(11, shared=False),
    BlackOut: lambda: LogUniform(11, counts=COUNTS),
    UMax: lambda: Mixed(Uniform(11), LogUniform(11)),
    AugmentReduce: lambda: Uniform(11),
}
COUNTS = torch.tensor([3.0, 1, 9, 1, 5, 5, 2, 8, 4, 7, 4])
CLASS_WEIGHTS = torch.linspace(0.1, 1, 11)
LAYERS = {  # by the first cell of their line
    "`FullSoftmax`, with any logit map of the library": {
        "full": lambda: FullSoftmax(5, 11, label_smoothing=0.1, z_loss=0.1, class_weights=CLASS_WEIGHTS),
        "soft-cap": lambda: FullSoftmax(5, 11, logit_map=SoftCap(3.0)),
        "plif": lambda: FullSoftmax(5, 11, logit_map=PLIF(7, 2.0, init_std=1.0)),
        "monotone-network": lambda: FullSoftmax(5, 11, logit_map=MonotoneNetwork(3)),
    },
    "`FullSoftmax` with a `normalizer`": {"top-k": lambda: FullSoftmax(5, 11, normalizer=TopKSoftmax(4))},
    "`MixtureOfSoftmaxes`": {"mixture": lambda: MixtureOfSoftmaxes(5, 11, 2)},
    "`AdaptiveSoftmax`": {"adaptive": lambda: AdaptiveSoftmax(5, 11, [3, 7], div_value=2.0)},
    "`HierarchicalSoftmax`, `TreeSoftmax`": {
        "hierarchical": lambda: HierarchicalSoftmax(5, 11),
        "tree": lambda: TreeSoftmax(5, 11),
    },
    "the same with `sparse=True`": {
        "hierarchical-sparse": lambda: HierarchicalSoftmax(5, 11, sparse=True),
        "tree-sparse": lambda: TreeSoftmax(5, 11, sparse=True),
    },
    "`SampledSoftmax`, `NoiseContrastive`, `NegativeSampling`, `BlackOut`, `UMax`, `AugmentReduce`": {
        kind.__name__: lambda kind=kind, make=make: kind(5, 11, make(), 4, class_weights=CLASS_WEIGHTS)
        for kind, make in SAMPLERS.items()
    },
    "the same with `sparse=True`, or another sampler": {
        "sampled-sparse": lambda: BlackOut(5, 11, LogUniform(11), 4, sparse=True),
        "sampled-in-batch": lambda: NegativeSampling(5, 11, InBatch(11), 4),
        "sampled-kernel": lambda: SampledSoftmax(5, 11, QuadraticKernel(11, 5), 4),
    },
    "`OneVsAll`, without a sampler or with one that compiles": {
        "one-vs-all": lambda: OneVsAll(5, 11, positive_weight=CLASS_WEIGHTS),
        "one-vs-all-sampled": lambda: OneVsAll(5, 11, sampler=LogUniform(11), num_samples=4),
    },
    "`OneVsAll` with `sparse=True`, or another sampler": {
        "one-vs-all-sparse": lambda: OneVsAll(5, 11, sampler=LogUniform(11), num_samples=4, sparse=True)
    },
    "`FactoredOutput` in training": {"factored": lambda: FactoredOutput(5, 11, loss=TaylorSoftmax())},
    "`FactoredOutput` in `eval()`": {"factored-eval": lambda: FactoredOutput(5, 11, loss=TaylorSoftmax()).eval()},
}
MAKE = {name: make for layers in LAYERS.values() for name, make in layers.items()}


def table():
    """The cells of each line, by its first."""
    text = (ROOT / "docs" / "compile.md").read_text(encoding="utf-8")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", text, re.M)]
    return {first: cells for first, *cells in lines[2:]}


CELLS = {name: cells for line, cells in table().items() for name in LAYERS.get(line, {})}


def loss(layer, hidden, targets):
    return [layer(hidden, targets)]


def target_log_prob(layer, hidden, targets):
    return [layer.target_log_prob(hidden, targets)]


def queries(layer, hidden, targets):
    ids = targets.clamp(min=0)[:, None]
    if isinstance(layer, OneVsAll):
        return [layer.topk(hidden, 3).scores, layer.score(hidden, ids)]
    return [layer.log_prob(hidden), layer.topk(hidden, 3).log_prob, layer.score(hidden, ids)]


CALLS = (loss, target_log_prob, queries)


def calls_that(name, word):
    """Those whose cell begins with the word, or holds it in the last place."""
    return [
        call for call, cell in zip(CALLS, CELLS[name], strict=False) if word in cell.split(":")[0].split(",")[0]
    ]


class Calls(nn.Module):
    """Some calls of a layer at once: one graph, and one export."""

    def __init__(self, layer, calls):
        super().__init__()
        self.layer, self.calls = layer, calls

    def forward(self, hidden, targets):
        return [found for call in self.calls for found in call(self.layer, hidden, targets)]


def batch(rows):
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(1, 11, (rows,), generator=generator)  # not class 0, which one test bars
    targets[-1] = -100  # the last: where each row has its own sample, those of the others do not depend on it
    return hidden.requires_grad_(), targets


def layer_of(name):
    """With parameters that are nothing special: those of a new `TreeSoftmax` are 0."""
    torch.manual_seed(0)
    layer = MAKE[name]().double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return layer


def test_the_table_has_every_layer():
    lines = table()
    assert list(lines) == list(LAYERS)
    public = [getattr(lastlayer, name) for name in lastlayer.__all__]
    layers = {kind.__name__ for kind in public if inspect.isclass(kind) and issubclass(kind, OutputLayer)}
    assert layers - {"OutputLayer"} == set(re.findall(r"`(\w+)`", " ".join(lines))) & layers
    for cells in lines.values():
        assert all("whole" in cell or cell.startswith("breaks") or cell == "none" for cell in cells[:3])


def compare(eager, compiled, rows, call=None):
    """Values and gradients of both; the eager one is called by `call`."""
    hidden, targets = batch(rows)
    results = []
    for model in (call or eager, compiled):
        torch.manual_seed(2)  # a sampled loss draws
        values = model(hidden, targets)
        total = sum((v * torch.linspace(0.5, 2, v.numel()).view(v.shape)).sum() for v in values)
        leaves = [hidden, *eager.parameters()]
        found = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        results.append((values, found))
    torch.testing.assert_close(results[1], results[0])


# Layers whose queries are those of another: of "full", of "plif" but for the map, of "one-vs-all".
SAME_QUERIES = {"soft-cap", "monotone-network", "one-vs-all-sampled", "one-vs-all-sparse"}


# Where the backward pass is compiled too: one for each way of forming gradients. It takes most of the time.
WITH_BACKWARD = {"full", "plif", "adaptive", "hierarchical", "tree", "SampledSoftmax", "one-vs-all"}


def backend_of(name):
    return "aot_eager" if name in WITH_BACKWARD else "eager"


def own_queries(name):
    """Whole calls but the loss, of layers whose queries are no other's."""
    kind = type(MAKE[name]())
    if issubclass(kind, SampledLayer):
        for hook in ("_log_prob", "_target_log_prob", "_score", "_topk"):
            assert getattr(kind, hook) is getattr(SoftmaxHead, hook)
        return []
    return [call for call in calls_that(name, "whole") if call is not loss]


@pytest.mark.parametrize("name", [name for name in MAKE if name not in SAME_QUERIES and own_queries(name)])
def test_compiles_whole_with_its_gradients(name):
    torch.compiler.reset()
    eager = Calls(layer_of(name), own_queries(name))
    compare(eager, torch.compile(eager, fullgraph=True, backend=backend_of(name)), 6)


# `AugmentReduce` has the loss of `UMax`; with its examples it is below. "soft-cap" is compiled by Inductor.
WHOLE_LOSSES = [name for name in MAKE if loss in calls_that(name, "whole")]


@pytest.mark.parametrize("name", [name for name in WHOLE_LOSSES if name not in ("AugmentReduce", "soft-cap")])
def test_one_graph_is_the_loss_of_any_batch(name):
    torch.compiler.reset()
    layer = layer_of(name)
    graphs = CompileCounterWithBackend(backend_of(name))
    if isinstance(layer, SampledLayer):  # the class that stands for what is ignored is barred
        layer.bias.data[0] = -torch.inf
    eager = Calls(layer, [loss])
    compiled, counts = torch.compile(eager, fullgraph=True, dynamic=True, backend=graphs), []
    for rows in (6, 9):
        compare(eager, compiled, rows)
        counts.append(graphs.frame_count)
    if DYNAMO_KNOWS_EXPORTS:  # PyTorch 2.11 fixes the batch size of a chunked loss, and compiles it again
        assert counts[0] == counts[1], "another batch size compiled again"


@pytest.mark.parametrize("kind", [UMax, AugmentReduce])
def test_a_compiled_layer_keeps_the_state_of_its_examples(kind):
    """An ignored row that names the example of another changes nothing."""
    torch.compiler.reset()
    hidden, targets = batch(6)
    examples, states = torch.tensor([2, 0, 3, 1, 4, 2]), []
    for compiles in (False, True):
        torch.manual_seed(3)
        layer = kind(5, 11, Uniform(11), 4, num_examples=7).double()
        run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiles else layer
        losses = [run(hidden, targets, examples) for _ in range(2)]
        states.append((losses, list(layer.buffers())))
    torch.testing.assert_close(*states)


@pytest.mark.parametrize("name", ["full", "mixture", "hierarchical", "BlackOut", "one-vs-all"])
def test_a_loss_without_gradients(name):
    torch.compiler.reset()
    layer = layer_of(name)
    with torch.no_grad():
        losses = []
        for run in (layer, torch.compile(layer, fullgraph=True, backend="eager")):
            torch.manual_seed(2)
            losses.append(run(*batch(6)))
        torch.testing.assert_close(*losses)


@pytest.mark.parametrize("name", [name for name in MAKE if calls_that(name, "breaks")])
def test_where_the_graph_breaks_the_layer_runs_eagerly(name):
    torch.compiler.reset()
    (hidden, targets), layer, values = batch(6), layer_of(name), []
    calls = calls_that(name, "breaks")
    for call in calls:
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(Calls(layer, [call]), fullgraph=True, backend="eager")(hidden, targets)
    model = Calls(layer, calls)
    owner = FactoredSGD(layer, 0.1) if isinstance(layer, FactoredOutput) else model
    for run in (model, torch.compile(model, backend="eager")):
        torch.manual_seed(1)  # a sampled loss draws
        found = run(hidden, targets)
        sum(value.sum() for value in found).backward()
        gradients = [p.grad.to_dense() for p in (hidden, *model.parameters()) if p.grad is not None]
        values.append((found, gradients))
        hidden.grad = None
        owner.zero_grad()
    torch.testing.assert_close(*values)


class Fixed(Uniform):
    """The same classes each time, whose random numbers are not Inductor's."""

    def _draw(self, num_sets, num_samples, device):
        return torch.arange(num_sets * num_samples, device=device).view(num_sets, num_samples) % self.num_classes


class OneOfEachKind(nn.Module):
    """The losses of layers with chunks of logits and with operators, and uniform numbers."""

    def __init__(self):
        super().__init__()
        layers = [layer_of(name) for name in ("soft-cap", "hierarchical")]
        self.layers = nn.ModuleList([*layers, SampledSoftmax(5, 11, Fixed(11), 4).double()])

    def forward(self, hidden, targets):
        numbers = uniform_doubles((64,), hidden.device)
        return [*(layer(hidden, targets) for layer in self.layers), numbers]


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="Inductor needs a C++ compiler")
def test_inductor_has_the_eager_losses_and_all_bits_of_random_numbers():
    torch.compiler.reset()
    eager, drawn = OneOfEachKind(), []

    def losses(model):
        def call(hidden, targets):
            *found, numbers = model(hidden, targets)
            drawn.append(numbers)
            return found

        return call

    compare(eager, losses(torch.compile(eager, fullgraph=True)), 6, losses(eager))
    for numbers in drawn:  # of 53 bits; of float32 numbers the last 29 are 0 for those above 1/2
        assert bool((numbers[numbers > 0.5] * 2**53 % 2**29 != 0).any())
        assert 0 <= numbers.min() < 0.2 < 0.8 < numbers.max() < 1


OWN_EXPORTS = [name for name in MAKE if type(MAKE[name]()) is OneVsAll or name == "factored"]


def test_the_law_of_exports_holds_all_other_layers():
    under_the_law = {type(case.make()) for case in CASES}
    for name in MAKE:
        assert re.split(r"[,;]", CELLS[name][3])[0] == ("all but the loss" if name == "factored" else "all calls")
        assert name in OWN_EXPORTS or type(MAKE[name]()) in under_the_law | {UMax}  # whose code AugmentReduce has


@pytest.mark.parametrize(("name", "strict"), [*((name, False) for name in OWN_EXPORTS), ("plif", True)])
def test_exports_for_any_batch(name, strict):
    if strict and not DYNAMO_KNOWS_EXPORTS:
        pytest.skip("in this PyTorch a strict export has the chunks of a compiled graph, of one batch size")
    torch.compiler.reset()
    chosen = CALLS[1:] if name == "factored" else CALLS
    model = Calls(layer_of(name), [call for call in chosen if CELLS[name][CALLS.index(call)] != "none"])
    rows = torch.export.Dim("rows", min=2, max=1 << 30)
    with torch.no_grad():
        exported = torch.export.export(model, batch(6), dynamic_shapes=({0: rows}, {0: rows}), strict=strict)
        for size in (2, 37):
            results = []
            for run in (exported.module(), model):
                torch.manual_seed(2)
                results.append(run(*batch(size)))
            torch.testing.assert_close(*results)


def test_an_exported_sampled_loss_draws_at_every_run():
    model = Calls(SampledSoftmax(5, 11, Uniform(11), 3).double(), [loss])
    hidden, targets = batch(6)
    exported = torch.export.export(model, (hidden.detach(), targets)).module()
    losses = {exported(hidden.detach(), targets)[0].item() for _ in range(5)}
    assert len(losses) == 5
    assert all(0 < value < 10 for value in losses)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SampledSoftmax(5, 11, Uniform(11, replacement=False), 3), "use replacement=True"),
        (lambda: SampledSoftmax(5, 11, QuadraticKernel(11, 5), 3), "use one that does not follow the weight"),
        (lambda: FactoredOutput(5, 11), "use layer.eval()"),
    ],
)
def test_a_loss_that_cannot_be_exported_says_what_to_use(make, says):
    hidden, targets = batch(6)
    with pytest.raises(RuntimeError, match=f"of lastlayer.*{re.escape(says)}"):
        torch.export.export(Calls(make(), [loss]), (hidden.detach().float(), targets), strict=False)


def test_a_screen_is_exported_by_to_onnx_alone():
    screen = ScreenedSoftmax(torch.randn(50, 5), preview=Int8Preview(), candidates=9)
    with pytest.raises(RuntimeError, match=r"ScreenedSoftmax of lastlayer.*lastlayer.export.to_onnx"):
        torch.export.export(screen, (torch.randn(3, 5),), strict=False)


@pytest.mark.parametrize("name", [n for n in MAKE if len(calls_that(n, "whole")) == 3 and "factored" not in n])
def test_fake_tensors(name):
    """Shapes and dtypes without memory, from a layer whose parameters have values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = Calls(layer_of(name), CALLS)
    expected = model(*batch(6))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        hidden, targets = (mode.from_tensor(part.detach()) for part in batch(6))
        parameters = {n: mode.from_tensor(p.detach()).requires_grad_() for n, p in model.named_parameters()}
        found = torch.func.functional_call(model, parameters, (hidden, targets))
        sum(value.sum() for value in found).backward()
    assert [(f.shape, f.dtype) for f in found] == [(e.shape, e.dtype) for e in expected]
    assert all(p.grad.shape == p.shape for p in parameters.values())
