"""What `docs/compile.md` says of every layer: which calls compile whole, and which are exported for any batch."""

import re

import pytest
import torch
from torch import nn

from lastlayer import (
    PLIF,
    AdaptiveSoftmax,
    FactoredOutput,
    FullSoftmax,
    HierarchicalSoftmax,
    Int8Preview,
    MixtureOfSoftmaxes,
    MonotoneNetwork,
    QuadraticKernel,
    SampledSoftmax,
    ScreenedSoftmax,
    Sigsoftmax,
    SoftCap,
    TreeSoftmax,
    Uniform,
)
from lastlayer.functional.ordinary import DYNAMO_KNOWS_EXPORTS

WHOLE = {
    "full": lambda: FullSoftmax(5, 11, label_smoothing=0.1, z_loss=0.1, class_weights=torch.linspace(0.1, 1, 11)),
    "soft-cap": lambda: FullSoftmax(5, 11, logit_map=SoftCap(3.0)),
    "sigsoftmax": lambda: FullSoftmax(5, 11, logit_map=Sigsoftmax()),
    "plif": lambda: FullSoftmax(5, 11, logit_map=PLIF(7, 2.0, init_std=1.0)),
    "monotone-network": lambda: FullSoftmax(5, 11, logit_map=MonotoneNetwork(3)),
    "mixture": lambda: MixtureOfSoftmaxes(5, 11, 2),
    "adaptive": lambda: AdaptiveSoftmax(5, 11, [3, 7], div_value=2.0),
}
GROUPED = {"hierarchical": lambda: HierarchicalSoftmax(5, 11), "tree": lambda: TreeSoftmax(5, 11)}


class Calls(nn.Module):
    """All calls of a layer at once: one graph, and one export."""

    def __init__(self, layer, loss=True):
        super().__init__()
        self.layer, self.loss = layer, loss

    def forward(self, hidden, targets):
        layer, ids = self.layer, targets.clamp(min=0)
        found = [layer.log_prob(hidden), layer.topk(hidden, 3).log_prob, layer.score(hidden, ids[:, None])]
        return (*found, layer(hidden, targets), layer.target_log_prob(hidden, targets)) if self.loss else (*found,)


def batch(rows):
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(11, (rows,), generator=generator)
    targets[1] = -100
    return hidden.requires_grad_(), targets


@pytest.mark.parametrize("name", [*WHOLE, *GROUPED])
def test_compiles_whole_with_its_gradients(name):
    torch.compiler.reset()
    eager = Calls({**WHOLE, **GROUPED}[name]().double(), loss=name in WHOLE)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    hidden, targets = batch(6)
    results = []
    for model in (eager, compiled):
        values = model(hidden, targets)
        total = sum((value * torch.linspace(0.5, 2, value.numel()).view(value.shape)).sum() for value in values)
        leaves = [hidden, *eager.parameters()]
        results.append((values, torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("name", GROUPED)
def test_a_loss_that_groups_its_batch_says_so_when_compiled_whole(name):
    torch.compiler.reset()
    layer = GROUPED[name]()
    hidden, targets = torch.randn(6, 5), torch.randint(11, (6,))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(layer, fullgraph=True, backend="eager")(hidden, targets)
    torch.testing.assert_close(torch.compile(layer, backend="eager")(hidden, targets), layer(hidden, targets))


@pytest.mark.parametrize(
    ("name", "strict"), [*((name, False) for name in [*WHOLE, *GROUPED]), ("plif", True), ("hierarchical", True)]
)
def test_exports_every_call_for_any_batch(name, strict):
    if strict and not DYNAMO_KNOWS_EXPORTS:
        pytest.skip("strict exports need PyTorch 2.12")
    torch.compiler.reset()
    model = Calls({**WHOLE, **GROUPED}[name]().double())
    rows = torch.export.Dim("rows", min=2, max=1 << 30)
    with torch.no_grad():
        exported = torch.export.export(model, batch(6), dynamic_shapes=({0: rows}, {0: rows}), strict=strict)
        for size in (2, 37):
            torch.testing.assert_close(exported.module()(*batch(size)), model(*batch(size)))


class Loss(nn.Module):
    """The loss of a layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden, targets):
        return self.layer(hidden, targets)


def test_an_exported_sampled_loss_draws_at_every_run():
    model = Loss(SampledSoftmax(5, 11, Uniform(11), 3).double())
    hidden, targets = batch(6)
    exported = torch.export.export(model, (hidden.detach(), targets)).module()
    losses = {exported(hidden.detach(), targets).item() for _ in range(5)}
    assert len(losses) == 5
    assert all(0 < loss < 10 for loss in losses)


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
        torch.export.export(Loss(make()), (hidden.detach().float(), targets), strict=False)


def test_a_screen_is_exported_by_to_onnx_alone():
    screen = ScreenedSoftmax(torch.randn(50, 5), preview=Int8Preview(), candidates=9)
    with pytest.raises(RuntimeError, match=r"ScreenedSoftmax of lastlayer.*lastlayer.export.to_onnx"):
        torch.export.export(screen, (torch.randn(3, 5),), strict=False)


@pytest.mark.parametrize("name", [*WHOLE, *GROUPED])
def test_fake_tensors(name):
    """Shapes and dtypes without memory, from a layer whose parameters have values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = Calls({**WHOLE, **GROUPED}[name]().double())
    expected = model(*batch(6))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        hidden, targets = (mode.from_tensor(part.detach()) for part in batch(6))
        parameters = {n: mode.from_tensor(p.detach()).requires_grad_() for n, p in model.named_parameters()}
        found = torch.func.functional_call(model, parameters, (hidden, targets))
        sum(value.sum() for value in found).backward()
    assert [(f.shape, f.dtype) for f in found] == [(e.shape, e.dtype) for e in expected]
    assert all(p.grad.shape == p.shape for p in parameters.values())
